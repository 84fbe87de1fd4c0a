"""Recorded trajectories are those of Jacobi iteration without a cache, and are stored compactly."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.generate import Runner
from spectool.distill.data.samples import Sample
from spectool.distill.data.trajectories import (
    Trajectory,
    TrajectoryDrafter,
    _repetition_start,
    as_tensors,
    as_trajectories,
    collect,
    list_prompts,
)

Tiny = Callable[..., PreTrainedModel]
PROMPTS = [[5, 9, 17, 33, 65], [40, 41, 42, 43], [100, 7, 200, 9, 12, 250]]


def iterate(model: Any, text: list[int], point: list[int]) -> list[int]:
    """Return the next Jacobi iterate of a block after a text, by one pass over everything."""
    ids = torch.tensor([text + point])
    with torch.no_grad():
        best = model(ids, use_cache=False).logits[0].argmax(-1).tolist()
    predicted: list[int] = best[len(text) - 1 : -1]
    return predicted


def collect_from(model: PreTrainedModel, **asked: Any) -> list[Trajectory]:
    prompts = list_prompts(
        [Sample([*p, *range(60, 90)], [False] * len(p) + [True] * 30) for p in PROMPTS], longest=50
    )
    options = {"block": 6, "new_tokens": 24, "context": 64, "seed": "0", **asked}
    return collect(Runner(model), prompts, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_points_are_those_of_iteration_without_a_cache(
    tiny: Tiny, endless: Any, family: str
) -> None:
    model = endless(tiny(family))
    collected = collect_from(model)
    assert len(collected) >= 2
    moved = 0
    for each in collected:
        text = list(each.prompt)
        for points in each.blocks:
            for point, after in itertools.pairwise(points):
                assert iterate(model, text, point) == after
                moved += point != after
            # The last point is its own image: the model's greedy continuation.
            assert iterate(model, text, points[-1]) == points[-1]
            assert len(points) <= len(points[0]) + 1
            text += points[-1]
    assert moved > 20


def test_a_block_begins_with_tokens_of_the_prompt(tiny: Tiny, endless: Any) -> None:
    first, again, other = (
        collect_from(endless(tiny("llama")), seed=seed) for seed in ("0", "0", "1")
    )
    assert first == again != other
    for each in first:
        for number, points in enumerate(each.blocks):
            # What is known already, as the first token after the prompt, stands in front.
            drawn = [
                token for token, own in zip(points[0], points[-1], strict=True) if token != own
            ]
            assert set(drawn) <= set(each.prompt), number


def test_a_text_ends_where_it_repeats_itself() -> None:
    assert _repetition_start([1, 2, 2, 2]) == 4
    assert _repetition_start([1, *[2] * 9, 3]) == 11
    assert _repetition_start([1, 1, *[2] * 10, 3]) == 2
    assert _repetition_start([*range(16), 50, *range(16), 51]) == 17


def test_a_block_that_is_cut_keeps_no_point_twice() -> None:
    drafter = TrajectoryDrafter(4, "0")
    drafter.points[0] = [[[1, 2, 3, 4], [1, 2, 5, 6]], [[7, 7, 8, 9], [7, 0, 8, 9], [7, 0, 8, 3]]]
    assert drafter.take(0, [1, 2, 5, 6, 7, 0]) == [
        [[1, 2, 3, 4], [1, 2, 5, 6]],
        [[7, 7], [7, 0]],
    ]


def test_a_request_that_repeats_itself_ends(tiny: Tiny, endless: Any) -> None:
    """A model with one answer to everything: nothing is left, after a few passes."""
    model = copy.deepcopy(tiny("llama"))
    endless(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert collect_from(model, new_tokens=40) == []
    assert len(passes) < 20


def test_prompts_end_before_each_answer_and_are_listed_once() -> None:
    turns = Sample([1, 2, 3, 4, 5, 6, 7, 8], [False, False, True, True, False, True, True, True])
    prompts = list_prompts([turns, turns], longest=9)
    assert [(p.tokens, p.reference) for p in prompts] == [
        ([1, 2], [3, 4]),
        ([1, 2, 3, 4, 5], [6, 7, 8]),
    ]
    assert [p.tokens for p in list_prompts([turns], longest=4)] == [[1, 2]]
    plain = Sample(list(range(8)), [True] * 8, given=2)
    assert [(p.tokens, len(p.reference)) for p in list_prompts([plain], longest=9)] == [([0, 1], 6)]


@pytest.mark.parametrize(("scale", "dtype"), [(1, torch.int16), (1000, torch.int32)])
def test_tensors_give_the_trajectories_back(scale: int, dtype: torch.dtype) -> None:
    given = [
        Trajectory([scale * 70, 2], [[[1, 2], [3, 4]], [[5]]], [9]),
        Trajectory([8], [[[6, scale * 7], [1, 1], [0, 0]]]),
    ]
    tensors = as_tensors(given)
    assert tensors["prompts"].dtype == dtype and tensors["num_points"].dtype == torch.int16
    assert as_trajectories(tensors) == given
    assert as_trajectories(as_tensors([])) == []
