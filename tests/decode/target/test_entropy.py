"""Entropy adaptive decoding: a slow reference, both ends of the threshold, caches, batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from spectool.decode import tree
from spectool.decode.control.base import Control
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.sampling import Draws
from spectool.decode.target.entropy import LARGE, SMALL, EntropyConfig, EntropyTarget, Switch
from spectool.decode.target.open import open_target
from spectool.errors import NotFinite, UnsupportedError, UsageError

from ...conftest import make_model
from ..conftest import plain_text

Tiny = Callable[..., PreTrainedModel]
SAMPLED = {"temperature": 0.9, "top_k": 40, "repetition_penalty": 1.3}


@pytest.fixture
def pair(tiny: Tiny, endless: Any) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """`pair("llama", "gpt2")` returns two random models without an end of text."""
    return lambda large, small: (endless(tiny(large, 0)), endless(tiny(small, 1)))


def open_runner(models: Sequence[PreTrainedModel], *, kv: str = "dense", **config: Any) -> Runner:
    large, small = (open_target(model, kv=kv) for model in models)
    return Runner(EntropyTarget(large, small, EntropyConfig(**config)))


@torch.inference_mode()
def slow_text(
    models: Sequence[PreTrainedModel],
    prompt: list[int],
    new_tokens: int,
    config: EntropyConfig,
    **options: Any,
) -> tuple[list[int], list[int], list[float]]:
    """Return new tokens, positions of switches and entropies.

    Without a cache: both models read the whole text at each step. Straight from the description.
    """
    sampling, draws = SamplingParams(**options), Draws(0, 0)
    text, entropies, writers = list(prompt), list[float](), list[int]()
    writer, since = LARGE if math.isfinite(config.threshold) else SMALL, 0
    for _ in range(new_tokens):
        scores_1V = [
            model(input_ids=torch.tensor([text])).logits[:, -1].float() for model in models
        ]
        if sampling.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            scores_1V = [penalty(torch.tensor([text]), each) for each in scores_1V]  # type: ignore[arg-type]
        logits_V = scores_1V[writer][0]
        probs = logits_V.double().softmax(-1).tolist()
        entropies.append(-sum(p * math.log2(p) for p in probs if p > 0))
        writers.append(writer)
        if sampling.greedy:
            text.append(int(logits_V.argmax()))
        else:
            warped_V = sampling.probs(logits_V[None, None])[0, 0].double()
            number = draws.uniform(len(text), "token")
            text.append(int((warped_V.cumsum(0) <= number * warped_V.sum()).sum()))
        since += 1
        recent = entropies[-min(since, config.window) :]
        wanted = LARGE if sum(recent) / len(recent) >= config.threshold else SMALL
        if since >= config.dwell and wanted != writer:
            writer, since = wanted, 0
    switches = [at for at, (a, b) in enumerate(itertools.pairwise(writers), 1) if a != b]
    return text[len(prompt) :], switches, entropies


def middle(entropies: Sequence[float]) -> float:
    """Return a threshold between two entropies, so that rounding decides nothing."""
    ordered = sorted(entropies)
    return (ordered[len(ordered) // 2] + ordered[len(ordered) // 2 - 1]) / 2


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "families",
    [
        ("llama", "llama"),
        ("gpt2", "gpt2"),
        ("qwen3", "qwen3"),
        ("llama", "mamba2"),
        pytest.param(("qwen3_next", "gemma3"), marks=pytest.mark.slow),
        pytest.param(("mistral", "lfm2"), marks=pytest.mark.slow),
    ],
    ids=lambda families: "-".join(families),
)
def test_text_and_switches_are_those_of_a_slow_reference(
    pair: Any, prompt_of: Any, families: tuple[str, str], options: dict[str, Any]
) -> None:
    models, prompt = pair(*families), prompt_of(7, seed=1)
    ends = [EntropyConfig(threshold=threshold) for threshold in (0, math.inf)]
    alone = [slow_text(models, prompt, 16, config, **options) for config in ends]
    entropies = [entropy for *_, of_text in alone for entropy in of_text]
    config = EntropyConfig(threshold=middle(entropies), window=2, dwell=2)
    tokens, switches, _ = slow_text(models, prompt, 24, config, **options)
    assert len(switches) > 1
    (result,) = open_runner(models, **config.as_dict()).generate(
        [prompt], max_new_tokens=24, **options
    )
    assert result.token_ids == tokens
    assert result.turns is not None and list(result.turns.switches) == switches
    edges = [0, *switches, 24]
    written = [after - before for before, after in itertools.pairwise(edges)]
    assert result.turns.small_tokens == sum(written[1::2])
    # The first switch reads all but the last token, each later one what the other model fed since.
    assert result.turns.caught_up == len(prompt) + switches[-1] - 1
    assert not result.lossless and result.forwards == 24


@pytest.mark.parametrize("kv", ["dense", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_ends_of_the_threshold_are_the_models_alone(
    pair: Any, prompt_of: Any, options: dict[str, Any], kv: str
) -> None:
    models, prompt = pair("llama", "qwen3"), prompt_of(9)
    for threshold, model in zip((0, math.inf), models, strict=True):
        runner = open_runner(models, kv=kv, threshold=threshold, dwell=1)
        (result,) = runner.generate([prompt], max_new_tokens=30, **options)
        (alone,) = Runner(model, kv=kv).generate([prompt], max_new_tokens=30, **options)
        assert result.token_ids == alone.token_ids
        assert result.turns is not None and result.turns.switches == ()
        assert result.turns.small_tokens == (0 if threshold == 0 else 30)
        assert result.turns.caught_up == 0


def test_requests_of_a_batch_do_not_see_each_other(pair: Any, prompt_of: Any) -> None:
    """They join and leave, and each switches at its own tokens."""
    runner = open_runner(pair("llama", "gpt2"), threshold=7.4, window=3, dwell=2)
    prompts = [prompt_of(length, seed=length) for length in (3, 60, 11, 1, 24)]
    limits = [25, 9, 30, 18, 4]
    together = runner.generate(prompts, max_new_tokens=limits, batch_size=3, **SAMPLED)
    alone = runner.generate(prompts, max_new_tokens=limits, **SAMPLED)
    assert together == alone
    assert len({result.turns.switches for result in alone if result.turns}) > 3


def keys_and_values(cache: Any, length: int) -> list[Tensor]:
    return [field[:, :, :length] for store in cache.stores for field in store.fields]


@torch.inference_mode()
def test_the_cache_of_a_model_that_was_away_is_that_of_one_that_stayed(
    pair: Any, prompt_of: Any
) -> None:
    models, text = pair("llama", "gpt2"), prompt_of(40)
    target = EntropyTarget(*map(open_target, models))
    cache = target.cache(1)
    target.prefill(cache, [text[:10]])
    (switch,) = cache.switches
    for at, active in zip(range(10, 40), [SMALL] * 12 + [LARGE] * 17 + [SMALL], strict=True):
        switch.active = active
        target.verify(cache, [tree.root(text[at])])
        cache.commit([[text[at]]], [[0]])
    assert switch.caught_up == 10 + 12 + 17
    # The large model was away for the last token.
    for own, model, length in zip(cache.caches, models, (39, 40), strict=True):
        assert own.tokens == [text[:length]]
        stayed = open_target(model)
        there = stayed.cache(1)
        for token in text[:length]:
            stayed.prefill(there, [[token]])
        pairs = zip(keys_and_values(own, length), keys_and_values(there, length), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_conversation_continues_both_caches(pair: Any, prompt_of: Any) -> None:
    models = pair("qwen3", "gpt2")
    config = {"threshold": 7.4, "window": 1, "dwell": 2}
    runner, prompt = open_runner(models, **config), prompt_of(20)
    (first,) = runner.generate([prompt], max_new_tokens=20, temperature=0.9, reuse_cache=True)
    longer = [*prompt, *first.token_ids[:15], *prompt_of(8, seed=3)]
    (second,) = runner.generate([longer], max_new_tokens=20, temperature=0.9, reuse_cache=True)
    (fresh,) = open_runner(models, **config).generate([longer], max_new_tokens=20, temperature=0.9)
    assert first.turns is not None and second.turns is not None and fresh.turns is not None
    assert second.token_ids == fresh.token_ids
    assert second.turns.switches == fresh.turns.switches
    assert second.turns.caught_up < fresh.turns.caught_up


class Forced(Control[int]):
    """Allows one token: the number of tokens so far."""

    def start(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def advance(self, state: int, token: int) -> int:
        return state + 1

    def process(self, state: int, logits_V: Tensor) -> Tensor:
        return torch.full_like(logits_V, -torch.inf).index_fill_(0, torch.tensor([state]), 0.0)


def test_forced_tokens_do_not_call_the_large_model(pair: Any, prompt_of: Any) -> None:
    runner, prompt = open_runner(pair("llama", "gpt2"), threshold=0.5, dwell=4), prompt_of(6)
    (free,) = runner.generate([prompt], max_new_tokens=12)
    assert free.turns is not None and free.turns.switches == ()
    for temperature in (0.0, 1.5):
        (forced,) = runner.generate(
            [prompt], max_new_tokens=12, controls=[[Forced()]], temperature=temperature
        )
        assert forced.token_ids == list(range(6, 18))
        assert forced.turns is not None and forced.turns.switches == (4,)


def test_the_temperature_does_not_change_the_entropy(pair: Any, prompt_of: Any) -> None:
    """With one token left to draw, the text is greedy and so are the switches."""
    runner, prompt = open_runner(pair("llama", "gpt2"), threshold=7.4, dwell=2), prompt_of(6)
    (greedy,) = runner.generate([prompt], max_new_tokens=20)
    (drawn,) = runner.generate([prompt], max_new_tokens=20, temperature=5.0, top_k=1)
    assert greedy.turns is not None and len(greedy.turns.switches) > 1
    assert greedy.turns == drawn.turns and greedy.token_ids == drawn.token_ids


@pytest.mark.parametrize(
    ("window", "dwell", "switches"),
    # Entropies 1 1 9 1 1 9 9 9 1 1 against 4; by hand.
    [(1, 1, (1, 3, 4, 6, 9)), (2, 1, (1, 3, 4, 6)), (5, 3, (3, 7)), (1, 4, (4, 8))],
)
def test_window_and_dwell(window: int, dwell: int, switches: tuple[int, ...]) -> None:
    switch = Switch.start(EntropyConfig(threshold=4, window=window, dwell=dwell))
    assert switch.active == LARGE
    for entropy in (1, 1, 9, 1, 1, 9, 9, 9, 1, 1):
        switch.take(entropy)
    assert switch.turns().switches == switches


def test_an_lm_head_padded_further_and_the_shorter_context(
    endless: Any, tiny: Tiny, prompt_of: Any
) -> None:
    models = [
        endless(make_model("llama", vocab_size=384, max_position_embeddings=128)),
        endless(tiny("llama", 1)),
    ]
    target = EntropyTarget(*map(open_target, models))
    assert (target.context, target.num_tokens, target.vocab_size) == (128, 320, 320)
    runner = open_runner(models, threshold=math.inf)
    (result,) = runner.generate([prompt_of(9)], max_new_tokens=300)
    assert result.finish_reason == "context"
    assert result.token_ids == plain_text(models[1], prompt_of(9), 119)
    with pytest.raises(UsageError, match="prompt 1 has 200 tokens; the context holds 128"):
        runner.generate([prompt_of(200)])
    shorter = EntropyTarget(*map(open_target, reversed(models)))
    assert shorter.context_reason == "the small model's context is 128 tokens"


def test_what_cannot_take_turns_is_refused(pair: Any, prompt_of: Any) -> None:
    runner = open_runner(pair("llama", "gpt2"))
    with pytest.raises(UsageError, match="ngram cannot draft where two models take turns"):
        runner.use("ngram")
    with pytest.raises(UsageError, match="context, kv and forward are for a model"):
        Runner(runner.target, context=64)
    with pytest.raises(UnsupportedError, match="no drafts: two models take turns"):
        runner.target.verify(runner.target.cache(1), [tree.chain([1, 2], kind="deterministic")])
    models = make_model("recurrent_gemma"), make_model("llama")
    with pytest.raises(UnsupportedError, match="keep the state, so no other model can take turns"):
        open_runner(models)


def test_a_small_model_whose_logits_are_nan_is_an_error(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    broken = make_model("llama", seed=1)
    broken.get_output_embeddings().weight.data.fill_(math.nan)
    runner = open_runner([endless(tiny("llama")), endless(broken)], threshold=9, dwell=3)
    with pytest.raises(NotFinite):
        runner.generate([prompt_of(5)], max_new_tokens=10)
