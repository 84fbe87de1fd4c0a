"""The store that keeps keys and values as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectool.decode.kv.base import KVStore


class DenseStore(KVStore):
    """Keys and values in the model's dtype; a view of them copies nothing."""

    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        return keys_BHND, values_BHND

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys_BHSD, values_BHSD = fields
        return keys_BHSD, values_BHSD
