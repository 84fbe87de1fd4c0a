"""The format version of what spectool writes, and conversion of names from earlier versions.

An artifact's `quantization_config` and the record of draft heads carry `format_version`. Names and
values of older versions are converted while they are read, so the rest of the code uses those of
this version only. Unfinished runs and feature stores are not converted: they carry the same number
and are refused if it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 2

# Keys of format 1 by their path from the top of the record; `*` stands for every key.
CONFIG_NAMES: dict[tuple[str, ...], str] = {("made_by", "head"): "lm_head"}
HEADS_NAMES: dict[tuple[str, ...], str] = {
    ("options", "law_weight"): "probs_weight",
    ("training", "begin"): "init_from",
    ("training", "pack"): "sequence_packing",
    ("training", "looks"): "evaluations",
}
# Values of format 1 by the path of their key.
CONFIG_VALUES: dict[tuple[str, ...], dict[str, str]] = {
    ("modules", "*", "outside"): {"head": "lm_head"}
}


def upgrade_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an artifact's `quantization_config` to the names and values of this version."""
    if not _is_first(quantization):
        return dict(quantization)
    converted: dict[str, Any] = _rename(quantization, CONFIG_NAMES, CONFIG_VALUES)
    return converted | {"format_version": FORMAT_VERSION}


def upgrade_heads(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the record of draft heads to the names of this version.

    `tuned` is left out: it held times of a machine, which are in the cache folder now.
    """
    record = {key: value for key, value in record.items() if key != "tuned"}
    if not _is_first(record):
        return record
    converted: dict[str, Any] = _rename(record, HEADS_NAMES, {})
    return converted | {"format_version": FORMAT_VERSION}


def _is_first(record: Mapping[str, Any]) -> bool:
    """Whether a record has format 1."""
    version = record.get("format_version")
    # `True == 1`, but true is not a version.
    return type(version) is int and version == 1


def _rename(
    value: Any,
    names: Mapping[tuple[str, ...], str],
    values: Mapping[tuple[str, ...], Mapping[str, str]],
) -> Any:
    """Return a copy of `value` with keys and values replaced; paths start at `value`."""
    if () in values:
        return values[()].get(value, value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value
    renamed = {}
    for key, inner in value.items():
        inner_names = {path[1:]: new for path, new in names.items() if path[0] in (key, "*")}
        inner_values = {path[1:]: new for path, new in values.items() if path[0] in (key, "*")}
        new_key = inner_names.pop((), key)
        renamed[new_key] = _rename(inner, inner_names, inner_values)
    return renamed
