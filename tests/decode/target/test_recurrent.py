"""Targets with a recurrent state: chains, replay, kept caches, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from spectool.decode import tree
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.drafters.medusa import MedusaDrafter, MedusaHeads
from spectool.decode.generate import Runner
from spectool.decode.policy import chain as chains
from spectool.decode.protocol import Needs
from spectool.decode.target import recurrent
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.open import open_target
from spectool.decode.target.recurrent import RecurrentTarget
from spectool.distill.teacher import read_features
from spectool.errors import UnsupportedError, UsageError
from spectool.families import families

from ...conftest import RECURRENT, make_model
from ..trees import trie

Tiny = Callable[..., PreTrainedModel]
# In transformers 5.23 these two clamp time steps in passes of several tokens only.
BOUNDING = {"zamba2", "nemotron_h"}
CHAINS = families(state="continues")
CHAINED = [family for family in RECURRENT if family in CHAINS - BOUNDING]
PLAIN = [family for family in RECURRENT if family not in CHAINED]
# One of each kind: a scan, scan and attention in a layer, delta rule, convolution, with a window.
KINDS = ["mamba2", "falcon_h1", "qwen3_next", "lfm2", "lfm3"]


@contextmanager
def sizes_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """Record how many tokens each call of the model is given."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@torch.inference_mode()
def in_passes(model: PreTrainedModel, tokens: list[int], sizes: list[int]) -> torch.Tensor:
    """Return the last logits by transformers alone, in passes of these sizes."""
    target = open_target(model)
    assert isinstance(target, RecurrentTarget)
    state = transformers.DynamicCache(config=model.config)
    start = 0
    for size in sizes:
        options: dict[str, Any] = {target.cache_name: state}
        if target._takes_positions:
            options["position_ids"] = torch.arange(start, start + size)[None]
        ids = torch.tensor([tokens[start : start + size]])
        logits: torch.Tensor = model(input_ids=ids, use_cache=True, **options).logits[0, -1]
        start += size
    return logits


def test_every_family_is_here() -> None:
    assert set(RECURRENT) == CHAINS | families(state="ignored")


@pytest.mark.parametrize("family", CHAINED)
def test_text_is_that_of_generate(
    tiny: Tiny,
    family: str,
    adversaries: Any,
    endless: Any,
    reference: Any,
    prompt_of: Any,
) -> None:
    model, prompt = endless(tiny(family)), prompt_of(9)
    new = reference(model, prompt, 9)
    runner = Runner(model)
    with sizes_of(model) as sizes:
        (plain,) = runner.generate([prompt], max_new_tokens=9)
    assert plain.token_ids == new
    assert sizes == [9] + 8 * [1]
    drafters = adversaries(prompt + new, 320)
    for name in ("oracle", "branching", "wrong"):
        runner.use(drafters[name])
        with sizes_of(model) as sizes:
            (result,) = runner.generate([prompt], max_new_tokens=9)
        assert result.token_ids == new, name
        assert result.forwards == len(sizes) == 9 - result.accepted
        assert result.drafted > 0
        assert result.accepted > 0 or name == "wrong"
    for spec in ("ngram", "recycle"):
        runner.use(spec)
        (result,) = runner.generate([prompt], max_new_tokens=9)
        assert result.token_ids == new, spec


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("mamba2", "ngram"),
        ("mamba2", "recycle"),
        ("mamba2", "trigram"),
        ("falcon_h1", "ngram+recycle+trigram"),
        ("mamba2", "ngram+recycle:tune"),
        ("mamba2", "jacobi"),
    ],
)
def test_every_drafter_in_a_batch(
    family: str, spec: str, endless: Any, reference: Any, prompt_of: Any
) -> None:
    """A text of few different tokens repeats itself, so lookups find something."""
    model = endless(make_model(family, vocab_size=12))
    prompts = [prompt_of(size, seed=size, vocab=12) for size in (11, 4, 7)]
    limits = [24, 9, 16]
    runner = Runner(model, draft=spec)
    results = runner.generate(prompts, max_new_tokens=limits, batch_size=3)
    for prompt, limit, result in zip(prompts, limits, results, strict=True):
        assert result.token_ids == reference(model, prompt, limit)
    if spec != "ngram+recycle:tune":
        assert sum(result.accepted for result in results) > 0
    alone = runner.generate(prompts, max_new_tokens=limits)
    assert [result.token_ids for result in alone] == [result.token_ids for result in results]


