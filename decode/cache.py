"""Keys and values of committed tokens, preallocated; those of the current tree follow directly.

Row b holds `tokens[b]`, one column each from column 0 on. A pass writes its nodes at columns
len(tokens[b]) and after (the tail); `commit` gathers the accepted ones to the front of the tail, in
place. Columns beyond are garbage that masks hide. Layers keep every column, and sliding windows are
part of the masks (`target.py`): a window layer of transformers drops columns that are still needed
after a rejected draft. Suffixes: B batch, H key-value heads, S columns, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Names of the cache argument of forwards: in transformers before 5.24 and in code that comes with a
# checkpoint; in purely recurrent models before 5.24; in transformers from 5.24 on.
_ARGUMENTS = ("past_key_values", "cache_params", "cache")

_FIRST_COLUMNS = 64
# Columns beyond the context for the rejected nodes of a last tree; a wider tree doubles them.
_TAIL = 128


def cache_argument(accepted: Container[str]) -> str | None:
    """Return the name of the cache argument among these parameters; None if there is none."""
    return next((name for name in _ARGUMENTS if name in accepted), None)


class TreeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The buffers of one layer, [B, H, capacity, D] each; the cache says where to write."""

    is_sliding = False

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for states like these."""
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like_BHND: Tensor) -> Tensor:
        """Return a buffer of zeros for all columns."""
        batch, heads, _, width = like_BHND.shape
        # Zeros, not empty: a hidden column still meets a weight of 0, and 0 * NaN is NaN.
        return like_BHND.new_zeros(batch, heads, self.cache.capacity, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the pass's nodes at each row's tail; return all columns up to the longest tail."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] < self.cache.capacity:
            self.keys = self._enlarge(self.keys)
            self.values = self._enlarge(self.values)
        self.cache.write(self.keys, key_states)
        self.cache.write(self.values, value_states)
        width = self.cache.width
        return self.keys[:, :, :width], self.values[:, :, :width]

    def _enlarge(self, old_BHSD: Tensor) -> Tensor:
        """Return a larger buffer that begins with this one."""
        new_BHSD = self._allocate(old_BHSD)
        new_BHSD[:, :, : old_BHSD.shape[2]] = old_BHSD
        return new_BHSD

    def append(self, other: TreeLayer, like_BHSD: Tensor, sizes: tuple[int, int]) -> None:
        """Append the rows of another layer; each of the two may be empty so far."""
        heads, _, width = like_BHSD.shape[1:]
        found = []
        for name in ("keys", "values"):
            parts = []
            for layer, size in zip((self, other), sizes, strict=True):
                old = getattr(layer, name)
                if old is None:
                    old = like_BHSD.new_zeros(size, heads, 0, width)
                parts.append(self._enlarge(old))
            found.append(torch.cat(parts))
        self.keys, self.values = found
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the number of committed columns of the longest row."""
        # Layers that no pass reached (Mllama's for images) must report 0.
        return max(self.cache.lengths) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of a mask, and its offset."""
        return self.cache.width, 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited here."""
        return -1


class TreeCache(Cache):
    """The cache of a batch. `tokens[b]` are the committed tokens of row b.

    Buffers double up to `context` columns and a tail.
    """

    def __init__(self, *, batch: int, num_layers: int, context: int) -> None:
        self._trees = [TreeLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._trees))
        self.context = context
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.capacity = 0
        self.width = 0
        self._tail = _TAIL
        self._starts: list[int] = []
        self._columns_BN: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Return the number of committed columns of each row."""
        return [len(tokens) for tokens in self.tokens]

    def open(self, num_nodes: int, device: torch.device, *, after: int = 0) -> None:
        """Make room for a pass of `num_nodes` nodes per row and choose the columns it writes.

        `after` is the number of columns in the tail that earlier passes of the same tree wrote.
        """
        self._starts = [length + after for length in self.lengths]
        self.width = max(self._starts) + num_nodes
        if self.width > self.capacity:
            if self.width > self.context + self._tail:
                self._tail = max(2 * self._tail, self.width - self.context)
            doubled = max(_FIRST_COLUMNS, 2 * self.capacity, self.width)
            self.capacity = min(doubled, self.context + self._tail)
        self._columns_BN = None
        if len(set(self._starts)) > 1:
            starts_B1 = torch.tensor(self._starts, device=device)[:, None]
            self._columns_BN = starts_B1 + torch.arange(num_nodes, device=device)

    def write(self, buffer_BHSD: Tensor, rows_BHND: Tensor) -> None:
        """Write the pass's states into the columns chosen by `open`."""
        if self._columns_BN is None:
            start = self._starts[0]
            buffer_BHSD[:, :, start : start + rows_BHND.shape[2]] = rows_BHND
        else:
            index_BHND = self._columns_BN[:, None, :, None].expand_as(rows_BHND)
            buffer_BHSD.scatter_(2, index_BHND, rows_BHND)

    @torch.inference_mode()
    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]` (root first, ascending) of the pass just written.

        `tokens[b]` are all tokens of row b's tree. Columns already in place are not copied.
        """
        for row, path in enumerate(paths):
            start = len(self.tokens[row])
            moved = next((i for i, node in enumerate(path) if node != i), None)
            if moved is not None:
                into = slice(start + moved, start + len(path))
                source: Tensor | None = None
                for layer in self._trees:
                    if layer.keys is None or layer.values is None:
                        continue
                    if source is None:
                        source = start + torch.tensor(path[moved:], device=layer.keys.device)
                    layer.keys[row, :, into] = layer.keys[row, :, source]
                    layer.values[row, :, into] = layer.values[row, :, source]
            self.tokens[row].extend(tokens[row][node] for node in path)

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        del self.tokens[row][length:]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order."""
        self.tokens = [self.tokens[row] for row in rows]
        index: Tensor | None = None
        for layer in self._trees:
            if layer.keys is None or layer.values is None:
                continue
            if index is None:
                index = torch.tensor(list(rows), dtype=torch.long, device=layer.keys.device)
            layer.keys = layer.keys[index]
            layer.values = layer.values[index]

    @torch.inference_mode()
    def join(self, other: TreeCache) -> None:
        """Append the rows of another cache of the same model; lengths may differ."""
        self.capacity = max(self.capacity, other.capacity)
        for layer, joined in zip(self._trees, other._trees, strict=True):
            like = layer.keys if layer.keys is not None else joined.keys
            if like is not None:
                sizes = len(self.tokens), len(other.tokens)
                layer.append(joined, like, sizes)
        self.tokens += other.tokens

    def keep_prefix(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Keep the longest common prefix of each row with its new prompt; return the lengths.

        The last token of a prompt is never kept: it must pass through the model for its logits.
        """
        kept = []
        for row, prompt in enumerate(prompts):
            pairs = zip(self.tokens[row], prompt[:-1], strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.truncate(row, shared)
            kept.append(shared)
        return kept


class TextLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of whole texts; states of later passes are seen but not kept."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the keys and values of the texts."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values followed by these; store the first ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], 2)
        return keys, torch.cat([self.values, value_states], 2)

    def get_seq_length(self) -> int:
        """Return the length of the texts."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of a mask, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited here."""
        return -1


class TextCache(Cache):
    """Keys and values of whole texts, for extra rows that pass later.

    Nothing is written in place, so gradients can flow through later passes.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[TextLayer() for _ in range(num_layers)])  # type: ignore

    @property
    def length(self) -> int:
        """Return the length of the texts."""
        return self.get_seq_length()
