"""The interface of a KV store: the keys and values of one layer, for the rows of a batch.

A store is a list of tensors with one column a token. A codec says what these tensors hold
(`encode`) and how keys and values are computed from them (`decode`); a column is a function of its
own token's keys and values. The cache (`decode/cache.py`) says which columns a pass writes. Columns
that no mask shows hold garbage. Suffixes: B rows, H key-value heads, N nodes of a pass, S columns,
D head width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectool import methods, options


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a pass writes: row b's nodes from column `starts[b]` on.

    `index_BN` lists them where rows start at different ones. Buffers have `capacity` columns; no
    row's tail goes beyond the first `width`.
    """

    starts: list[int]
    index_BN: Tensor | None
    width: int
    capacity: int


class KVStore(ABC):
    """The keys and values of one layer. `fields` [B, H, S, any]: none before the first pass.

    A codec with options sets `Config` and the type of `config`.
    """

    Config: ClassVar[type[options.Config]] = options.Config
    config: options.Config

    def __init__(self, config: Any = None) -> None:
        self.config = config or self.Config()
        self.fields: list[Tensor] = []

    @abstractmethod
    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        """Return the tensors [B, H, N, any] that are kept of these keys and values."""

    @abstractmethod
    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, H, S, D] of fields [B, H, S, any]."""

    def write_tail(self, keys_BHND: Tensor, values_BHND: Tensor, columns: Columns) -> None:
        """Write the nodes of a pass."""
        coded = self.encode(keys_BHND, values_BHND)
        # Zeros, not empty: a hidden column still meets a weight of 0, and 0 * NaN is NaN.
        self.fields = self.fields or [
            rows.new_zeros(*rows.shape[:2], 0, rows.shape[3]) for rows in coded
        ]
        self.fields = [_enlarge(field, columns.capacity) for field in self.fields]
        for field, rows_BHNX in zip(self.fields, coded, strict=True):
            if columns.index_BN is None:
                start = columns.starts[0]
                field[:, :, start : start + rows_BHNX.shape[2]] = rows_BHNX
            else:
                index_BHNX = columns.index_BN[:, None, :, None].expand_as(rows_BHNX)
                field.scatter_(2, index_BHNX, rows_BHNX)

    def view(self, width: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, H, S, D] of the first `width` columns."""
        return self.decode([field[:, :, :width] for field in self.fields])

    def move(self, row: int, source: Tensor, start: int) -> None:
        """Copy the columns `source` of a row to `start` and after."""
        for field in self.fields:
            field[row, :, start : start + len(source)] = field[row, :, source]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.fields = [field[rows] for field in self.fields]

    def join(self, other: KVStore, rows: tuple[int, int]) -> None:
        """Append the rows of another store; `rows` are the numbers of both, maybe still empty."""
        like = self.fields or other.fields
        if not like:
            return
        parts = [
            store.fields or [field.new_zeros(count, *field.shape[1:]) for field in like]
            for store, count in zip((self, other), rows, strict=True)
        ]
        capacity = max(fields[0].shape[2] for fields in parts)
        self.fields = [
            torch.cat([_enlarge(field, capacity) for field in pair])
            for pair in zip(*parts, strict=True)
        ]

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one row's column."""
        return sum(f.shape[1] * f.shape[3] * f.element_size() for f in self.fields)


# Makes the empty store of one layer.
StoreFactory = Callable[[], KVStore]


def parse_kv(text: str) -> StoreFactory:
    """Parse the name of a store with its options: `dense`, `int8`, `int8:group=64`.

    Raises:
        UsageError: an unknown name, an unknown or wrong option.
    """
    name, _, pairs = text.partition(":")
    store: type[KVStore] = methods.resolve(name, "kv")
    return functools.partial(store, store.Config.from_text(pairs))


def _enlarge(field_BHSX: Tensor, capacity: int) -> Tensor:
    """Return a field of at least `capacity` columns that begins with this one."""
    batch, heads, columns, width = field_BHSX.shape
    if columns >= capacity:
        return field_BHSX
    new_BHSX = field_BHSX.new_zeros(batch, heads, capacity, width)
    new_BHSX[:, :, :columns] = field_BHSX
    return new_BHSX
