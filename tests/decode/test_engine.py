"""The engine's text is plain greedy text, whatever is drafted, and ends where it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.drafters.ngram import NgramDrafter
from spectool.decode.generate import Runner, generate
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget

from ..conftest import ATTENDING

Tiny = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("family", ATTENDING)
def test_greedy_equals_transformers_for_every_drafter(
    tiny: Tiny,
    family: str,
    endless: Any,
    reference: Callable[..., list[int]],
    adversaries: Callable[..., dict[str, Any]],
    prompt_of: Callable[..., list[int]],
) -> None:
    """Also past the window of 16 and across a doubling of the cache at 64 columns."""
    model, prompt = endless(tiny(family)), prompt_of(44)
    expected = reference(model, prompt, 30)
    drafters = adversaries(prompt + expected, 320)
    runner = Runner(model)
    plain = runner.generate([prompt], max_new_tokens=30)[0]
    assert plain.token_ids == expected
    assert plain.forwards == 30
    for name, drafter in {**drafters, "ngram": NgramDrafter(NgramDrafter.Config(min_n=1))}.items():
        runner.use(drafter)
        result = runner.generate([prompt], max_new_tokens=30)[0]
        assert result.token_ids == expected, name
        assert result.finish_reason == "length"
        assert result.lossless
        if name == "oracle":
            # 6 tokens a step after the prompt's one; the last step is cut.
            assert result.forwards == 1 + 5
            assert result.accepted == result.drafted == 29 - 5
        if name == "wrong":
            assert result.forwards == 30
            assert result.accepted == 0


def test_a_model_that_drafts_for_itself_is_always_right(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    model, prompt = endless(tiny("llama")), prompt_of(18)
    expected = generate(model, [prompt], max_new_tokens=60)[0].token_ids
    config, target = DraftModelDrafter.Config(depth=3), AttentionTarget(model)
    drafter = DraftModelDrafter(model, config, target=target)
    result = generate(model, [prompt], draft=drafter, max_new_tokens=60)[0]
    assert result.token_ids == expected
    assert result.accepted == result.drafted
    assert result.forwards == 1 + 15


def test_sampled_ngram_text_is_that_of_plain_sampling(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    model, prompts = endless(tiny("llama")), [prompt_of(12, vocab=8), prompt_of(9, vocab=8)]
    options: dict[str, Any] = {"temperature": 0.3, "max_new_tokens": 40, "seed": 3}
    plain = generate(model, prompts, **options)
    drafted = generate(model, prompts, draft="ngram:min_n=1", **options)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert sum(r.drafted for r in drafted) > 0
    other = generate(model, prompts, **{**options, "seed": 4})
    assert [r.token_ids for r in other] != [r.token_ids for r in plain]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_requests_of_one_batch_finish_apart(
    tiny: Tiny, endless: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, scripted: Any
) -> None:
    """An end-of-text token inside an accepted path ends its request; the token after is dropped."""
    model, prompts = endless(tiny("llama")), [[5, 6, 7], [9, 8]]
    plain = [r.token_ids for r in generate(model, prompts, max_new_tokens=30)]
    eos = plain[0][4]
    assert eos not in plain[0][:4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, 319])

    def oracle(tokens: list[int], limit: int) -> list[list[int]]:
        index = 0 if tokens[:3] == prompts[0] else 1
        return [(prompts[index] + plain[index])[len(tokens) : len(tokens) + 7]]

    drafter = scripted(oracle, Needs(probs=True, top=3, final=True))
    received: dict[int, list[int]] = {0: [], 1: []}
    results = generate(
        model,
        prompts,
        draft=drafter,
        max_new_tokens=30,
        batch_size=batch_size,
        on_tokens=lambda index, tokens, text, drafted: received[index].extend(tokens),
    )
    assert results[0].token_ids == plain[0][:5]
    assert results[0].finish_reason == "eos"
    assert results[0].forwards == 2
    assert results[0].accepted == 4
    stop = plain[1].index(eos) + 1 if eos in plain[1] else 30
    assert results[1].token_ids == plain[1][:stop]
    assert [received[0], received[1]] == [r.token_ids for r in results]
    ended = next(o for o in drafter.outcomes if o.request.index == 0)
    assert ended.next_token == eos
    assert ended.path == [0, 1, 2, 3]
    assert ended.probs_NV is not None
    assert ended.probs_NV.shape[0] == ended.features["final"].shape[0] == len(ended.draft)
    for outcome in drafter.outcomes:
        assert outcome.probs_NV is not None
        assert outcome.top == outcome.probs_NV.topk(3).indices.tolist()
    for prompt in drafter.prompts:
        top = prompt.top()
        assert len(top) == prompt.request.num_prompt
        assert top[-1] == prompt.logits_V.topk(3).indices.tolist()


def test_outcomes_carry_the_features_of_their_tokens(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], scripted: Any
) -> None:
    """Heads are trained on and draft from the states of all committed tokens, in order."""
    model, prompt = endless(tiny("gemma3")), prompt_of(9)
    plain = prompt + generate(model, [prompt], max_new_tokens=12)[0].token_ids
    drafter = scripted(
        lambda tokens, limit: [[3], plain[len(tokens) : len(tokens) + 3]], Needs(final=True)
    )
    generate(model, [prompt], draft=drafter, max_new_tokens=12)
    pieces = [drafter.prompts[0].features["final"]]
    pieces += [outcome.features["final"][outcome.path] for outcome in drafter.outcomes]
    with torch.inference_mode():
        model_states = model.model(torch.tensor([plain[:-1]])).last_hidden_state[0]
        torch.testing.assert_close(torch.cat(pieces), model_states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_max_new_tokens_cuts_an_accepted_path(
    tiny: Tiny, endless: Any, limit: int, scripted: Any
) -> None:
    model, prompt = endless(tiny("llama")), [5, 6, 7]
    plain = generate(model, [prompt], max_new_tokens=20)[0].token_ids
    drafter = scripted(lambda tokens, _: [(prompt + plain)[len(tokens) : len(tokens) + 4]])
    result = generate(model, [prompt], draft=drafter, max_new_tokens=limit)[0]
    assert result.token_ids == plain[:limit]
    assert result.finish_reason == "length"


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_context_ends_the_text(
    tiny: Tiny, endless: Any, family: str, adversaries: Callable[..., dict[str, Any]]
) -> None:
    """The text goes up to the model's last position (learned tables end at 256)."""
    model, prompt = endless(tiny(family)), list(range(2, 242))
    result = generate(model, [prompt], max_new_tokens=50)[0]
    assert len(result.token_ids) == 16
    assert result.finish_reason == "context"
    for drafter in adversaries(prompt + result.token_ids, 320).values():
        drafted = generate(model, [prompt], draft=drafter, max_new_tokens=50)[0]
        assert drafted.token_ids == result.token_ids
        assert drafted.finish_reason == "context"


