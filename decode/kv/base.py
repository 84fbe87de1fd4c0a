"""The interface of a KV store: the keys and values of one layer, for the rows of a batch.

A store is a list of tensors with one column a token. A codec says what these tensors hold
(`encode`) and how keys and values are computed from them (`decode`); a column is a function of its
own token's keys and values. The cache (`decode/cache.py`) says which columns a pass writes. Columns
that no mask shows hold garbage. Rows that leave keep their memory for those that join, since to
allocate all rows anew costs more than a step. Suffixes: B rows, H key-value heads, N nodes of a
pass, S columns, D head width.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    """The keys and values of one layer.

    A codec with options sets `Config` and the type of `config`.
    """

    Config: ClassVar[type[options.Config]] = options.Config
    config: options.Config

    def __init__(self, config: Any = None) -> None:
        self.config = config or self.Config()
        # Spare rows come last.
        self._buffers: list[Tensor] = []
        self._num_rows = 0

    @property
    def fields(self) -> list[Tensor]:
        """Return the tensors [B, H, S, any] that are kept; none before the first pass."""
        return [buffer[: self._num_rows] for buffer in self._buffers]

    @abstractmethod
    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        """Return the tensors [B, H, N, any] that are kept of these keys and values."""

    @abstractmethod
    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, H, S, D] of fields [B, H, S, any]."""

    def write_tail(self, keys_BHND: Tensor, values_BHND: Tensor, columns: Columns) -> None:
        """Write the nodes of a pass."""
        coded = self.encode(keys_BHND, values_BHND)
        for field, rows_BHNX in zip(self.make_room(coded, columns), coded, strict=True):
            if columns.index_BN is None:
                start = columns.starts[0]
                field[:, :, start : start + rows_BHNX.shape[2]] = rows_BHNX
            else:
                index_BHNX = columns.index_BN[:, None, :, None].expand_as(rows_BHNX)
                field.scatter_(2, index_BHNX, rows_BHNX)

    def make_room(self, coded: Sequence[Tensor], columns: Columns) -> list[Tensor]:
        """Return the fields, with room for a pass; `coded` are like those of its nodes."""
        if not self._buffers:
            self._buffers = [rows[:, :, :0] for rows in coded]
            self._num_rows = len(coded[0])
        num_rows, capacity = self._num_rows, columns.capacity
        self._buffers = [_enlarge(buffer, num_rows, capacity) for buffer in self._buffers]
        return self.fields

    def view(self, width: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, H, S, D] of the first `width` columns."""
        return self.decode([field[:, :, :width] for field in self.fields])

    def move(self, row: int, source: Tensor, start: int) -> None:
        """Copy the columns `source` of a row to `start` and after."""
        for field in self.fields:
            field[row, :, start : start + len(source)] = field[row, :, source]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in ascending order."""
        for row, kept in enumerate(rows):
            for buffer in self._buffers if row != kept else ():
                buffer[row] = buffer[kept]
        self._num_rows = len(rows)

    def join(self, other: KVStore, rows: tuple[int, int]) -> None:
        """Append the rows of another store; `rows` are the numbers of both, maybe still empty."""
        like, held, self._num_rows = self._buffers or other._buffers, rows[0], sum(rows)
        mine = self._buffers or [buffer[:0] for buffer in like]
        given = other.fields or [buffer[:0, :, :0] for buffer in like]
        self._buffers = []
        for buffer, field in zip(mine, given, strict=True):
            buffer = _enlarge(buffer, self._num_rows, field.shape[2])
            # What a row that left has written may be NaN.
            buffer[held : self._num_rows] = 0
            buffer[held : held + len(field), :, : field.shape[2]] = field
            self._buffers.append(buffer)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one row's column."""
        return sum(f.shape[1] * f.shape[3] * f.element_size() for f in self._buffers)


# Makes the empty store of one layer.
StoreFactory = Callable[[], KVStore]


def parse_kv(text: str) -> StoreFactory:
    """Parse the name of a store with its options: `dense`, `int8`, `int8:group=64`.

    Raises:
        UsageError: an unknown name, an unknown or wrong option.
    """
    name, _, pairs = text.partition(":")
    store: type[KVStore] = methods.import_method(name, "kv")
    return functools.partial(store, store.Config.from_text(pairs))


def _enlarge(buffer_BHSX: Tensor, rows: int, columns: int) -> Tensor:
    """Return a buffer of at least these rows and columns that begins with this one."""
    num_rows, heads, num_columns, width = buffer_BHSX.shape
    if num_rows >= rows and num_columns >= columns:
        return buffer_BHSX
    # Zeros, not empty: a hidden column still meets a weight of 0, and 0 * NaN is NaN.
    new_BHSX = buffer_BHSX.new_zeros(max(num_rows, rows), heads, max(num_columns, columns), width)
    new_BHSX[:num_rows, :, :num_columns] = buffer_BHSX
    return new_BHSX