@pytest.mark.parametrize("family", PLAIN)
def test_some_families_decode_plainly(
    tiny: Tiny, family: str, endless: Any, reference: Any, prompt_of: Any
) -> None:
    model, prompt = endless(tiny(family)), prompt_of(8)
    runner = Runner(model, draft="ngram+recycle:tune")
    assert not runner.is_tuned
    (result,) = runner.generate([prompt], max_new_tokens=9)
    assert result.token_ids == reference(model, prompt, 9)
    assert (result.forwards, result.drafted) == (9, 0)
    note = runner.target.notes[-1]
    assert note.startswith(f"{family}: passes of several tokens ")
    assert note.endswith("; decoding plainly")
    cache = runner.target.cache(1)
    with pytest.raises(UnsupportedError, match="takes no drafts: passes of several tokens"):
        runner.target.verify(cache, [tree.chain([3, 4], kind="deterministic")])


@pytest.mark.parametrize("family", PLAIN)
def test_prompts_together_are_as_alone(
    tiny: Tiny, family: str, endless: Any, reference: Any, prompt_of: Any
) -> None:
    """Also if modules hold the state (RecurrentGemma), which the next prompt overwrites."""
    model, prompts = endless(tiny(family)), [prompt_of(length) for length in (4, 9, 6)]
    results = Runner(model).generate(prompts, max_new_tokens=6, batch_size=3)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == reference(model, prompt, 6)


@pytest.mark.parametrize("family", PLAIN)
def test_chains_are_wrong_for_plain_families(family: str) -> None:
    """A failure here means that the family may now be drafted for: passes of chains are correct."""
    model, tokens = make_model(family), list(range(5, 25))
    single = in_passes(model, tokens, [8] + 12 * [1])
    assert (in_passes(model, tokens, [8, 12]) - single).abs().max() > 1e-4


def test_bounded_time_steps_are_found() -> None:
    target = open_target(make_model("mamba2", time_step_limit=(0.01, 0.1)))
    assert not target.takes_drafts
    assert open_target(make_model("mamba2")).takes_drafts


