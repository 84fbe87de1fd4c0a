"""An earlier result of `eval --json` as the baseline of a run: what changed, and by how much.

A baseline belongs to the same setting: the model's architecture, size and tokenizer, the text and
its windows, and the reference. Weights may differ, for they are what is compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool.errors import UsageError
from spectool.evaluate.results import read_numbers


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of this run and of the baseline. The ratio of 0 to 0 is 1."""

    metric: str
    value: float
    baseline: float

    @property
    def difference(self) -> float:
        return self.value - self.baseline

    @property
    def ratio(self) -> float:
        if self.value == self.baseline:
            return 1.0
        return self.value / self.baseline if self.baseline else math.copysign(math.inf, self.value)

    def as_json(self) -> dict[str, float]:
        """Return both values, their difference and their ratio."""
        return {
            "value": self.value,
            "baseline": self.baseline,
            "difference": self.difference,
            "ratio": self.ratio,
        }

    def line(self) -> str:
        """Return the change as a line of a run's output."""
        return (
            f"{self.metric.removesuffix('.value')}: {self.value:.5g}, baseline "
            f"{self.baseline:.5g}: {self.difference:+.3g}, {self.ratio:.4f} times"
        )


class Baseline:
    """The metrics and the setting of an earlier result.

    Raises:
        UsageError: the file is no such result, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "is not JSON"
            raise UsageError(f"--baseline {path}: {reason}") from error
        if not isinstance(found, dict) or not isinstance(found.get("setting"), dict):
            raise UsageError(f"--baseline {path}: is not what `spectool eval --json` prints")
        self.setting: dict[str, Any] = found["setting"]
        self.numbers = read_numbers(found)

    def check(self, setting: Mapping[str, Any]) -> None:
        """Raise a UsageError if the result belongs to another setting."""
        before = self.setting
        for name, value in setting.items():
            if name in before and before[name] != value:
                raise UsageError(
                    f"--baseline {self.path}: its {name} is {before[name]}, and this run's is "
                    f"{value}; they cannot be compared"
                )

    def number(self, metric: str) -> float:
        """Return a metric by its dotted name; NaN if the result does not have it."""
        return self.numbers.get(metric, math.nan)

    def changes(self, numbers: Mapping[str, float], metrics: Sequence[str]) -> list[Change]:
        """List the metrics that both runs measured, without the ends of intervals.

        `numbers`: those of this run, by name.
        """
        found = []
        for metric in metrics:
            value, before = numbers.get(metric, math.nan), self.number(metric)
            ends = metric.rpartition(".")[2] in ("lower", "upper")
            if not (ends or math.isnan(value) or math.isnan(before)):
                found.append(Change(metric, value, before))
        return found
