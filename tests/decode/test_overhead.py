from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from spectool.decode.overhead import Overhead, measure_overhead


def test_share() -> None:
    assert abs(Overhead(loop=1.1, bare=1.0).share - 0.1) < 1e-12


def test_it_runs(tiny: Callable[..., PreTrainedModel]) -> None:
    measured = measure_overhead(tiny("llama"), [3, 4, 5], new_tokens=4, repeats=1)
    assert measured.loop > 0
    assert measured.bare > 0
