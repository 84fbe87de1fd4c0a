"""The next window holds what the last pass predicted, with the q it was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode import verify
from spectool.decode.drafters.jacobi import JacobiDrafter
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Outcome
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.tree import Draft
from spectool.errors import UsageError

from ..conftest import request_of

Tiny = Callable[..., PreTrainedModel]
Begin = Callable[..., None]
# Gives the token that a made-up model finds likeliest after a text.
Next = Callable[[list[int]], int]


def step(drafter: JacobiDrafter, request: Request, following: Next, budget: int = 99) -> list[int]:
    """Run one greedy step with a made-up model; return the committed tokens."""
    draft = drafter.propose([request], [budget])[0]
    assert draft.is_chain
    texts = [request.tokens + draft.tokens[1 : node + 1] for node in range(len(draft))]
    emit = [following(text) for text in texts]
    path, token = verify.walk(draft, emit, None)
    probs_NV = torch.eye(320)[emit]
    new = [*(draft.tokens[node] for node in path[1:]), token]
    request.tokens += new
    drafter.observe(
        [Outcome(request=request, draft=draft, path=path, next_token=token, probs_NV=probs_NV)]
    )
    return new


@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("period", [1, 3])
def test_a_text_that_repeats_itself_is_accepted_at_once(
    begin: Begin, window: int, period: int
) -> None:
    request = request_of([at % period + 9 for at in range(9)])
    drafter = JacobiDrafter(JacobiDrafter.Config(window=window))
    begin(drafter, [request])
    for _ in range(3):
        new = step(drafter, request, lambda text: (text[-1] - 9 + 1) % period + 9)
        assert len(new) == window + 1


def test_a_fixed_point_is_accepted_at_once(begin: Begin) -> None:
    """One pass predicts the whole next window if tokens depend on their position alone."""
    request = request_of([300, 301, 302])
    drafter = JacobiDrafter(JacobiDrafter.Config(window=6))
    begin(drafter, [request])

    def following(text: list[int]) -> int:
        return 37 * len(text) % 289

    assert len(step(drafter, request, following)) == 1
    # The first new token of that pass is the root, the next five are the window.
    drafted = drafter.propose([request], [99])[0].tokens[:6]
    assert drafted == [37 * at % 289 for at in range(3, 9)]
    assert len(step(drafter, request, following)) >= 6


def test_each_round_fixes_a_token_at_least(begin: Begin) -> None:
    """Correct tokens advance and never go back if each token depends on the one before."""
    request = request_of([1])
    drafter = JacobiDrafter(JacobiDrafter.Config(window=8))
    begin(drafter, [request])
    brought = [
        len(step(drafter, request, lambda text: (5 * text[-1] + 3) % 320)) for _ in range(20)
    ]
    expected = [1]
    while len(expected) < len(request.tokens):
        expected.append((5 * expected[-1] + 3) % 320)
    assert request.tokens == expected
    assert min(brought) == 1


class Recorded(JacobiDrafter):
    """Drafter that records each request's drafts and outcomes."""

    def __init__(self, config: JacobiDrafter.Config) -> None:
        super().__init__(config)
        self.rounds: list[tuple[list[int], Draft, Outcome]] = []

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            before = outcome.request.tokens[: -len(outcome.path)]
            self.rounds.append((before, outcome.draft, outcome))
        super().observe(outcomes)


@torch.inference_mode()
def probs_of(
    model: PreTrainedModel, before: list[int], draft: Draft, control: SamplingParams
) -> Tensor:
    """Return the probabilities [N, V] after every node of a chain, by the model alone."""
    text = torch.tensor([before + draft.tokens[1:]])
    logits = model(text, use_cache=False).logits[:, len(before) - 1 :]
    return control.probs(logits)[0]


def test_a_greedy_window_is_the_likeliest_tokens_of_the_last_pass(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    model, drafter = endless(tiny("llama")), Recorded(JacobiDrafter.Config(window=6))
    result = Runner(model, draft=drafter).generate([prompt_of(12)], max_new_tokens=50)[0]
    assert 0 < result.accepted < result.drafted
    for (before, draft, outcome), (_, after, _) in zip(
        drafter.rounds, drafter.rounds[1:], strict=False
    ):
        best = probs_of(model, before, draft, SamplingParams()).argmax(-1).tolist()
        window = best[len(outcome.path) :][: len(after) - 1]
        assert after.tokens[1 : 1 + len(window)] == window
        assert after.probs_NV is None
        assert set(after.kinds) == {"deterministic"}


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}])
def test_a_drawn_window_comes_with_the_probabilities_of_the_last_pass(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], options: dict[str, Any]
) -> None:
    model, drafter = endless(tiny("llama")), Recorded(JacobiDrafter.Config(window=6))
    runner = Runner(model, draft=drafter)
    result = runner.generate([prompt_of(12)], max_new_tokens=50, **options)[0]
    assert 0 < result.accepted < result.drafted
    drawn = 0
    for (before, draft, outcome), (_, after, _) in zip(
        drafter.rounds, drafter.rounds[1:], strict=False
    ):
        assert outcome.probs_NV is not None
        given_NV = outcome.probs_NV[len(outcome.path) :][: len(after) - 1]
        size = len(given_NV)
        if size == 0:
            assert after.probs_NV is None
            continue
        assert after.probs_NV is not None
        # Exactly the q that the tokens were drawn from, not a recomputed one.
        assert torch.equal(after.probs_NV, given_NV)
        expected_NV = probs_of(model, before, draft, SamplingParams(**options))[
            len(outcome.path) :
        ][:size]
        torch.testing.assert_close(after.probs_NV, expected_NV, atol=1e-4, rtol=1e-3)
        assert all(after.probs_NV[at, after.tokens[1 + at]] > 0 for at in range(size))
        assert after.kinds[1:] == ["iid"] * size + ["deterministic"] * (len(after) - 1 - size)
        drawn += size
    assert drawn > 20


