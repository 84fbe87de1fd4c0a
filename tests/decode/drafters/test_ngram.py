from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from spectool.decode.drafters.ngram import NgramDrafter, NgramIndex
from spectool.decode.protocol import PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import UsageError

from ..conftest import request_of

NONE: Any = None


def draft_of(tokens: list[int], *, budget: int = 99, **options: int) -> Draft:
    drafter, request = NgramDrafter(NgramDrafter.Config(**options)), request_of(tokens)
    drafter.add([PrefilledPrompt(request=request, logits_V=torch.zeros(1))], NONE)
    return drafter.propose([request], [budget])[0]


def test_longest_match_first_then_most_recent() -> None:
    #         3-gram 1 2 3 -> 4      2-gram 2 3 -> 5       2-gram 2 3 -> 6
    tokens = [1, 2, 3, 4, 9, 8, 2, 3, 5, 9, 7, 2, 3, 6, 9, 1, 2, 3]
    draft = draft_of(tokens, nodes=9, depth=1, min_n=2, max_n=3)
    assert draft.tokens == [3, 4, 6, 5]
    assert draft.parents == [-1, 0, 0, 0]


def test_distinct_continuations_share_a_tree_of_at_most_nodes() -> None:
    tokens = [1, 2, 7, 5, 0, 1, 2, 7, 6, 0, 1, 2]
    draft = draft_of(tokens, nodes=3, depth=2, min_n=2, max_n=2)
    assert draft.tokens == [2, 7, 6, 5]
    assert draft.parents == [-1, 0, 1, 1]
    assert len(draft_of(tokens, nodes=2, depth=2, min_n=2, max_n=2)) == 3


def test_a_repeating_text_goes_on_with_its_period() -> None:
    draft = draft_of([4, 5, 6, 4, 5, 6, 4, 5], nodes=7, depth=7)
    assert draft.tokens == [5, 6, 4, 5, 6, 4, 5, 6]
    assert draft.is_chain


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3, 4], [1, 1]])
def test_nothing_found_is_an_empty_draft(tokens: list[int]) -> None:
    assert draft_of(tokens, min_n=2).tokens == tokens[-1:]


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_no_deeper_than_the_budget(budget: int) -> None:
    draft = draft_of([4, 5, 6, 7, 4, 5], budget=budget)
    assert max(draft.depths) == min(budget, 8)


def slow_search(tokens: list[int], lengths: range) -> list[tuple[int, int]]:
    return [
        (n, end)
        for n in lengths
        for end in range(len(tokens) - 1, n - 1, -1)
        if n < len(tokens) and tokens[end - n : end] == tokens[-n:]
    ]


def test_the_index_grows_to_what_a_search_finds() -> None:
    rng = random.Random(0)
    for _ in range(30):
        tokens = [rng.randrange(3)]
        index = NgramIndex(1, 3)
        for _ in range(12):
            index.extend(tokens)
            expected = slow_search(tokens, range(3, 0, -1))
            assert list(index.matches(tokens)) == expected
            near = rng.randrange(len(tokens))
            ahead = [
                min([e for n, e in expected if n == m and e >= near], default=None)
                for m in (3, 2, 1)
            ]
            found = list(index.matches(tokens, near))
            assert sorted(found) == sorted(expected)
            for m, first in zip((3, 2, 1), ahead, strict=True):
                if first is not None:
                    assert next(e for n, e in found if n == m) == first
            tokens += [rng.randrange(3) for _ in range(rng.randint(1, 2))]


def test_requests_have_their_own_index() -> None:
    drafter, requests = (
        NgramDrafter(),
        [request_of([1, 2, 3, 1, 2], 4), request_of([1, 2, 9, 1, 2], 7)],
    )
    drafter.add(
        [PrefilledPrompt(request=request, logits_V=torch.zeros(1)) for request in requests], NONE
    )
    assert [d.tokens[1] for d in drafter.propose(requests, [1, 1])] == [3, 9]
    assert drafter.propose(requests[1:], [1])[0].tokens == [2, 9]


def outcome_of(request: Request, draft: Draft, new: list[int]) -> Any:
    """Commit the part of `new` that the draft has as a path, and one token more."""
    path = [0]
    for token in new:
        children = [n for n in range(len(draft)) if draft.parents[n] == path[-1]]
        stands = [n for n in children if draft.tokens[n] == token]
        if not stands:
            break
        path += stands
    request.tokens += [draft.tokens[n] for n in path[1:]] + new[len(path) - 1 : len(path)]
    return type("Outcome", (), {"request": request, "draft": draft, "path": path})()


def steps(source: list[int], output: list[int], **options: int) -> list[int]:
    """Return how many tokens each step brings when `output` follows `source`."""
    drafter, request = (
        NgramDrafter(NgramDrafter.Config(**options)),
        request_of([*source, output[0]]),
    )
    drafter.add([PrefilledPrompt(request=request, logits_V=torch.zeros(1))], NONE)
    brought, left = [], output[1:]
    while left:
        draft = drafter.propose([request], [len(left) - 1])[0]
        before = len(request.tokens)
        outcome = outcome_of(request, draft, left)
        drafter.observe([outcome])
        brought.append(len(request.tokens) - before)
        left = left[brought[-1] :]
    return brought


def test_a_copy_is_drafted_twice_as_far_while_all_of_it_stands() -> None:
    source = list(range(100, 180))
    assert steps(source, source[5:65]) == [9, 17, 33]
    assert steps(source, source[5:25], nodes=8, depth=4) == [5, 9, 5]


def test_a_copy_is_resumed_after_an_edit() -> None:
    source = list(range(100, 140))
    output = [*source[:12], 7, *source[13:20], 8, *source[21:30]]
    brought = steps(source, output)
    # Steps end before the first edit, after it, before the second, and at the end.
    assert brought == [9, 3, 8, 9]
    assert sum(brought) == len(output) - 1


def test_options_are_checked() -> None:
    assert NgramDrafter.Config.from_text("nodes=12,depth=3").nodes == 12
    with pytest.raises(UsageError, match="at most max_n"):
        NgramDrafter.Config(min_n=5, max_n=2)
    with pytest.raises(UsageError, match="at least 1"):
        NgramDrafter.Config(nodes=0)
