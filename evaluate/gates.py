"""Gates: `--gate 'perplexity_ratio<=1.1'` turns a metric into an exit code.

A metric that no measure of the run has is a usage error; a metric that is NaN fails its gate.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectool.errors import UsageError
from spectool.evaluate.measures.base import Measure

COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|<|>)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Checked:
    """A gate after the run: the value of its metric, and whether it holds."""

    expression: str
    value: float
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Parsed gate: metric, comparison, bound."""

    expression: str
    metric: str
    sign: str
    bound: float

    def check(self, results: Sequence[Measure]) -> Checked:
        """Compare the metric, which one of the results has."""
        (result,) = (each for each in results if self.metric in each.metrics())
        return self.judge(float(_read(result, self.metric)))

    def judge(self, value: float) -> Checked:
        """Compare the metric's value with the bound."""
        holds = not math.isnan(value) and COMPARE[self.sign](value, self.bound)
        return Checked(self.expression, value, bool(holds))


def _read(result: object, metric: str) -> Any:
    """Return a metric by its dotted name; NaN where the run could not measure it."""
    for name in metric.split("."):
        result = getattr(result, name)
        if result is None:
            return math.nan
    return result


def parse_gates(expressions: Sequence[str], known: Sequence[str]) -> list[Gate]:
    """Parse gates written as `METRIC<=NUMBER`; `x` is short for a metric `x.value`.

    Raises:
        UsageError: a gate has another form, or its metric is not in `known`.
    """
    gates = []
    for expression in expressions:
        match = GATE.fullmatch(expression)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or math.isnan(bound):
            raise UsageError(f"--gate {expression!r}: expected KEY<=NUMBER (or >=, <, >, ==)")
        metric = next((name for name in (match[1], f"{match[1]}.value") if name in known), None)
        if metric is None:
            raise UsageError(
                f"--gate {expression!r}: this run has no metric {match[1]}; "
                f"it has {', '.join(known)}"
            )
        gates.append(Gate(expression=expression, metric=metric, sign=match[2], bound=bound))
    return gates
