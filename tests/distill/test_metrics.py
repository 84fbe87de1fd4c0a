"""Metrics of a training, and how a resumed run treats the lines that exist."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spectool.distill.metrics import MetricsFile
from spectool.errors import InputError, UsageError
from spectool.report import TrainingStep

RUN = {"run": "one"}


def step(number: int, **metrics: float) -> TrainingStep:
    """A step of one token in a second, without an evaluation."""
    timed = {"tokens": 1, "seconds": 1.0, **metrics}
    return TrainingStep(name="heads", step=number, steps=6, metrics=timed, evaluation=None)


TIMED = {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step_after_one_that_names_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, RUN)
    metrics.event(step(1, loss=2.0, gradient_norm=math.inf))
    metrics.event(step(2, loss=1.0))
    assert lines_of(path) == [
        RUN, {"step": 1, **TIMED, "loss": 2.0, "gradient_norm": None},
        {"step": 2, **TIMED, "loss": 1.0},
    ]  # fmt: skip


def test_steps_that_are_taken_again_have_one_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, RUN)
    for number in range(1, 6):
        metrics.event(step(number, loss=1))
    with path.open("a") as file:
        file.write('{"step": 6, "tr')
    again = MetricsFile(path, RUN)
    again.event(step(4, loss=2))
    assert [(line["step"], line["loss"]) for line in lines_of(path)[1:]] == [
        (1, 1), (2, 1), (3, 1), (4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("content", ['{"run": "two"}\n', "notes\n", "\n"])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="is not the metrics of this run"):
        MetricsFile(path, RUN)
    assert path.read_text() == content


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        MetricsFile(tmp_path, RUN)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", RUN)
    with pytest.raises(InputError, match="cannot be written"):
        MetricsFile(tmp_path / "absent" / "metrics.jsonl", RUN)
