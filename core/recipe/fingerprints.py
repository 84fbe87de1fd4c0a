"""Fingerprints of a stage: what decides its result, and what it wrote.

A stage's key covers its options, the contents of all files and directories that they name, the
versions of spectool, torch and transformers, and, where it is timed, the machine. A hub id counts
by its name and its revision: the hub is not asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectool import machine
from spectool.checkpoint.headers import CERTIFICATE, HEADS, PACKED_INDEX, TRAINING
from spectool.files import json_bytes, replacing
from spectool.recipe.plan import PlannedStage, texts_of

# What is added to an artifact after it was written; its indexes list these files.
_ADDED = ("README.md", CERTIFICATE)
_LISTINGS = (PACKED_INDEX, TRAINING, HEADS)

VERSIONED = ("spectool", "torch", "transformers")


class Digests:
    """SHA-256 of files and directories. A file is read again only if its size or time changed.

    The digests of large files are kept in the file `store` from run to run.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._known: dict[str, list[Any]] = {}
        try:
            found = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict):
            self._known = found

    def of(self, path: Path) -> str:
        """Return the digest of a file, or of a directory's names and contents.

        Of an artifact: without what was added to it later, its README and certificate.
        """
        if path.is_file():
            return self._of_file(path)
        listed = [
            (str(each.relative_to(path)), self._of_file(each))
            for each in _list_files(path)
            if each.name not in _ADDED
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def save(self) -> None:
        """Keep the digests for later runs."""
        with replacing(self._store) as temporary:
            temporary.write_text(json.dumps(self._known), encoding="utf-8")

    def _of_file(self, path: Path) -> str:
        if path.name in _LISTINGS:
            return _hash_listing(path)
        status = path.stat()
        key, state = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        known = self._known.get(key)
        if known is not None and known[:2] == state:
            return str(known[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[key] = [*state, digest]
        return digest


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield all files of a directory and below, in order."""
    for root, names, files in os.walk(folder):
        names.sort()
        yield from (Path(root, name) for name in sorted(files))


def _hash_listing(path: Path) -> str:
    """Hash an index or record without its list of files."""
    data = path.read_bytes()
    try:
        record = json.loads(data)
        (record["metadata"] if path.name == PACKED_INDEX else record).pop("files", None)
        data = json_bytes(record)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return hashlib.sha256(data).hexdigest()


def versions() -> dict[str, str | None]:
    """Return the installed versions of what a result depends on."""
    return {name: machine.version(name) for name in VERSIONED}


def key_of(
    planned: PlannedStage, names: Mapping[str, str], digests: Digests, tunings: Mapping[str, str]
) -> str:
    """Return the key of a stage whose earlier stages are done.

    `names` has what the placeholders stand for; `tunings` the keys of tunings, by identity, which
    leave no directory.
    """
    inputs = {}
    for config in planned.filled(names):
        for option, text in texts_of(config).items():
            # `NAME:key=value` may name a directory before its colon.
            for path in (Path(text), Path(text.partition(":")[0])):
                if text and path.exists():
                    inputs[option] = digests.of(path)
                    break
    record = {
        "stage": planned.stage,
        "method": planned.method,
        "options": [config.as_dict() for config in planned.configs],
        "inputs": inputs,
        "tunings": [tunings[each.identity] for each in planned.takes if each.identity in tunings],
        "versions": versions(),
        "machine": machine.describe_hardware() if planned.is_timed else None,
    }
    return f"sha256:{hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()}"
