"""What a drafter has learnt of texts, kept in a file between runs.

One safetensors file, replaced as a whole; its header says which drafter wrote it.
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
    """The tensors of a state; none if there is no such file yet.

    Raises:
        CheckpointError: the file is something else, or another drafter's.
    """
    if not path.exists():
        return {}
    metadata, entries = read_header(path)
    try:
        said = dict(json.loads(metadata["spectool"]))
    except (KeyError, ValueError, TypeError):
        said = {}
    if said.get("format") != FORMAT or said.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: no state of a drafter in version {FORMAT_VERSION}")
    if said.get("drafter") != drafter:
        raise CheckpointError(f"{path}: the state of {said.get('drafter')}, not of {drafter}")
    return {entry.name: read_tensor(entry) for entry in entries}


def save(path: Path, drafter: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a state in place of an older one.

    Raises:
        InputError: the place cannot be written.
        SpectoolError: the disk is full.
    """
    said = {"format": FORMAT, "version": FORMAT_VERSION, "drafter": drafter}
    with replacing(path) as partial:
        write_safetensors(partial, dict(tensors), said)
