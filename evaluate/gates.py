"""Gates: `--gate 'perplexity_ratio<=1.1'` turns a metric into an exit code.

A metric that the run does not have is a usage error; a metric that is NaN fails its gate.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectool.errors import UsageError

COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|<|>)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Parsed gate: metric, comparison, bound."""

    expression: str
    key: str
    sign: str
    bound: float

    def check(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Check a finished result; return `{expression, value, holds}`.

        Raises:
            UsageError: the result has no such metric.
        """
        value = lookup(result, self.key)
        if value is None:
            raise UsageError(
                f"--gate {self.expression!r}: there is no metric {self.key}; "
                f"there are {', '.join(list_metrics(result))}"
            )
        holds = not math.isnan(value) and COMPARE[self.sign](value, self.bound)
        return {"expression": self.expression, "value": value, "holds": bool(holds)}


def parse_gates(expressions: Sequence[str], known: Sequence[str]) -> list[Gate]:
    """Parse gates written as `KEY<=NUMBER`, with the metrics of this run as the known keys.

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
        if match[1] not in known and f"{match[1]}.value" not in known:
            raise UsageError(
                f"--gate {expression!r}: this run has no metric {match[1]}; "
                f"it has {', '.join(known)}"
            )
        gates.append(Gate(expression=expression, key=match[1], sign=match[2], bound=bound))
    return gates


def lookup(result: Mapping[str, Any], key: str) -> float | None:
    """Return the metric with a dotted key, or its `value` if it is an object; None if absent."""
    value: Any = result
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("value")
    return float(value) if isinstance(value, (int, float)) else None


def list_metrics(result: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys of all numbers in a result."""
    keys: list[str] = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            keys += list_metrics(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            keys.append(prefix + key)
    return keys
