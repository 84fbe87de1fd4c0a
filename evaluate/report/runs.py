"""Results for a report: the JSON objects that commands printed, found in files and folders.

A folder is searched for them, at any depth. `run.json`, which `spectool run` leaves beside its
results, adds the times and exit codes of a recipe's stages, and the machine.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectool.errors import InputError
from spectool.files import read_errors

# Keys of our files: every object of `--json`, a certificate, points of `benchmarks/fidelity.py`.
_RESULT, _CERTIFICATE, _PEERS = "schema_version", "promises", "window_tokens"
_STAGES = "run.json"
# What cannot stand in HTML or SVG: control characters, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A result. `name` tells it from the others of the page.

    `stage`: what `run.json` says of it; empty if there is none.
    """

    path: Path
    name: str
    data: Mapping[str, Any]
    stage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line that made it; empty if the file does not say."""
        words = self.stage.get("command")
        return shlex.join(words) if words else str(self.data.get("command", ""))

    @property
    def words(self) -> list[str]:
        """The words of the command."""
        try:
            return shlex.split(self.command)
        except ValueError:
            # Nobody's shell could run it.
            return self.command.split()

    @property
    def is_peers(self) -> bool:
        """Whether it holds many methods' points, to compare with."""
        return _PEERS in self.data


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the results in files, and in folders at any depth.

    Raises:
        InputError: a file cannot be read or holds no result, or a folder has none.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = list(_search(path)) if path.is_dir() else [_read_file(path)]
        if not found:
            raise InputError(f"{path}: no results in this folder: no object printed with --json")
        runs |= {run.path.resolve(): run for run in found}
    return list(runs.values())


def _read_file(path: Path) -> Run:
    data = _parse(path)
    if not _is_ours(data):
        raise InputError(f"{path}: no object that a command printed with --json")
    return Run(path=path, name=path.stem, data=data, stage=_find_stage(path))


def _search(folder: Path) -> Iterator[Run]:
    """Yield the results below a folder, and pass other JSON files by, as those of checkpoints."""
    for path in sorted(folder.rglob("*.json")):
        try:
            data = _parse(path)
        except InputError:
            # A result that is half written or damaged is an error, a checkpoint's file is not.
            if path.parent.name == "results":
                raise
            continue
        if _is_ours(data):
            name = path.relative_to(folder).with_suffix("").as_posix().replace("results/", "")
            yield Run(path=path, name=name, data=data, stage=_find_stage(path))


def _parse(path: Path) -> Any:
    """Return the JSON in a file, its texts without characters that cannot be shown.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    with read_errors(path):
        data = path.read_bytes()
    try:
        return _printable(json.loads(data, parse_constant=_refuse))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def _is_ours(data: Any) -> bool:
    return isinstance(data, dict) and any(
        key in data and isinstance(data[key], kind)
        for key, kind in ((_RESULT, int), (_CERTIFICATE, dict), (_PEERS, dict))
    )


def _find_stage(path: Path) -> Mapping[str, Any]:
    """Return the record of a recipe's stage that left this result as `results/NN-STAGE.json`."""
    around = path.parent.parent / _STAGES
    if path.parent.name != "results" or not around.is_file():
        return {}
    found = _parse(around)
    stages = found.get("stages") if isinstance(found, dict) else None
    for stage in stages or ():
        if path.stem.partition("-")[2] == stage.get("stage"):
            return {"machine": found.get("machine"), "values": found.get("values"), **stage}
    return {}
