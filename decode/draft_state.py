"""Files of the statistics that a drafter keeps between runs.

One safetensors file, replaced as a whole; its header names the drafter that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import read_tensor
from spectool.errors import CheckpointError
from spectool.files import replacing

FORMAT, FORMAT_VERSION = "spectool-draft-state", 1


def load(path: Path, drafter: str) -> dict[str, Tensor]:
    """Read the tensors of a state file; none if there is no file yet.

    Raises:
        CheckpointError: the file is something else, or another drafter's.
    """
    if not path.exists():
        return {}
    metadata, entries = read_header(path)
    try:
        record = dict(json.loads(metadata["spectool"]))
    except (KeyError, ValueError, TypeError):
        record = {}
    if record.get("format") != FORMAT or record.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: no state of a drafter in version {FORMAT_VERSION}")
    if record.get("drafter") != drafter:
        raise CheckpointError(f"{path}: the state of {record.get('drafter')}, not of {drafter}")
    return {entry.name: read_tensor(entry) for entry in entries}


def save(path: Path, drafter: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a state file, replacing an older one.

    Raises:
        InputError: the file cannot be written.
        SpectoolError: the disk is full.
    """
    record = {"format": FORMAT, "version": FORMAT_VERSION, "drafter": drafter}
    with replacing(path) as partial:
        write_safetensors(partial, dict(tensors), record)
