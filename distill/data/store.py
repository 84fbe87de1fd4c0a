"""Directories of data that trainings made, kept for later trainings with the same key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.headers import read_json
from spectool.errors import UsageError
from spectool.files import json_bytes


def read_store(path: Path, name: str, key: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """Read the record `name` of a store that holds `what`; None if the store does not exist.

    Raises:
        UsageError: `path` is no such store, or one with another key.
        CheckpointError: the record is damaged.
    """
    if not (path.exists() or path.is_symlink()):
        return None
    if not (path / name).is_file():
        raise UsageError(
            f"{path}: holds no {what}", hint="name a directory that does not exist yet"
        )
    record = read_json(path / name)
    before = record.get("made_for")
    if record.get("format_version") != FORMAT_VERSION or not isinstance(before, dict):
        raise UsageError(f"{path}: {name} is not one that this spectool can read")
    changed = [each for each in sorted({*before, *key}) if before.get(each) != key.get(each)]
    if changed:
        each = changed[0]
        raise UsageError(
            f"{path}: holds {what} made with another {', '.join(changed)} "
            f"({json.dumps(before.get(each))}, now {json.dumps(key.get(each))})",
            hint="name another directory: a store is for one target and one set of texts",
        )
    return record


def open_store(path: Path, key: dict[str, Any]) -> ArtifactWriter:
    """Open the writer of a store, new or unfinished.

    Raises:
        UsageError: an unfinished store with another key.
    """
    try:
        return ArtifactWriter(path, identity=key)
    except UsageError as error:
        raise UsageError(
            str(error), hint=f"remove {path}.partial and {path}.partial.json, or name another one"
        ) from error


def finish_store(
    writer: ArtifactWriter, name: str, key: Mapping[str, Any], prefix: str, **more: Any
) -> None:
    """Write the record `name` of a store and finish it; keep the shards that begin with `prefix`.

    `more` is stored in the record too.
    """
    writer.keep_only([shard for shard in writer.manifest["shards"] if shard.startswith(prefix)])
    shards = {shard: entry["sha256"] for shard, entry in sorted(writer.manifest["shards"].items())}
    record = {
        "format_version": FORMAT_VERSION,
        "made_for": key,
        **more,
        "shards": shards,
        "files": sorted([name, *shards]),
    }
    writer.finish({name: json_bytes(record)})
