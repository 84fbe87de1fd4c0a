"""The cache of a batch: committed tokens, one column each, and the tail of the current tree.

Row b holds `tokens[b]` from column 0 on. `positions_BS` says at which position a column's token
stands: masks read it, as the index of a column is no position. A pass writes its nodes at columns
len(tokens[b]) and after (the tail); `commit` gathers the accepted ones to the front of the tail, in
place. Columns beyond are garbage that masks hide. How the columns of a layer are kept is up to its
store (`kv/`). Stores keep every column, and sliding windows are part of the masks
(`target/masks.py`): a window layer of transformers drops columns that are still needed after a
rejected draft. Suffixes: B batch, H key-value heads, N nodes, S columns, T nodes in the tail, D
head width.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from spectool.decode.kv.base import Columns, KVStore, StoreFactory
from spectool.decode.kv.dense import DenseStore

# Names of the cache argument of forwards: in transformers before 5.24 and in code that comes with a
# checkpoint; in purely recurrent models before 5.24; in transformers from 5.24 on.
_ARGUMENTS = ("past_key_values", "cache_params", "cache")

_FIRST_COLUMNS = 64
# Columns beyond the context for the rejected nodes of a last tree; a wider tree doubles them.
_TAIL = 128


def cache_argument(accepted: Container[str]) -> str | None:
    """Return the name of the cache argument among these parameters; None if there is none."""
    return next((name for name in _ARGUMENTS if name in accepted), None)


class StoreLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer's store as transformers' models see it."""

    is_sliding = False

    def __init__(self, cache: TreeCache, store: KVStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self.store = cache, store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the store allocates its buffers when it is first written."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's nodes at each row's tail; return all columns up to the longest tail."""
        self.store.write_tail(key_states, value_states, self._cache.columns)
        self.is_initialized = True
        # Mllama asks by the size of a layer's keys whether a pass has reached the layer.
        self.keys = key_states
        return self.store.view(self._cache.width)

    @property
    def columns(self) -> Columns:
        """Return the columns that the current pass writes."""
        return self._cache.columns

    def make_room(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [at least B, H, capacity, D] of a dense store, for a pass that
        writes them itself; `shape` is B, H, D."""
        assert isinstance(self.store, DenseStore)
        self.keys, values_BHSD = self.store.make_room_for(shape, dtype, self._cache.columns)
        self.is_initialized = True
        return self.keys, values_BHSD

    def get_seq_length(self) -> int:
        """Return the number of committed columns of the longest row."""
        # Layers that no pass reached (Mllama's for images) must report 0.
        return max(self._cache.lengths) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of a mask, and its offset."""
        return self._cache.width, 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited here."""
        return -1


class BatchCache(ABC):
    """State that passes keep of a batch's rows. `tokens[b]` are the committed tokens of row b."""

    def __init__(self, *, batch: int, context: int) -> None:
        self.context = context
        self.tokens: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Return the number of committed tokens of each row."""
        return [len(tokens) for tokens in self.tokens]

    def num_to_replay(self, row: int) -> int:
        """Return how many committed tokens the row's next pass must read again."""
        return 0

    @abstractmethod
    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]` (root first, ascending) of the pass just run.

        `tokens[b]` are all tokens of row b's tree.
        """

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        del self.tokens[row][length:]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in ascending order."""
        assert list(rows) == sorted(rows), "rows move down into those that left"
        self.tokens = [self.tokens[row] for row in rows]

    def join(self, other: Self) -> None:
        """Append the rows of another cache of the same target and context; lengths may differ.

        The other cache hands its rows over and is not to be used afterwards.
        """
        assert self.context == other.context, "rows of one cache share a context"
        self.tokens += other.tokens

    def keep_prefix(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Keep the longest common prefix of each row with its new prompt; return the lengths.

        The last token of a prompt is never kept: it must pass through the model for its logits.
        """
        return [self.keep_shared(row, prompt[:-1]) for row, prompt in enumerate(prompts)]

    def keep_shared(self, row: int, tokens: Sequence[int]) -> int:
        """Keep the longest common prefix of a row with these tokens; return its length."""
        pairs = zip(self.tokens[row], tokens, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.truncate(row, shared)
        return shared


class TreeCache(BatchCache):
    """Keys and values by row and layer. `model_cache` is what transformers' models take.

    Buffers double up to `context` columns and a tail.
    """

    def __init__(
        self, *, batch: int, num_layers: int, context: int, make_store: StoreFactory = DenseStore
    ) -> None:
        super().__init__(batch=batch, context=context)
        self.stores = [make_store() for _ in range(num_layers)]
        self.model_cache = Cache(layers=[StoreLayer(self, store) for store in self.stores])
        # On the host, where masks are decided.
        self.positions_BS = torch.zeros(batch, 0, dtype=torch.long)
        self.columns = Columns([], None, 0, 0)
        self._tail, self._device = _TAIL, torch.device("cpu")

    @property
    def capacity(self) -> int:
        """Return the number of columns that there is room for."""
        return self.positions_BS.shape[1]

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token in all layers; 0 before the first pass."""
        return sum(store.token_bytes for store in self.stores)

    @property
    def width(self) -> int:
        """Return the number of columns up to the longest tail of the last pass."""
        return self.columns.width

    def open(self, positions_BT: Tensor, num_nodes: int, device: torch.device) -> None:
        """Make room for a pass of the tail's last `num_nodes` nodes; choose the columns it writes.

        `positions_BT` are those of all nodes in the tail, on the host; earlier passes of the same
        tree wrote the first ones.
        """
        lengths, num_tail = self.lengths, positions_BT.shape[1]
        starts = [length + num_tail - num_nodes for length in lengths]
        width, capacity = max(starts) + num_nodes, self.capacity
        if width > capacity:
            if width > self.context + self._tail:
                self._tail = max(2 * self._tail, width - self.context)
            doubled = max(_FIRST_COLUMNS, 2 * capacity, width)
            capacity = min(doubled, self.context + self._tail)
            self.positions_BS = _widen(self.positions_BS, capacity)
        for row, length in enumerate(lengths):
            self.positions_BS[row, length : length + num_tail] = positions_BT[row]
        index_BN: Tensor | None = None
        if len(set(starts)) > 1:
            starts_B1 = torch.tensor(starts, device=device)[:, None]
            index_BN = starts_B1 + torch.arange(num_nodes, device=device)
        self.columns, self._device = Columns(starts, index_BN, width, capacity), device

    @torch.inference_mode()
    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]`; columns already in place are not copied."""
        for row, path in enumerate(paths):
            start = len(self.tokens[row])
            moved = next((i for i, node in enumerate(path) if node != i), None)
            if moved is not None:
                source, into = start + torch.tensor(path[moved:]), start + moved
                self.positions_BS[row, into : into + len(source)] = self.positions_BS[row, source]
                source = source.to(self._device)
                for store in self.stores:
                    store.move(row, source, into)
            self.tokens[row].extend(tokens[row][node] for node in path)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        super().select(rows)
        self.positions_BS = self.positions_BS[list(rows)]
        for store in self.stores:
            store.select(rows)

    @torch.inference_mode()
    def join(self, other: Self) -> None:
        """Append the rows of another cache; see `BatchCache`."""
        rows = len(self.tokens), len(other.tokens)
        super().join(other)
        capacity = max(self.capacity, other.capacity)
        self.positions_BS = torch.cat(
            [_widen(self.positions_BS, capacity), _widen(other.positions_BS, capacity)]
        )
        self._device, self._tail = other._device, max(self._tail, other._tail)
        for mine, theirs in zip(self.stores, other.stores, strict=True):
            mine.join(theirs, rows)


def _widen(positions_BS: Tensor, capacity: int) -> Tensor:
    """Return positions of `capacity` columns that begin with these."""
    return torch.nn.functional.pad(positions_BS, (0, capacity - positions_BS.shape[1]))
