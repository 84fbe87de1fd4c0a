"""Exits of a draft model: what it answers, which layers run, and what their caches hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.request import Request
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.exits import Exit, ExitTarget, parse_exits
from spectool.errors import CheckpointError, UnsupportedError, UsageError

from ..conftest import first_layers, request_of, with_exits

Tiny = Callable[..., PreTrainedModel]
LAYERS = [1, 3, 4]
FAMILIES = [
    "gemma3",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "qwen3", "gpt2")),
]


def drafter_of(tiny: Tiny, family: str, thresholds: Sequence[float]) -> tuple[Any, ExitTarget]:
    model = with_exits(tiny(f"{family}-deep", 1), LAYERS, thresholds)
    config = DraftModelDrafter.Config(exits="auto")
    drafter = DraftModelDrafter(model, config, target=AttentionTarget(tiny(family)))
    draft: Any = drafter.draft_model
    return drafter, draft


def go_on(drafter: Any, requests: Sequence[Request], accepted: Sequence[int]) -> list[Any]:
    """Draft once; commit so many tokens of each draft and another one."""
    drafts: list[Any] = drafter.propose(requests, [9] * len(requests))
    outcomes = []
    for request, draft, count in zip(requests, drafts, accepted, strict=True):
        request.tokens += [*draft.tokens[1 : count + 1], 11 + count]
        path = list(range(count + 1))
        outcomes.append(type("Outcome", (), {"request": request, "path": path})())
    drafter.observe(outcomes)
    return drafts


def slow_logits(
    exits: Sequence[tuple[PreTrainedModel, float]], tokens: Sequence[int]
) -> tuple[int, Tensor]:
    """Return the exit after a text, and its logits, from whole models without caches."""
    for at, (model, threshold) in enumerate(exits):
        logits_V = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if at == len(exits) - 1 or logits_V.softmax(-1).max() > threshold:
            return at, logits_V
    raise AssertionError


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_whole_models(tiny: Tiny, family: str) -> None:
    """Requests join, drafts are accepted and rejected, and every exit is taken."""
    chosen = [0.04, 0.05, 0.0]
    drafter, draft_model = drafter_of(tiny, family, chosen)
    model = tiny(f"{family}-deep", 1)
    cuts = [first_layers(model, count) for count in LAYERS]
    exits = list(zip(cuts, chosen, strict=True))
    requests = [request_of([5, 6, 7]), request_of([9] * 7, 1, temperature=0.8)]
    taken = set()
    for step, accepted in enumerate([(0, 4), (2, 0), (4, 1), (1, 1), (3, 2)]):
        if step == 2:
            requests.append(request_of([8, 4, 3, 8], 2))
        before = [list(request.tokens) for request in requests]
        drafts = go_on(drafter, requests, [*accepted, 2][: len(requests)])
        for request, text, draft in zip(requests, before, drafts, strict=True):
            for at, token in enumerate(draft.tokens[1:]):
                exit, logits_V = slow_logits(exits, text + draft.tokens[1 : at + 1])
                taken.add(exit)
                if request.sampling.greedy:
                    assert token == int(logits_V.argmax())
                else:
                    q_V = request.sampling.probs(logits_V[None])[0]
                    torch.testing.assert_close(draft.probs_NV[at], q_V, atol=1e-5, rtol=1e-4)
    assert taken == {0, 1, 2}
    assert draft_model.row_passes[0] > draft_model.row_passes[1] > draft_model.row_passes[2] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_of_0_is_the_shallow_model_alone(tiny: Tiny, family: str) -> None:
    for thresholds, count in (([0, 0.5, 0], 1), ([1, 0, 0], 3), ([1, 1, 0], 4)):
        drafter, draft = drafter_of(tiny, family, thresholds)
        assert draft.exits == [Exit(count, 0)]
        shallow = first_layers(tiny(f"{family}-deep", 1), count)
        alone = DraftModelDrafter(shallow, target=AttentionTarget(tiny(family)))
        one, other = (
            [request_of([5, 6, 7], temperature=0.7), request_of([3, 2] * 5, 1)] for _ in range(2)
        )
        for accepted in ((0, 2), (4, 3), (1, 0)):
            drafts = go_on(drafter, one, accepted)
            expected = go_on(alone, other, accepted)
            assert [each.tokens for each in drafts] == [each.tokens for each in expected]
            torch.testing.assert_close(drafts[0].probs_NV, expected[0].probs_NV)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_and_values_are_those_of_a_whole_pass(tiny: Tiny, family: str) -> None:
    """Lazy filling is eager filling: deeper layers read their own inputs for every token.

    Where a token comes from the last exit, all layers hold all tokens.
    """
    model = tiny(f"{family}-deep", 1)
    draft = ExitTarget(model, [Exit(1, 0.99), Exit(3, 0.99), Exit(5, 0)])
    cache, text = draft.cache(2), [5, 6, 7, 8, 9, 3, 2, 4]
    # The first tokens leave early: some thresholds are low until the last token.
    for low, new in (((0.0, 0.0), text[:3]), ((0.99, 0.0), text[3:5]), ((0.0, 0.0), text[5:7])):
        draft.exits = [Exit(1, low[0]), Exit(3, low[1]), Exit(5, 0)]
        draft.prefill(cache, [new, []])
    assert [part.lengths[0] for part in cache.parts] == [7, 5, 0]
    assert [sum(map(len, states[0])) for states in cache.states] == [2, 5]
    draft.exits = [Exit(1, 0.99), Exit(3, 0.99), Exit(5, 0)]
    logits_BV = draft.grow(cache, [[text[7]], [0]], [[0], [0]])[:, 0]
    whole = AttentionTarget(model)
    eager = whole.cache(1)
    expected_BV = whole.prefill(eager, [text]).logits_BV
    torch.testing.assert_close(logits_BV[:1], expected_BV, atol=1e-4, rtol=1e-4)
    assert [part.lengths[0] for part in cache.parts] == [8, 8, 8]
    assert not any(states[0] for states in cache.states)
    for at, (first, last) in enumerate([(0, 1), (1, 3), (3, 5)]):
        for layer in range(5):
            store = cache.parts[at].stores[layer]
            if not first <= layer < last:
                assert not store.fields, "a layer that another part runs"
                continue
            pairs = zip(store.view(8), eager.stores[layer].view(8), strict=True)
            for mine, fresh in pairs:
                torch.testing.assert_close(mine[:1], fresh, atol=1e-4, rtol=1e-4)
    # The drafted token is rejected everywhere, and nothing of it is left.
    cache.commit([[text[7]], [0]], [[], []])
    assert [part.lengths for part in cache.parts] == [[7, 0]] * 3


def test_layers_behind_the_exit_do_not_run(tiny: Tiny) -> None:
    model = tiny("llama-deep", 1)
    draft = ExitTarget(model, [Exit(1, 0), Exit(3, 0)])
    ran: list[int] = []
    layers: Any = model.model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda *given, at=at: ran.append(at))
        for at, layer in enumerate(layers)
    ]
    cache = draft.cache(1)
    draft.prefill(cache, [[5, 6]])
    assert ran == [0] and draft.row_passes == [1, 0]
    draft.exits = [Exit(1, 0.99), Exit(3, 0)]
    draft.prefill(cache, [[7]])
    assert ran == [0, 0, 1, 2] and draft.row_passes == [2, 1]
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_long_text_goes_deeper_in_chunks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-deep", 1)
    draft = ExitTarget(model, [Exit(2, 0.99), Exit(5, 0)])
    monkeypatch.setattr("spectool.decode.target.attention.CHUNK", 8)
    texts = [list(range(2, 32)), [7, 3, 9]]
    found_BV = draft.prefill(draft.cache(2), texts).logits_BV
    whole = AttentionTarget(model)
    torch.testing.assert_close(found_BV, whole.prefill(whole.cache(2), texts).logits_BV)


def test_thresholds_are_parsed(tiny: Tiny) -> None:
    model = with_exits(tiny("llama-deep"), LAYERS, [0.4, 0.6, 0])
    assert parse_exits("auto", model) == [Exit(1, 0.4), Exit(3, 0.6), Exit(4, 0)]
    assert parse_exits("1/.25/0", model) == [Exit(3, 0.25), Exit(4, 0)]
    assert parse_exits(".5/0/0.3", model) == [Exit(1, 0.5), Exit(3, 0)]
    for text in ("0/0", "1/1/1", "2/0/0", "-1/0/0", "nan/nan/nan"):
        with pytest.raises(UsageError, match="expected 3 thresholds from 0 to 1, one of them 0"):
            parse_exits(text, model)
    with pytest.raises(UsageError, match=r"expected auto, or numbers as in \.5/\.5/0"):
        parse_exits("all", model)
    with pytest.raises(UsageError, match="names no exits"):
        parse_exits("auto", tiny("llama"))
    for layers in ([3, 1], [0, 2], [1, 9], [], ["x"], 4):
        model.config.exits = {"layers": layers, "thresholds": [0.5, 0]}
        with pytest.raises(CheckpointError, match="exits"):
            parse_exits("auto", model)
    with pytest.raises(UsageError, match="exits takes chains, not tree=rsd-s"):
        DraftModelDrafter.Config(exits="auto", tree="rsd-s")
    with pytest.raises(UsageError, match="a draft model without exits"):
        DraftModelDrafter.Config.from_text("exits=auto,acceptance=here")


def test_a_model_that_does_more_between_its_layers_is_refused(tiny: Tiny) -> None:
    model: Any = with_exits(tiny("llama-deep"), LAYERS, [0.5, 0.5, 0])
    model.model.layers[0].register_forward_hook(lambda layer, inputs, output: 1.5 * output)
    with pytest.raises(UnsupportedError, match="its layers cannot run in several passes"):
        ExitTarget(model, [Exit(1, 0.5), Exit(4, 0)])
