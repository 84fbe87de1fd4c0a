from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import spectool
from spectool.decode.generate import Runner
from spectool.evaluate.bench import bench, broken_promises, loop_start


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([], 0),
        ([1, 2, 3], 3),
        ([1, 2, 3, 1, 2, 3], 3),
        ([1, 2, 1, 2, 1, 2], 2),
        ([7, 7, 7, 7], 1),
        ([1, 2, 3, 9, 1, 2, 4], 7),
    ],
)
def test_loop_start_finds_the_first_repeated_run(tokens: list[int], start: int) -> None:
    assert loop_start(tokens, length=3 if start != 2 and start != 1 else 2) == start


def test_drafters_are_compared_in_order_on_the_same_limits(
    checkpoint: Callable[..., Path],
) -> None:
    path = checkpoint("llama")
    runner = Runner(spectool.load(path), tokenizer=None)
    prompts = [[5, 6, 7, 5, 6], [9, 10, 11]]
    drafts = ["ngram:nodes=4", str(checkpoint("llama", seed=1)) + ":depth=2"]
    result = bench(runner, prompts, drafts, max_new_tokens=12)
    assert [row["name"] for row in result["drafters"]] == drafts
    assert result["baseline"]["tokens_per_forward"] == 1.0
    for row in result["drafters"]:
        assert row["identical"] == row["prompts"] == 2
        assert row["new_tokens"] == result["baseline"]["new_tokens"]
        assert row["lossless"]
    assert 0 < result["kept_share"] <= 1
    assert broken_promises(result) == []


def test_a_broken_promise_is_named_in_float32_only() -> None:
    row = {"name": "bad", "lossless": True, "identical": 1, "prompts": 2}
    assert broken_promises({"dtype": "float32", "drafters": [row]}) == ["bad"]
    assert broken_promises({"dtype": "bfloat16", "drafters": [row]}) == []
    assert broken_promises({"dtype": "float32", "drafters": [{**row, "lossless": False}]}) == []


def test_prompts_without_room_for_a_token_are_no_error(checkpoint: Callable[..., Path]) -> None:
    runner = Runner(spectool.load(checkpoint("llama")), context=3)
    result = bench(runner, [[5, 6, 7]], ["ngram"], max_new_tokens=4)
    assert result["baseline"]["new_tokens"] == 0 and result["kept_share"] == 1.0
    assert result["drafters"][0]["identical"] == 1