@pytest.mark.parametrize("family", CHAINED)
def test_a_rejected_draft_leaves_no_trace(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    target = open_target(model)
    cache, fresh = target.cache(1), target.cache(1)
    target.prefill(cache, [[5, 6, 7]])
    draft = tree.chain([8, 9, 10, 11, 12], kind="deterministic")
    target.verify(cache, [draft])
    cache.commit([draft.tokens], [[0, 1]])
    again = tree.chain([20, 21, 22], kind="deterministic")
    logits = target.verify(cache, [again]).logits_BNV
    cache.commit([again.tokens], [[0]])
    last = target.verify(cache, [tree.root(30)]).logits_BNV
    cache.commit([[30]], [[0]])
    assert cache.tokens == [[5, 6, 7, 8, 9, 20, 30]]
    assert cache.num_to_replay(0) == 0
    # fp32 of chunked scans: up to 3e-5 on logits of 5.
    target.prefill(fresh, [[5, 6, 7, 8, 9]])
    expected = target.verify(fresh, [again]).logits_BNV
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    expected = target.prefill(target.cache(1), [[5, 6, 7, 8, 9, 20, 30]]).logits_BV
    torch.testing.assert_close(last[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", KINDS)
def test_a_pass_that_is_not_committed_changes_nothing(tiny: Tiny, family: str) -> None:
    target = open_target(tiny(family))
    cache = target.cache(1)
    target.prefill(cache, [[5, 6, 7]])
    draft = tree.chain([8, 9], kind="deterministic")
    first = target.verify(cache, [draft]).logits_BNV
    for _ in range(3):
        target.verify(cache, [tree.root(13)])
    with sizes_of(target.model) as sizes:
        logits = target.verify(cache, [draft]).logits_BNV
    torch.testing.assert_close(logits, first, atol=1e-4, rtol=1e-4)
    assert sizes == [2]


def test_there_is_an_end_to_replaying(
    tiny: Tiny, adversaries: Any, endless: Any, reference: Any, prompt_of: Any
) -> None:
    model, prompt = endless(tiny("lfm2")), prompt_of(6)
    new = reference(model, prompt, 80)
    runner = Runner(model, draft=adversaries(prompt + new, 320)["wrong"])
    with sizes_of(model) as sizes:
        (result,) = runner.generate([prompt], max_new_tokens=80)
    assert result.token_ids == new
    assert max(sizes) <= chains._MOST_REPLAYED + 1 + 4
    assert result.drafted > 80


@pytest.mark.parametrize("family", KINDS)
def test_sampled_text_is_that_of_plain_sampling(family: str, endless: Any, prompt_of: Any) -> None:
    runner = Runner(endless(make_model(family, vocab_size=12)))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8, "seed": 4}
    prompt = prompt_of(10, vocab=12)
    (plain,) = runner.generate([prompt], **options)
    for spec in ("ngram", "recycle"):
        runner.use(spec)
        (result,) = runner.generate([prompt], **options)
        assert result.token_ids == plain.token_ids
        assert result.drafted > 0


@pytest.mark.parametrize("family", [*KINDS, "mamba", "zamba", "recurrent_gemma"])
def test_a_kept_cache_goes_on_or_starts_over(
    tiny: Tiny, family: str, adversaries: Any, endless: Any, prompt_of: Any
) -> None:
    model, prompt = endless(tiny(family)), prompt_of(10)
    runner = Runner(model)
    (first,) = runner.generate([prompt], max_new_tokens=12)
    whole = prompt + first.token_ids
    longer, other = [*whole, 7, 8, 9], [*whole[:14], 7, 8]
    expected = [runner.generate([p], max_new_tokens=5)[0].token_ids for p in (longer, other)]
    drafter = adversaries(whole, 320)["branching"]
    for prompts in ([longer, other], [other, longer]):
        runner.use(drafter)
        # An end within an accepted path leaves some of it to be replayed.
        runner.generate([prompt], max_new_tokens=12, eos=[whole[-2]], reuse_cache=True)
        runner.use("recycle")
        for p in prompts:
            (result,) = runner.generate([p], max_new_tokens=5, reuse_cache=True)
            assert result.token_ids == expected[[longer, other].index(p)]


def test_only_what_is_new_passes(tiny: Tiny, endless: Any, prompt_of: Any) -> None:
    model, prompt = endless(tiny("mamba2")), prompt_of(10)
    runner = Runner(model)
    (first,) = runner.generate([prompt], max_new_tokens=5)
    with sizes_of(model) as sizes:
        runner.generate([prompt + first.token_ids + [7]], max_new_tokens=1, reuse_cache=True)
    assert sizes == [2]


@pytest.mark.parametrize("family", [*KINDS, "jamba"])
def test_prompts_in_chunks(tiny: Tiny, family: str, monkeypatch: Any, prompt_of: Any) -> None:
    model, needs = tiny(family), Needs(final=True, layers=(0,), top=4)
    target = open_target(model)
    prompts = [prompt_of(size, seed=size) for size in (23, 1, 14)]
    expected = target.prefill(target.cache(3), prompts, needs)
    lm_head = model.get_output_embeddings()
    with torch.inference_mode():
        logits = lm_head(torch.stack([row["final"][-1] for row in expected.features]))
    # Some models scale their logits.
    assert torch.equal(logits.argmax(-1), expected.logits_BV.argmax(-1))
    monkeypatch.setattr(recurrent, "CHUNK", 7)
    done = target.prefill(target.cache(3), prompts, needs)
    torch.testing.assert_close(done.logits_BV, expected.logits_BV, atol=1e-4, rtol=1e-4)
    for row, prompt in enumerate(prompts):
        top = done.top[row]()
        assert top == expected.top[row]()
        assert len(top) == len(prompt)
        for name, feature in done.features[row].items():
            assert feature.shape == (len(prompt), 32)
            wanted = expected.features[row][name]
            torch.testing.assert_close(feature, wanted, atol=1e-4, rtol=1e-4)
        read = read_features(target, torch.tensor([prompt]), Needs(final=True))["final"][0]
        torch.testing.assert_close(read, expected.features[row]["final"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CHAINED[:1])
def test_joined_rows_continue_as_they_do_alone(tiny: Tiny, family: str) -> None:
    target, prompts = open_target(tiny(family)), [[5, 6, 7], [8, 9]]
    joined = target.cache(0)
    for prompt in prompts:
        given = target.cache(1)
        target.prefill(given, [prompt])
        joined.join(given)
    drafts = [tree.chain([10, 11], kind="deterministic"), tree.root(12)]
    found = target.verify(joined, drafts).logits_BNV
    joined.commit([draft.tokens for draft in drafts], [[0, 1], [0]])
    assert joined.tokens == [[5, 6, 7, 10, 11], [8, 9, 12]]
    for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        alone = target.cache(1)
        target.prefill(alone, [prompt])
        expected = target.verify(alone, [draft]).logits_BNV[0]
        assert torch.equal(found[row, : len(draft)], expected)


def test_an_empty_row_stays_as_it_is(tiny: Tiny) -> None:
    target = open_target(tiny("mamba2"))
    cache = target.cache(2)
    target.prefill(cache, [[5, 6], [7]])
    done = target.prefill(cache, [[], [8]], Needs(top=3))
    assert [len(top()) for top in done.top] == [0, 1] and done.features[0] == {}
    assert not done.logits_BV[0].any()
    assert cache.tokens == [[5, 6], [7, 8]]
    drafts = [tree.chain([9, 10], kind="deterministic"), tree.root(11)]
    done_pass = target.verify(cache, drafts, Needs(final=True))
    assert done_pass.logits_BNV.shape == (2, 2, 320)
    assert done_pass.features["final"].shape == (2, 2, 32)
    expected = target.prefill(target.cache(1), [[5, 6, 9]]).logits_BV
    torch.testing.assert_close(done_pass.logits_BNV[0, :1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_model_drafts_chains(
    tiny: Tiny, temperature: float, endless: Any, prompt_of: Any
) -> None:
    model = endless(tiny("mamba2"))
    prompts = [prompt_of(12), prompt_of(5)]
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 14, "batch_size": 2}
    runner = Runner(model)
    plain = [result.token_ids for result in runner.generate(prompts, **options)]
    runner.use(DraftModelDrafter(tiny("llama"), target=runner.target))
    results = runner.generate(prompts, verify="token-match", **options)
    assert [result.token_ids for result in results] == plain
    assert all(result.drafted > 0 for result in results)
    trees = DraftModelDrafter(
        tiny("llama"), DraftModelDrafter.Config(tree="rsd-s"), target=runner.target
    )
    with pytest.raises(UsageError, match="takes chains only, not tree=rsd-s") as caught:
        runner.use(trees)
    assert caught.value.hint == "draft with tree=chain"


def test_heads_read_the_final_states(tiny: Tiny, endless: Any, prompt_of: Any) -> None:
    model = endless(tiny("mamba2"))
    prompts = [prompt_of(12), prompt_of(5)]
    runner = Runner(model)
    plain = runner.generate(prompts, max_new_tokens=12)
    heads = MedusaHeads(MedusaHeads.Config(num_heads=2), model, None)
    runner.use(MedusaDrafter(heads, [((0,), 0.5), ((1,), 0.3), ((0, 0), 0.2), ((0, 1), 0.1)]))
    results = runner.generate(prompts, max_new_tokens=12, batch_size=2)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    # Two of the four nodes are the path that can be fed.
    assert results[0].offered_at[0] < results[0].drafted <= 2 * results[0].forwards


def test_what_stays_refused(tiny: Tiny) -> None:
    model = tiny("mamba2")
    for spec in ("skip", "ngram+skip"):
        with pytest.raises(UnsupportedError, match="skip cannot draft for mamba2"):
            Runner(model, draft=spec)
    message = "mamba2 can neither be a draft model nor have heads trained for it: .* cannot go back"
    with pytest.raises(UnsupportedError, match=message):
        DraftModelDrafter(model, target=AttentionTarget(tiny("llama")))
    target = open_target(model)
    with pytest.raises(UnsupportedError, match=r"mamba2.* takes chains only"):
        target.verify(target.cache(1), [trie(3, [[4], [5]], nodes=4)])
    with pytest.raises(UnsupportedError, match="no passes of a drafter's own"):
        target.grow(target.cache(1), [[3]], [[0]])
    rwkv = transformers.RwkvConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match=r"rwkv cannot be decoded .* state is not known"):
        open_target(transformers.AutoModelForCausalLM.from_config(rwkv))
    other = make_model("mamba2")
    other.__class__ = type("Own", (type(other),), {"__module__": "elsewhere"})
    with pytest.raises(UnsupportedError, match="transformers' own code alone"):
        open_target(other)
    assert type(open_target(tiny("llama"))) is AttentionTarget
