"""Gates: `--gate 'perplexity_ratio<=1.1'` turns a measured figure into an exit code.

A key that the result does not have is the user's mistake; a figure that is not a number fails.
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
    """A parsed gate: key, comparison, bound."""

    expression: str
    key: str
    sign: str
    bound: float

    def check(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """`{expression, value, holds}` for a finished result.

        Raises:
            UsageError: the result has no such figure.
        """
        value = lookup(result, self.key)
        if value is None:
            raise UsageError(
                f"--gate {self.expression!r}: there is no figure {self.key}; "
                f"there are {', '.join(metrics(result))}"
            )
        holds = not math.isnan(value) and COMPARE[self.sign](value, self.bound)
        return {"expression": self.expression, "value": value, "holds": bool(holds)}


def parse_gates(expressions: Sequence[str], known: Sequence[str]) -> list[Gate]:
    """The gates written as `KEY<=NUMBER`, checked against the figures that there will be.

    Raises:
        UsageError: not of that form, or a figure that this run will not have.
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
                f"--gate {expression!r}: this run has no figure {match[1]}; "
                f"it has {', '.join(known)}"
            )
        gates.append(Gate(expression=expression, key=match[1], sign=match[2], bound=bound))
    return gates


def lookup(result: Mapping[str, Any], key: str) -> float | None:
    """The figure under a dotted key; of an object, its `value`."""
    found: Any = result
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        found = found.get("value")
    return float(found) if isinstance(found, (int, float)) else None


def metrics(result: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all numbers in a result."""
    found: list[str] = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            found += metrics(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(prefix + key)
    return found
