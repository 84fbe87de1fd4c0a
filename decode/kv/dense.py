"""The store that keeps keys and values as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectool.decode.kv.base import Columns, KVStore


class DenseStore(KVStore):
    """Keys and values in the model's dtype; a view of them copies nothing."""

    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        return keys_BHND, values_BHND

    def make_room_for(
        self, shape: tuple[int, int, int], dtype: torch.dtype, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values [at least B, H, capacity, D], with room for a pass; B, H, D."""
        if not self._buffers or self._buffers[0].shape[2] < columns.capacity:
            batch, heads, width = shape
            like_BHND = torch.empty(batch, heads, 0, width, dtype=dtype)
            self.make_room([like_BHND, like_BHND], columns)
        keys_BHSD, values_BHSD = self._buffers
        return keys_BHSD, values_BHSD

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys_BHSD, values_BHSD = fields
        return keys_BHSD, values_BHSD
