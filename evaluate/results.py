"""Results as dataclasses: their JSON, and the metrics that gates may name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_type_hints


def as_json(result: Any) -> Any:
    """Return a dataclass, list or number as JSON; a field that is None by default is left out."""
    if dataclasses.is_dataclass(result):
        values = [(field, getattr(result, field.name)) for field in dataclasses.fields(result)]
        return {
            field.name: as_json(value)
            for field, value in values
            if value is not None or field.default is not None
        }
    if isinstance(result, dict):
        return {key: as_json(value) for key, value in result.items()}
    return [as_json(value) for value in result] if isinstance(result, (list, tuple)) else result


def read_number(result: Any, metric: str) -> float:
    """Return a number by its dotted name, of a dataclass or of its JSON; NaN if it has none."""
    for name in metric.split("."):
        found = result.get(name) if isinstance(result, dict) else getattr(result, name, None)
        if found is None:
            return math.nan
        result = found
    return float(result) if isinstance(result, (int, float)) else math.nan


def number_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the numbers among a dataclass's fields.

    Those that may be None are named too: a run may be unable to measure them.
    """
    for name, hint in get_type_hints(kind).items():
        (hint,) = {*get_args(hint)} - {NoneType} if NoneType in get_args(hint) else (hint,)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from number_names(hint, f"{prefix}{name}.")
        elif hint in (int, float):
            yield prefix + name


def number_at(result: Any, name: str) -> float:
    """Return a number of a result by its dotted path in the JSON; NaN if it was not measured."""
    value: Any = as_json(result)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else float("nan")
