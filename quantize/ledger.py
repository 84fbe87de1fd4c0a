"""Ledger of stored bits, counted from the headers of the written files. Imports no torch.

`linears` = bits of all fields of the blocks' packed matrices / their weights; `file` = bits of all
weight files / all parameters of the model. Nominal widths of codes are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectool.checkpoint.headers import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One packed matrix: shape is (outputs, inputs), `num_bytes` those of its fields."""

    name: str
    method: str
    shape: tuple[int, int]
    num_bytes: int
    outside: bool = False

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.num_bytes / math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Contents of an artifact's weight files."""

    entries: tuple[Entry, ...]
    dense_parameters: int
    file_bytes: int

    @property
    def packed_weights(self) -> int:
        """Weights of all packed matrices."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, packed and dense."""
        return self.packed_weights + self.dense_parameters

    @property
    def linears(self) -> float | None:
        """Bits per weight of the blocks' packed matrices; None if nothing is packed."""
        inside = [entry for entry in self.entries if not entry.outside]
        if not inside:
            return None
        weights = sum(math.prod(entry.shape) for entry in inside)
        return 8 * sum(entry.num_bytes for entry in inside) / weights

    @property
    def file(self) -> float:
        """Bits per parameter of all weight files, headers included."""
        return 8 * self.file_bytes / self.num_parameters


def measure(layout: Layout) -> Ledger:
    """Count the stored bits of a checkpoint, packed or dense."""
    modules = layout.modules
    num_bytes = dict.fromkeys(modules, 0)
    dense = 0
    for key, entry in layout.tensors.items():
        name, infix, _ = key.rpartition(".q.")
        if infix and name in num_bytes:
            num_bytes[name] += entry.num_bytes
        else:
            dense += entry.num_elements
    return Ledger(
        entries=tuple(
            Entry(
                name=name,
                method=metadata["method"],
                shape=(metadata["shape"][0], metadata["shape"][1]),
                num_bytes=num_bytes[name],
                outside="outside" in metadata,
            )
            for name, metadata in modules.items()
        ),
        dense_parameters=dense,
        file_bytes=sum(path.stat().st_size for path in layout.files),
    )