def test_a_position_is_drawn_anew_in_every_round(
    begin: Begin,
) -> None:
    """Random numbers differ by position, so two windows of a uniform distribution differ."""
    drafter, request = JacobiDrafter(JacobiDrafter.Config(window=8)), request_of([5, 6])
    request.sampling = SamplingParams(temperature=1.0)
    request.draws = Draws(3, 0)
    begin(drafter, [request])
    windows = []
    for _ in range(2):
        draft = Draft([request.tokens[-1], *range(8)], list(range(-1, 8)), ["deterministic"] * 9)
        drafter._windows[request].path = draft.tokens
        request.tokens.append(7)
        probs_NV = torch.full((9, 320), 1 / 320)
        drafter.observe(
            [Outcome(request=request, draft=draft, path=[0], next_token=7, probs_NV=probs_NV)]
        )
        windows.append(drafter._windows[request].tokens)
    assert len(set(windows[0])) > 4
    assert windows[0] != windows[1]


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("budget", [0, 1, 3, 30])
def test_a_window_is_no_longer_than_its_budget(begin: Begin, window: int, budget: int) -> None:
    drafter, request = (
        JacobiDrafter(JacobiDrafter.Config(window=window)),
        request_of([4, 5, 6, 4, 5]),
    )
    begin(drafter, [request])
    for _ in range(3):
        # The first window has full size; the next budget allows only a part of it.
        step(drafter, request, lambda text: 37 * len(text) % 289)
        assert len(drafter.propose([request], [budget])[0]) == 1 + min(window, budget)


def test_requests_have_their_own_window(begin: Begin) -> None:
    drafter, requests = (
        JacobiDrafter(JacobiDrafter.Config(window=2)),
        [request_of([1, 2], 4), request_of([3, 4], 7)],
    )
    begin(drafter, requests)
    drafts = drafter.propose(requests, [2, 2])
    outcomes = []
    for request, draft, token in zip(requests, drafts, (100, 200), strict=True):
        probs_NV = torch.eye(320)[token : token + 3]
        request.tokens.append(token)
        outcomes.append(
            Outcome(request=request, draft=draft, path=[0], next_token=token, probs_NV=probs_NV)
        )
    drafter.observe(outcomes)
    assert drafter.propose(requests[1:], [2])[0].tokens == [200, 201, 202]
    begin(drafter, requests)
    assert drafter.propose(requests[:1], [2])[0].tokens[1:] != [101, 102]


def test_the_window_is_found_in_a_tree_shared_with_others(begin: Begin) -> None:
    """Predictions are read at the window's own nodes, also where the text took another path."""
    drafter, request = JacobiDrafter(JacobiDrafter.Config(window=3)), request_of([5, 6])
    begin(drafter, [request])
    window = drafter.propose([request], [99])[0].tokens[1:]
    # Nodes 1 to 4 are another drafter's; 2 and 5, 6 are the window's.
    tokens, parents = [6, 70, window[0], 71, 72, window[1], window[2]], [-1, 0, 0, 1, 3, 2, 5]
    draft = Draft(tokens, parents, ["deterministic"] * 7)
    probs_NV = torch.eye(320)[100:107]
    request.tokens += [70, 71]
    drafter.observe(
        [Outcome(request=request, draft=draft, path=[0, 1], next_token=71, probs_NV=probs_NV)]
    )
    # Positions after the new root: predicted after the window's second and third tokens.
    assert drafter.propose([request], [99])[0].tokens[:3] == [71, 105, 106]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
def test_joined_with_others_the_text_is_that_of_plain_decoding(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], options: dict[str, Any]
) -> None:
    model, prompts = endless(tiny("llama")), [prompt_of(12), prompt_of(5)]
    plain = Runner(model).generate(prompts, max_new_tokens=40, **options)
    joined = Runner(model, draft="jacobi:window=4+recycle:nodes=20").generate(
        prompts, max_new_tokens=40, batch_size=2, **options
    )
    assert [r.token_ids for r in joined] == [r.token_ids for r in plain]
    assert sum(r.forwards for r in joined) < sum(r.forwards for r in plain)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
def test_a_cap_ends_iterations_and_one_of_the_window_changes_nothing(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], options: dict[str, Any]
) -> None:
    runner, prompts = Runner(endless(tiny("llama"))), [prompt_of(12), prompt_of(5)]

    def decode(draft: str, **more: Any) -> list[Any]:
        runner.use(draft)
        return runner.generate(prompts, max_new_tokens=40, batch_size=2, **options, **more)

    exact = decode("jacobi:window=6")
    capped = decode("jacobi:window=6,cap=6", lossy=True)
    assert [r.token_ids for r in capped] == [r.token_ids for r in exact]
    assert all(r.lossless for r in exact) and not any(r.lossless for r in capped)
    # Two passes settle a window: six tokens and the verifier's own, every second pass.
    early = decode("jacobi:window=6,cap=1", lossy=True)
    assert [r.token_ids for r in early] != [r.token_ids for r in exact]
    assert all(r.forwards <= 2 + 2 * 40 / 7 for r in early)
    with pytest.raises(UsageError, match="accepts some of its tokens untested"):
        decode("jacobi:cap=3")
    with pytest.raises(UsageError, match="a cap accepts tokens that bans"):
        decode("jacobi:cap=3", lossy=True, repetition_penalty=1.2)
    with pytest.raises(UsageError, match="jacobi does not share a tree"):
        runner.use("jacobi:cap=3+recycle")
