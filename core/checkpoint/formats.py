"""The version of what spectool writes, and the names of earlier versions as they are called now.

An artifact's `quantization_config` and the record of draft heads carry `format_version`. What an
older version named otherwise is renamed while it is read, so that the rest of the code knows the
names of the present version alone. Unfinished runs and feature stores are not converted: they
carry the same number and are refused if it is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 2

# Names of format 1, from the top of the record down; `*` stands for every key of an object.
CONFIG_NAMES: dict[tuple[str, ...], str] = {("made_by", "head"): "lm_head"}
HEADS_NAMES: dict[tuple[str, ...], str] = {
    ("options", "law_weight"): "probs_weight",
    ("training", "begin"): "init_from",
    ("training", "pack"): "sequence_packing",
    ("training", "looks"): "evaluations",
}
# Values of format 1, by the place where they stand.
CONFIG_VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("modules", "*", "outside"): {"head": "lm_head"}
}


def upgrade_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return an artifact's `quantization_config` with the names and values of this version."""
    if not _is_first(quantization):
        return dict(quantization)
    named: dict[str, Any] = _renamed(quantization, CONFIG_NAMES, CONFIG_VALUES)
    return named | {"format_version": FORMAT_VERSION}


def upgrade_heads(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of draft heads with the names of this version."""
    if not _is_first(record):
        return dict(record)
    named: dict[str, Any] = _renamed(record, HEADS_NAMES, {})
    return named | {"format_version": FORMAT_VERSION}


def _is_first(record: Mapping[str, Any]) -> bool:
    version = record.get("format_version")
    # True equals 1, and is a damaged number.
    return type(version) is int and version == 1


def _renamed(
    value: Any,
    names: Mapping[tuple[str, ...], str],
    values: Mapping[tuple[str, ...], Mapping[str, str]],
) -> Any:
    """Return a copy of `value` with keys and values replaced; the paths begin at `value`."""
    if () in values:
        return values[()].get(value, value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value
    found = {}
    for key, each in value.items():
        inner_names = {path[1:]: new for path, new in names.items() if path[0] in (key, "*")}
        inner_values = {path[1:]: new for path, new in values.items() if path[0] in (key, "*")}
        new_key = inner_names.pop((), key)
        found[new_key] = _renamed(each, inner_names, inner_values)
    return found
