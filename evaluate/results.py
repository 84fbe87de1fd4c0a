"""Results as dataclasses: their JSON, and the metrics that gates may name."""

from __future__ import annotations

import dataclasses
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


def read_numbers(*results: Any) -> dict[str, float]:
    """Return the numbers of dataclasses, or of their JSON, by dotted name; not those in lists.

    A name has the keys as they are, also with dots or signs in them: `tasks.my-task.acc.items`.
    """
    return {name: value for result in results for name, value in _numbers(result, "")}


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, f"{name}.{key}" if name else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


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
