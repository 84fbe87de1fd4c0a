"""Changes of a result from an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from spectool.errors import UsageError
from spectool.evaluate.baseline import Baseline, Change
from spectool.evaluate.context import Context, Need
from spectool.evaluate.gates import parse_gates
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.measures.tasks import Score, Tasks
from spectool.evaluate.results import as_json, read_numbers

SETTING = {"model_type": "llama", "text": "sha256:1", "stride": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Small(Measure):
    needs: ClassVar[tuple[Need, ...]] = ()

    ratio: Interval
    share: float
    missing: Interval | None = None

    @classmethod
    def run(cls, context: Context) -> Self:
        raise NotImplementedError

    def lines(self) -> Iterator[str]:
        yield from ()


def result(ratio: float, share: float) -> Small:
    return Small(ratio=Interval(ratio, ratio - 0.1, ratio + 0.1), share=share)


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    return write(tmp_path, {**as_json(result(1.0, 0.8)), "setting": SETTING})


def write(folder: Path, found: Any) -> Baseline:
    path = folder / "last.json"
    path.write_text(json.dumps(found))
    return Baseline(path)


def test_changes_leave_out_the_ends_of_intervals(baseline: Baseline) -> None:
    changes = baseline.changes(read_numbers(result(1.1, 0.8)), Small.metrics())
    assert [(each.metric, each.value, each.baseline) for each in changes] == [
        ("ratio.value", 1.1, 1.0),
        ("share", 0.8, 0.8),
    ]
    first, second = (each.as_json() for each in changes)
    assert first["difference"] == pytest.approx(0.1) and first["ratio"] == pytest.approx(1.1)
    assert second["difference"] == 0 and second["ratio"] == 1
    assert changes[0].line() == "ratio: 1.1, baseline 1: +0.1, 1.1000 times"


def test_scores_of_tasks_change_too(tmp_path: Path) -> None:
    before, after = (
        Tasks(tasks={"my-task": {"acc": Score(items=4, score=Interval(value, 0.1, 0.9))}})
        for value in (0.5, 0.25)
    )
    baseline = write(tmp_path, {**as_json(before), "setting": SETTING})
    metrics = ["tasks.my-task.acc.score.value", "tasks.my-task.acc.score.lower"]
    (change,) = baseline.changes(read_numbers(after), metrics)
    assert change == Change("tasks.my-task.acc.score.value", 0.25, 0.5)


@pytest.mark.parametrize(
    ("value", "before", "ratio"), [(0.0, 0.0, 1.0), (0.5, 0.0, math.inf), (0.0, 2.0, 0.0)]
)
def test_a_ratio_to_nothing_is_defined(value: float, before: float, ratio: float) -> None:
    assert Change("kl", value, before).ratio == ratio


@pytest.mark.parametrize(
    ("expression", "value", "holds"),
    [
        ("ratio/baseline<=1.11", 1.1, True),
        ("ratio / baseline <= 1.05", 1.1, False),
        ("ratio.upper/baseline<=1.1", 1.2 / 1.1, True),
        ("share-baseline>=-0.01", -0.02, False),
        ("share - baseline >= -0.03", -0.02, True),
        ("share>=0.78", 0.78, True),
    ],
)
def test_gates_name_changes(baseline: Baseline, expression: str, value: float, holds: bool) -> None:
    (gate,) = parse_gates([expression], Small.metrics(), has_baseline=True)
    checked = gate.check(read_numbers(result(1.1, 0.78)), baseline)
    assert checked.value == pytest.approx(value) and checked.holds is holds


def test_a_change_without_a_baseline_is_refused() -> None:
    with pytest.raises(UsageError, match="needs --baseline FILE"):
        parse_gates(["share/baseline<=1"], Small.metrics())


def test_a_result_of_another_setting_is_refused(baseline: Baseline) -> None:
    baseline.check(SETTING)
    # What only one of the runs needed is no difference.
    baseline.check({"model_type": "llama", "reference": "sha256:2"})
    with pytest.raises(UsageError, match="its text is sha256:1, and this run's is sha256:2"):
        baseline.check({**SETTING, "text": "sha256:2"})


def test_another_file_is_refused(tmp_path: Path) -> None:
    for found in ({"perplexity": 3}, [1], "text"):
        with pytest.raises(UsageError, match="is not what `spectool eval --json` prints"):
            write(tmp_path, found)
    (tmp_path / "last.json").write_text("perplexity: 3")
    with pytest.raises(UsageError, match="is not JSON"):
        Baseline(tmp_path / "last.json")
    with pytest.raises(UsageError, match="No such file"):
        Baseline(tmp_path / "absent.json")
