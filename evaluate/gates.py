"""Gates: `--gate 'perplexity_ratio<=1.1'` turns a metric into an exit code.

A metric's name may hold any characters, as names of tasks do: the last comparison sign ends it.
With a baseline, `METRIC/baseline` and `METRIC-baseline` are the metric divided by the baseline's,
and their difference. A metric that no measure of the run has, or that the baseline lacks, is a
usage error; one that is NaN fails its gate.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectool.errors import UsageError, nearest
from spectool.evaluate.baseline import Baseline, Change

COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
GATE = re.compile(
    r"\s*(?P<metric>\S.*?)\s*((?P<change>[/-])\s*baseline\s*)?"
    r"(?P<sign><=|>=|==|<|>)(?P<bound>[^<>=]+)"
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

    def check(self, numbers: Mapping[str, float], baseline: Baseline | None = None) -> Checked:
        """Compare the metric, one of the run's numbers, or its change from the baseline."""
        value = numbers.get(self.metric, math.nan)
        if self.change:
            assert baseline is not None
            change = Change(self.metric, value, baseline.number(self.metric))
            value = change.ratio if self.change == "/" else change.difference
        holds = not math.isnan(value) and COMPARE[self.sign](value, self.bound)
        return Checked(self.expression, value, bool(holds))


def parse_gates(
    expressions: Sequence[str],
    known: Sequence[str],
    *,
    has_baseline: bool = False,
    placeholders: Sequence[str] = (),
) -> list[Gate]:
    """Parse gates written as `METRIC<=NUMBER`; `x` is short for a metric `x.value`.

    `placeholders`: words in `known` that stand for any name, where the run's are not known yet.

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
        metric = next(
            (each for each in (name, f"{name}.value") if _is_among(each, known, placeholders)), None
        )
        if metric is None:
            begins = ", ".join(dict.fromkeys(each.partition(".")[0] for each in known))
            short = [each.removesuffix(".value") for each in known]
            raise UsageError(
                f"--gate {expression!r}: this run has no metric {name}",
                hint=nearest(name, short) or f"the metrics of this run begin with {begins}",
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


def _is_among(name: str, known: Sequence[str], placeholders: Sequence[str]) -> bool:
    """Whether a name is known, with any text in place of each placeholder."""
    if not placeholders:
        return name in known
    words = "|".join(placeholders)
    patterns = (".+".join(map(re.escape, re.split(words, each))) for each in known)
    return any(re.fullmatch(pattern, name) for pattern in patterns)
