"""Encoder-decoders: passes of trees, batches, whole texts and their distribution, refusals."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.encoder_decoder import EncoderDecoderTarget
from spectool.decode.target.open import open_strategy, open_target
from spectool.errors import CheckpointError, SpectoolError, UnsupportedError, UsageError

from ...conftest import make_model
from ..encoder_decoders import KINDS, generated, last_logits, make
from ..test_distribution import agrees
from ..trees import path_to, trie

DRAFTERS = ["copy", "ngram", "trigram+recycle", "jacobi:window=4", "ngram+copy:tune"]


def sources_of(count: int, *, vocab: int = 60, seed: int = 0) -> list[list[int]]:
    noise = random.Random(seed)
    return [[noise.randrange(3, vocab) for _ in range(noise.randint(2, 40))] for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_sees_its_own_path_and_its_own_source(kind: str) -> None:
    """Rows of unequal sources and outputs; trees of unequal size; a row joins and one leaves."""
    model = make(kind)
    target = EncoderDecoderTarget(model)
    sources, outputs = sources_of(3), sources_of(3, seed=1)
    caches = [target.cache(2), target.cache(1)]
    for cache, rows in zip(caches, ([0, 1], [2]), strict=True):
        target.begin(cache, [sources[row] for row in rows])
        done = target.prefill(cache, [outputs[row] for row in rows])
        for logits_V, row in zip(done.logits_BV, rows, strict=True):
            expected = last_logits(model, sources[row], outputs[row])
            torch.testing.assert_close(logits_V, expected, atol=1e-3, rtol=1e-4)
    cache = caches[0]
    cache.join(caches[1])
    drafts = [
        trie(7, [[8, 9, 10], [8, 11], [12, 9]], nodes=9),
        trie(13, [[14]], nodes=9),
        trie(3, [[5], [4, 5]], nodes=9),
    ]
    rows = [0, 1, 2]
    for step in range(2):
        logits = target.verify(cache, [drafts[row] for row in rows]).logits_BNV
        for at, row in enumerate(rows):
            for node in range(len(drafts[row])):
                path = [drafts[row].tokens[i] for i in path_to(drafts[row], node)]
                expected = last_logits(model, sources[row], outputs[row] + path)
                torch.testing.assert_close(logits[at, node], expected, atol=1e-3, rtol=1e-4)
        # The second branch of each tree is committed, and the first row leaves.
        paths = [path_to(drafts[row], len(drafts[row]) - 1) for row in rows]
        cache.commit([drafts[row].tokens for row in rows], paths)
        for row, path in zip(rows, paths, strict=True):
            outputs[row] = outputs[row] + [drafts[row].tokens[i] for i in path]
        if step == 0:
            cache.select([1, 2])
            rows = [1, 2]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in ("t5", "bart-forced") else pytest.mark.slow) for k in KINDS],
)
def test_greedy_text_is_transformers_own(kind: str) -> None:
    model, sources = make(kind), sources_of(5)
    expected = [generated(model, source, 24) for source in sources]
    assert sum(len(set(text)) for text in expected) > 12, "texts that vary"
    runner = Runner(model)
    for draft, batch_size in [("none", 1), ("none", 5), *((name, 2) for name in DRAFTERS)]:
        runner.use(draft)
        results = runner.generate(sources, max_new_tokens=24, batch_size=batch_size)
        assert [result.token_ids for result in results] == expected, draft
        assert all(result.lossless for result in results)


def test_a_text_ends_where_transformers_ends_it() -> None:
    model, sources = make("t5-gated", end=True, vocab=8, seed=2), sources_of(8, vocab=8)
    expected = [generated(model, source, 40) for source in sources]
    assert {len(text) for text in expected} > {40}
    results = Runner(model, draft="copy").generate(sources, max_new_tokens=40, batch_size=3)
    assert [result.token_ids for result in results] == expected


def test_penalties_look_at_the_output_alone() -> None:
    model, sources = make("t5-gated"), sources_of(3)
    options: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    for result, source in zip(
        Runner(model, draft="copy").generate(sources, max_new_tokens=16, **options),
        sources,
        strict=True,
    ):
        ids = torch.tensor([source])
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, **options)
        assert result.token_ids == expected[0, 1:].tolist()


def exact_probs(model: PreTrainedModel, source: list[int], length: int) -> dict[Any, float]:
    """Return the probability of each text of a model of three tokens, from cacheless logits."""
    found: dict[Any, float] = {}
    for text in itertools.product(range(3), repeat=length):
        probability = 1.0
        for at, token in enumerate(text):
            logits_V = last_logits(model, source, [0, *text[:at]])
            probs_V = SamplingParams(temperature=1.0).probs(logits_V[None])[0]
            probability *= float(probs_V[token])
        found[text] = probability
    return found


@pytest.mark.parametrize("draft", ["copy", pytest.param("ngram+copy", marks=pytest.mark.slow)])
def test_the_distribution_is_the_models(draft: str) -> None:
    model, source = make("t5", vocab=3, seed=2), [1, 2, 0, 1, 2, 2]
    runner = Runner(model, draft=draft)
    results = runner.generate(
        [source] * 1000, max_new_tokens=4, batch_size=500, temperature=1.0, seed=5
    )
    assert sum(result.accepted for result in results) > 100
    counts = Counter(tuple(result.token_ids) for result in results)
    probs = exact_probs(model, source, 4)
    assert max(probs.values()) < 0.5, "a distribution that is not a single text"
    assert agrees(counts, probs)


def test_a_request_that_continues_reads_its_own_source() -> None:
    runner, (one, two) = Runner(make("t5")), sources_of(2)
    (before,) = runner.generate([one], max_new_tokens=5)
    (result,) = runner.generate([two], max_new_tokens=5, reuse_cache=True)
    (again,) = runner.generate([one], max_new_tokens=5, reuse_cache=True)
    assert (again.token_ids, result.token_ids) == (before.token_ids, generated(make("t5"), two, 5))


def test_no_patches_stay() -> None:
    model = make("t5")
    Runner(model).generate([[3, 4]], max_new_tokens=2)
    assert not any("compute_bias" in vars(part) for part in model.modules())


def test_the_context_bounds_each_text() -> None:
    runner = Runner(make("bart"), draft="copy", context=20)
    (result,) = runner.generate([[5] * 20], max_new_tokens=99)
    assert len(result.token_ids) == 19 and result.finish_reason == "context"
    with pytest.raises(UsageError, match="21 tokens; the context holds 20"):
        runner.generate([[5] * 21])


def test_what_is_not_finite_is_located(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("t5", seed=3)
    layer = model.decoder.block[1]
    hook = layer.register_forward_hook(lambda m, i, output: (output[0] * torch.nan, *output[1:]))
    with pytest.raises(SpectoolError, match=r"decoder\.block\.1 is the first"):
        Runner(model).generate([[3, 4]])
    hook.remove()


def test_drafters_that_cannot_know_a_source() -> None:
    runner = Runner(make("t5"))
    with pytest.raises(UsageError, match="skip cannot draft for t5"):
        runner.use("skip")
    small = make_model("llama", vocab_size=60)
    with pytest.raises(UsageError, match="draft_model cannot draft for t5"):
        runner.use(DraftModelDrafter(small, DraftModelDrafter.Config(), target=runner.target))
    with pytest.raises(UsageError, match="t5, an encoder-decoder"):
        open_strategy("entropy", runner.target, "nowhere", tokenizer=None)  # type: ignore


def test_others_are_refused() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 12, "vocab_size": 64}
    ids = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids))
    with pytest.raises(UnsupportedError, match=r"whisper cannot be decoded.*bart, mt5, t5"):
        open_target(model)
    with pytest.raises(UnsupportedError, match=r"t5 cannot be decoded.*encoder-decoder"):
        AttentionTarget(make("t5"))
    without = make("t5", seed=4)
    without.generation_config.decoder_start_token_id = None
    without.config.decoder_start_token_id = None
    with pytest.raises(CheckpointError, match="decoder_start_token_id is None"):
        open_target(without)
