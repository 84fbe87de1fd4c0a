"""The format version of what spectool writes: names of earlier versions, checks of its entries.

An artifact's `quantization_config` and the record of draft heads carry `format_version`. Names and
values of older versions are converted while they are read, so the rest of the code uses those of
this version only. Unfinished runs and feature stores are not converted: they carry the same number
and are refused if it differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spectool.errors import CheckpointError

FORMAT_VERSION = 2

# Keys of format 1 in the objects of the record of draft heads.
HEADS_NAMES = {
    "options": {"law_weight": "probs_weight"},
    "training": {"begin": "init_from", "pack": "sequence_packing", "looks": "evaluations"},
}


def upgrade_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an artifact's `quantization_config` to the names and values of this version."""
    if not _is_first(quantization):
        return dict(quantization)
    upgraded = _rename(quantization, {"made_by": {"head": "lm_head"}})
    if isinstance(modules := upgraded.get("modules"), dict):
        upgraded["modules"] = {
            name: {**entry, "outside": "lm_head"}
            if isinstance(entry, dict) and entry.get("outside") == "head"
            else entry
            for name, entry in modules.items()
        }
    return upgraded


def upgrade_heads(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the record of draft heads to the names of this version.

    `tuned` is left out: it held times of a machine, which are in the cache folder now.
    """
    record = {key: value for key, value in record.items() if key != "tuned"}
    return _rename(record, HEADS_NAMES) if _is_first(record) else record


def _is_first(record: Mapping[str, Any]) -> bool:
    """Whether a record has format 1."""
    version = record.get("format_version")
    # `True == 1`, but true is not a version.
    return type(version) is int and version == 1


def _rename(record: Mapping[str, Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return a record of this version; `names` are the new keys of its objects."""
    renamed = {**record, "format_version": FORMAT_VERSION}
    for name, keys in names.items():
        if isinstance(value := record.get(name), dict):
            renamed[name] = {keys.get(key, key): inner for key, inner in value.items()}
    return renamed


def packed_entries(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the checked entries `{method, options, shape, ...}` of an artifact's matrices.

    Raises:
        CheckpointError: a newer format, or incomplete entries.
    """
    version = quantization.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"format_version is {shorten(version)}, expected a number up to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the artifact has format {version}, this spectool reads up to {FORMAT_VERSION}",
            hint="install a newer spectool",
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict):
        raise CheckpointError(f"modules is {shorten(modules)}, expected an object")
    for key in ("source", "made_by"):
        if not isinstance(quantization.get(key) or {}, dict):
            raise CheckpointError(f"{key} is {shorten(quantization[key])}, expected an object")
    for name, entry in modules.items():
        expected = _find_defect(name, entry)
        if expected is not None:
            raise CheckpointError(f"the entry of {name} is {shorten(entry)}, expected {expected}")
    return modules


def _find_defect(name: str, entry: Any) -> str | None:
    """Return what was expected of a packed matrix's invalid entry; None if the entry is valid."""
    if not isinstance(entry, dict):
        return "an object"
    if not isinstance(entry.get("method"), str) or not isinstance(entry.get("options"), dict):
        return "a method and its options"
    shape = entry.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(length) is int and length > 0 for length in shape)
    ):
        return "a shape of two numbers"
    if "tied" in entry and not isinstance(entry["tied"], str):
        return "the name of the matrix that it is tied to"
    if entry.get("expert") and not name.rpartition(".")[2].isdecimal():
        return "a name that ends with the expert's number"
    return None


def shorten(value: Any) -> str:
    """Format a JSON value for a message, in at most 60 characters."""
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
