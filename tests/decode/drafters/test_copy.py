from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from spectool.decode.drafters.copy import CopyDrafter
from spectool.decode.generate import Runner
from spectool.decode.protocol import PrefilledPrompt
from spectool.decode.request import Request

from ..conftest import request_of
from ..encoder_decoders import make

NONE: Any = None


def begin(source: list[int], **options: int) -> tuple[CopyDrafter, Request]:
    drafter, request = CopyDrafter(CopyDrafter.Config(**options)), request_of([0])
    request.source = source
    drafter.add([PrefilledPrompt(request=request, logits_V=torch.zeros(1))], NONE)
    return drafter, request


def drafted(drafter: CopyDrafter, request: Request, budget: int = 99) -> list[int]:
    (draft,) = drafter.propose([request], [budget])
    assert draft.is_chain and draft.tokens[0] == request.tokens[-1]
    return draft.tokens[1:]


def slow_rule(source: list[int], output: list[int]) -> list[int] | None:
    """Return the release's draft: after the shortest n-gram, n = 1, 2, 3, that occurs once."""
    if not output:
        return source
    for n in (1, 2, 3):
        gram = output[-n:]
        ends = [e for e in range(n, len(source) + 1) if source[e - n : e] == gram]
        if len(gram) < n or not ends:
            return None
        if len(ends) == 1:
            return source[ends[0] :]
    return None


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_those_of_the_release_where_it_has_one(seed: int) -> None:
    noise = random.Random(seed)
    source = [noise.randrange(12) for _ in range(24)]
    drafter, request = begin(source)
    found = 0
    for token in [noise.choice(source[at : at + 3]) for at in range(18)]:
        request.tokens.append(token)
        expected = slow_rule(source, request.tokens[1:])
        is_copy = request.tokens[1:] == source[: len(request.tokens) - 1]
        draft = drafted(drafter, request)
        if expected is not None and not is_copy:
            assert draft == expected
            found += 1
        if token not in source:
            assert draft == []
    assert found > 3


def test_an_output_that_begins_as_the_source_stands_there() -> None:
    drafter, request = begin([5, 5, 6, 5, 5, 7])
    request.tokens += [5]
    assert drafted(drafter, request) == [5, 6, 5, 5, 7]
    request.tokens += [5]
    assert drafted(drafter, request) == [6, 5, 5, 7]
    assert drafted(drafter, request, budget=2) == [6, 5]


def test_the_longest_match_counts_and_then_the_nearest_to_a_steady_copy() -> None:
    drafter, request = begin([1, 2, 3, 4, 9, 2, 3, 5, 2, 3, 6])
    request.tokens += [8]
    assert drafted(drafter, request) == []
    request.tokens += [9, 2, 3]
    assert drafted(drafter, request) == [5, 2, 3, 6]
    # One token of the source is replaced: of the equal places of "2 3" the last is three on.
    request.tokens += [7, 2, 3]
    assert drafted(drafter, request) == [6]
    # A copy that goes back is found by its longer match.
    request.tokens += [9, 2, 3]
    assert drafted(drafter, request) == [5, 2, 3, 6]


def test_at_the_end_of_the_source_nothing_is_left() -> None:
    drafter, request = begin([4, 5, 6], nodes=1)
    request.tokens += [5]
    assert drafted(drafter, request) == [6]
    request.tokens += [6]
    assert drafted(drafter, request) == []


def test_the_source_of_a_causal_model_is_its_prompt(tiny: Any) -> None:
    drafter, request = CopyDrafter(), request_of([3, 4, 5, 6])
    drafter.add([PrefilledPrompt(request=request, logits_V=torch.zeros(1))], NONE)
    request.tokens += [4]
    assert drafted(drafter, request) == [5, 6]


def test_a_source_that_is_the_text_takes_few_forwards() -> None:
    """The model's own text as the source of another request, whose drafts a script checks."""
    model = make("t5")
    runner = Runner(model, draft="copy")
    (plain,) = runner.generate([[7, 8, 9]], max_new_tokens=30)
    drafter = runner.drafter
    assert isinstance(drafter, CopyDrafter)
    add = drafter.add

    def add_text(prompts: Any, cache: Any) -> None:
        add(prompts, cache)
        drafter._sources[prompts[0].request].tokens[:] = plain.token_ids

    drafter.add = add_text  # type: ignore[method-assign]
    (copied,) = runner.generate([[7, 8, 9]], max_new_tokens=30)
    assert copied.token_ids == plain.token_ids
    assert (copied.forwards, copied.accepted) == (2, 28)
