"""Gates: `--gate 'perplexity_ratio<=1.1'` turns a metric into an exit code.

With a baseline, `METRIC/baseline` and `METRIC-baseline` are the metric divided by the baseline's,
and their difference. A metric that no measure of the run has, or that the baseline lacks, is a
usage error; one that is NaN fails its gate.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from spectool.errors import UsageError
from spectool.evaluate.baseline import Baseline, Change
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.results import read_number

COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
GATE = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w.]*)\s*((?P<change>[/-])\s*baseline\s*)?"
    r"(?P<sign><=|>=|==|<|>)\s*(?P<bound>\S+)\s*"
)


@dataclass(frozen=True, slots=True)
class Checked:
    """A gate after the run: the value of its metric, and whether it holds."""

    expression: str
    value: float
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Parsed gate: metric, comparison, bound.

    `change`: how the baseline's metric enters, "/" or "-"; empty without it.
    """

    expression: str
    metric: str
    change: str
    sign: str
    bound: float

    def check(self, results: Sequence[Measure], baseline: Baseline | None = None) -> Checked:
        """Compare the metric, which one of the results has, or its change from the baseline."""
        (result,) = (each for each in results if hasattr(each, self.metric.split(".")[0]))
        value = read_number(result, self.metric)
        if self.change:
            assert baseline is not None
            change = Change(self.metric, value, baseline.number(self.metric))
            value = change.ratio if self.change == "/" else change.difference
        return self.judge(value)

    def judge(self, value: float) -> Checked:
        """Compare the metric's value with the bound."""
        holds = not math.isnan(value) and COMPARE[self.sign](value, self.bound)
        return Checked(self.expression, value, bool(holds))


def parse_gates(
    expressions: Sequence[str], known: Sequence[str], *, has_baseline: bool = False
) -> list[Gate]:
    """Parse gates written as `METRIC<=NUMBER`; `x` is short for a metric `x.value`.

    Raises:
        UsageError: a gate has another form, its metric is not in `known`, or it names a baseline
            and there is none.
    """
    gates = []
    for expression in expressions:
        match = GATE.fullmatch(expression)
        try:
            bound = float(match["bound"]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or math.isnan(bound):
            raise UsageError(f"--gate {expression!r}: expected KEY<=NUMBER (or >=, <, >, ==)")
        name, change = match["metric"], match["change"] or ""
        metric = next((each for each in (name, f"{name}.value") if each in known), None)
        if metric is None:
            raise UsageError(
                f"--gate {expression!r}: this run has no metric {name}; it has {', '.join(known)}"
            )
        if change and not has_baseline:
            raise UsageError(f"--gate {expression!r} needs --baseline FILE")
        gates.append(
            Gate(
                expression=expression,
                metric=metric,
                change=change,
                sign=match["sign"],
                bound=bound,
            )
        )
    return gates