def test_a_prompt_that_fills_the_context_gets_nothing(tiny: Tiny) -> None:
    results = generate(tiny("llama"), [[3] * 8, [3, 4]], context=8, batch_size=2)
    assert results[0].finish_reason == "context"
    assert results[0].token_ids == []
    assert results[0].forwards == 0
    assert len(results[1].token_ids) <= 6


def test_empty_drafts_and_prompts_of_one_token(tiny: Tiny, endless: Any, scripted: Any) -> None:
    model = endless(tiny("llama"))
    plain = generate(model, [[7]], max_new_tokens=10)[0]
    empty = generate(model, [[7]], draft=scripted(lambda tokens, limit: []), max_new_tokens=10)[0]
    assert empty == plain
    assert plain.tokens_per_forward == 1.0
    assert plain.offered_at == []


def test_counts_by_depth(tiny: Tiny, endless: Any, scripted: Any) -> None:
    model, prompt = endless(tiny("llama")), [5, 6, 7]
    plain = prompt + generate(model, [prompt], max_new_tokens=20)[0].token_ids

    def half_right(tokens: list[int], limit: int) -> list[list[int]]:
        true = plain[len(tokens) : len(tokens) + 3]
        return [[*true[:2], *((token + 1) % 320 for token in true[2:])]]

    result = generate(model, [prompt], draft=scripted(half_right), max_new_tokens=13)[0]
    assert result.forwards == 1 + 4
    assert result.offered_at == [4, 4, 3]  # the last step has room for two
    assert result.accepted_at == [4, 4, 0]
    assert (result.drafted, result.accepted) == (11, 8)


@pytest.mark.parametrize("where", ["callback", "drafter"])
def test_interrupts_leave_what_is_there(
    tiny: Tiny, endless: Any, where: str, scripted: Any
) -> None:
    """Only with keep_interrupted: otherwise an interrupted run raises."""
    model, prompts = endless(tiny("llama")), [[5, 6, 7], [9, 8], [4]]
    plain = [r.token_ids for r in generate(model, prompts, max_new_tokens=12)]
    received: list[int] = []

    def interrupt(at: int) -> None:
        if len(received) >= at:
            raise KeyboardInterrupt

    def on_tokens(index: int, tokens: Sequence[int], text: str, drafted: int) -> None:
        received.extend(tokens)
        if where == "callback":
            interrupt(15)

    def script(tokens: list[int], limit: int) -> list[list[int]]:
        if where == "drafter":
            interrupt(15)
        return []

    runner = Runner(model, draft=scripted(script))
    options: dict[str, Any] = {"max_new_tokens": 12, "on_tokens": on_tokens}
    results = runner.generate(prompts, keep_interrupted=True, **options)
    reasons = [r.finish_reason for r in results]
    assert reasons == ["length", "interrupted", "interrupted"]
    assert [r.token_ids for r in results] == [plain[0], plain[1][:3], []]
    received.clear()
    with pytest.raises(KeyboardInterrupt):
        runner.generate(prompts, **options)
    received.clear()
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts, draft=scripted(script), **options)


def test_the_cache_holds_all_but_the_last_token(tiny: Tiny, endless: Any, scripted: Any) -> None:
    model, prompt = endless(tiny("llama")), [5, 6, 7]
    plain = prompt + generate(model, [prompt], max_new_tokens=20)[0].token_ids
    drafter = scripted(lambda tokens, _: [plain[len(tokens) : len(tokens) + 4]])
    runner = Runner(model, draft=drafter)
    result = runner.generate([prompt], max_new_tokens=9)[0]
    assert runner.engine().cache.tokens == [prompt + result.token_ids[:-1]]
