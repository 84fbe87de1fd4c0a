"""Penalties on tokens that stood before, as transformers computes them.

Source: Keskar et al., CTRL, 2019 (arXiv:1909.05858), section 4.1; transformers' logits processors,
whose results these equal to the bit (tests/decode/control/test_penalties.py). Suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.decode.control.base import Control

# Pairs that are kept as a path before they are merged into a table of their own.
_MOST_PENDING = 64


class RepetitionPenalty(Control[Tensor]):
    """Divides positive logits of tokens that stood before by `penalty`, multiplies negative ones.

    The state holds the ids of all tokens, in order.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def start(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(list(tokens), dtype=torch.long)

    def advance(self, state: Tensor, token: int) -> Tensor:
        return torch.cat([state, state.new_tensor([token])])

    def process(self, state: Tensor, logits_V: Tensor) -> Tensor:
        # A draft model may have fewer tokens than the target.
        ids = state[state < len(logits_V)].to(logits_V.device)
        scores = logits_V[ids]
        # A token that stood twice is written twice with the same value.
        logits_V[ids] = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return logits_V


@dataclass(frozen=True, slots=True)
class _Seen:
    """Tokens after each run of `size - 1` tokens; `pending` are not in `table` yet."""

    table: dict[tuple[int, ...], frozenset[int]]
    pending: tuple[tuple[tuple[int, ...], int], ...]
    recent: tuple[int, ...]


class NoRepeatNgram(Control[_Seen]):
    """Excludes tokens that would complete a run of `size` tokens a second time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def start(self, tokens: Sequence[int]) -> _Seen:
        state = _Seen({}, (), ())
        for token in tokens:
            state = self.advance(state, token)
        return state

    def advance(self, state: _Seen, token: int) -> _Seen:
        recent, pending, table = state.recent, state.pending, state.table
        if len(recent) == self.size - 1:
            pending = (*pending, (recent, token))
        if len(pending) > _MOST_PENDING:
            # A table of its own: other branches of the tree still read the old one.
            table, merged = dict(table), pending
            for run, after in merged:
                table[run] = table.get(run, frozenset()) | {after}
            pending = ()
        recent = (*recent, token)[-(self.size - 1) :] if self.size > 1 else ()
        return _Seen(table, pending, recent)

    def process(self, state: _Seen, logits_V: Tensor) -> Tensor:
        if len(state.recent) < self.size - 1:
            return logits_V
        excluded = set(state.table.get(state.recent, ()))
        excluded.update(token for run, token in state.pending if run == state.recent)
        if excluded:
            logits_V[[token for token in excluded if token < len(logits_V)]] = -torch.inf
        return logits_V
