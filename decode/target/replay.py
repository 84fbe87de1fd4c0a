"""The cache of models whose state cannot go back to an earlier token: copies of it, and replay.

A row has a transformers cache of its own: the state after its first `held` tokens, all of them
committed. A draft passes through a copy. Where all of it is accepted, the copy becomes the state;
else the accepted tokens pass once more at the head of the next pass, which costs rows but no
forward. A lone root needs no copy, as it is sure to be committed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from spectool.decode.cache import BatchCache


@dataclass(slots=True)
class _State:
    """A row's `cache` after `held` tokens; `trial` is the one that the last pass went through.

    `careful`: a pass was not committed, so the next passes go through copies, whatever they feed.
    """

    cache: DynamicCache
    held: int = 0
    trial: DynamicCache | None = None
    careful: bool = False


class ReplayCache(BatchCache):
    """A cache that replays row b's committed tokens past those that its state holds."""

    def __init__(self, *, batch: int, context: int, config: PreTrainedConfig) -> None:
        super().__init__(batch=batch, context=context)
        self._config = config
        self._states = [_State(self._empty()) for _ in range(batch)]

    def _empty(self) -> DynamicCache:
        """Return an empty cache of transformers."""
        return DynamicCache(config=self._config)

    def num_to_replay(self, row: int) -> int:
        """Return how many committed tokens the row's next pass must read again."""
        return len(self.tokens[row]) - self._states[row].held

    def restart_if_ahead(self, row: int) -> DynamicCache | None:
        """Replace a state that went ahead of the committed tokens by an empty one, and return it.

        All the row's tokens must pass through it. Returns None if the state is not ahead.
        """
        state = self._states[row]
        if state.trial is not state.cache:
            return None
        self._states[row] = _State(self._empty(), held=len(self.tokens[row]), careful=True)
        return self._states[row].cache

    def begin_pass(self, row: int, *, certain: bool) -> DynamicCache:
        """Return the cache for the row's next pass: its state if `certain`, else a copy."""
        state = self._states[row]
        state.trial = state.cache if certain and not state.careful else _copy_cache(state.cache)
        return state.trial

    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]` of the chains just passed; keep their state if all are."""
        for row, path in enumerate(paths):
            state = self._states[row]
            if not path:
                continue
            assert state.trial is not None and list(path) == list(range(len(path)))
            self.tokens[row].extend(tokens[row][: len(path)])
            if len(path) == len(tokens[row]):
                state.cache, state.held = state.trial, len(self.tokens[row])
            elif state.trial is state.cache:
                self._states[row] = _State(self._empty())
            self._states[row].trial = None

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens; if the state held more, start it over."""
        super().truncate(row, length)
        if self._states[row].held > length:
            self._states[row] = _State(self._empty())

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in ascending order."""
        super().select(rows)
        self._states = [self._states[row] for row in rows]

    def join(self, other: Self) -> None:
        """Append the rows of another cache."""
        super().join(other)
        self._states += other._states


def _copy_cache(cache: DynamicCache) -> DynamicCache:
    """Copy a cache as far as passes write in place.

    Recurrent and convolution states, in dicts, are written in place; keys and values never.
    """
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, dict):
                copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
                setattr(layer, name, copied)
    return made
