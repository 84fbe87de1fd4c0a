"""From logits to probabilities, and from probabilities to tokens: warping, seeds, draws.

Suffixes: B batch, N nodes, V vocabulary, M a subset of nodes, F nodes to expand, C chosen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectool.decode.options import SamplingParams
from spectool.errors import NotFinite

# Purposes of random numbers. Each (request, position, purpose, draw) has its own number, so neither
# the other requests of a batch nor the shape of earlier drafts change it.
_PURPOSES = {"token": 1, "accept": 2, "draft": 3}
_MASK = (1 << 64) - 1


def probs_by_row(samplings: Sequence[SamplingParams], logits_BNV: Tensor) -> list[Tensor]:
    """Return each row's `SamplingParams.probs` [N, V]."""
    if len(set(samplings)) == 1:
        return list(samplings[0].probs(logits_BNV))
    rows = torch.split(logits_BNV, 1)
    return [each.probs(row_1NV)[0] for each, row_1NV in zip(samplings, rows, strict=True)]


class Draws:
    """The random numbers of one request.

    Each is a function of (seed, request, position, purpose, draw).
    """

    def __init__(self, seed: int, request: int) -> None:
        self._key = _mix(_mix(seed & _MASK) ^ (request & _MASK))

    def uniform(self, position: int, purpose: str, draw: int = 0) -> float:
        """Return a number in [0, 1) with 53 random bits.

        `draw` numbers the draws for one purpose.
        """
        return (self._number(position, purpose, draw) >> 11) / (1 << 53)

    def gumbel(self, position: int, draw: int, size: int) -> Tensor:
        """Return standard Gumbel noise for drafting, fp64 [size], on the host."""
        # torch's generator keeps the low 32 bits of a seed.
        seed = self._number(position, "draft", draw) & 0xFFFFFFFF
        generator = torch.Generator().manual_seed(seed)
        return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log()

    def _number(self, position: int, purpose: str, draw: int) -> int:
        """Return 64 random bits."""
        key = _mix(self._key ^ _mix(position * len(_PURPOSES) + _PURPOSES[purpose]))
        return _mix(key + draw)


class StepRandom(Protocol):
    """The source of randomness of a verifier: a number per depth, and for tests per depth and draw.

    Sharing numbers within a depth is exact, because only one node of a depth lies on the accepted
    path; siblings are tested one after another, so each has its own.
    """

    def pick(self, probs_MV: Tensor, depths: Sequence[int]) -> Tensor:
        """Draw token ids [M] from the probabilities after nodes of these depths."""

    def below(self, p_M: Tensor, q_M: Tensor, depths: Sequence[int], draw: int = 0) -> Tensor:
        """Return bools [M] for nodes of these depths, true with probability min(1, p/q).

        `draw` counts the siblings that were tested before.
        """


@dataclass(frozen=True, slots=True)
class StepDraws:
    """The draws of a request in the step whose root is the token at `position`."""

    draws: Draws
    position: int

    def pick(self, probs_MV: Tensor, depths: Sequence[int]) -> Tensor:
        numbers_M = self._numbers([depth + 1 for depth in depths], "token", 0, probs_MV.device)
        return pick(probs_MV, numbers_M)

    def below(self, p_M: Tensor, q_M: Tensor, depths: Sequence[int], draw: int = 0) -> Tensor:
        # u q < p instead of u < p / q: 0/0 cannot arise.
        return self._numbers(depths, "accept", draw, p_M.device) * q_M.double() < p_M.double()

    def _numbers(
        self, ahead: Sequence[int], purpose: str, draw: int, device: torch.device
    ) -> Tensor:
        drawn = {n: self.draws.uniform(self.position + n, purpose, draw) for n in set(ahead)}
        return torch.tensor([drawn[n] for n in ahead], dtype=torch.float64, device=device)


def pick(probs_MV: Tensor, uniform_M: Tensor) -> Tensor:
    """Draw token ids [M] by inverting each row's cumulative sum.

    No token of probability 0 is ever drawn.
    """
    cumulative_MV = probs_MV.double().cumsum(-1)
    threshold_M1 = uniform_M[:, None] * cumulative_MV[:, -1:]
    index_M1 = torch.searchsorted(cumulative_MV, threshold_M1, right=True)
    return index_M1[:, 0].clamp_(max=probs_MV.shape[-1] - 1)


def is_finite(logits: Tensor) -> Tensor:
    """Return whether all logits define probabilities, as a scalar tensor.

    No row may have NaN or positive infinity, and each needs a finite value.
    """
    return logits.amax(-1).isfinite().all()


def not_finite_logits(whose: str) -> NotFinite:
    """Make the error for logits that are not `is_finite`."""
    return NotFinite(
        f"{whose} gave logits that are NaN or infinite: its weights are damaged, or its dtype "
        "overflows",
        hint="try --dtype float32; if that fails too, the checkpoint is broken",
    )


def _mix(value: int) -> int:
    """Apply the finalizer of splitmix64: 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def take_top(scores_FV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` best tokens of each node, without those of score -inf, and their nodes."""
    best = scores_FV.topk(min(count, scores_FV.shape[1]))
    real_FC = best.values > -torch.inf
    return best.indices[real_FC], real_FC.nonzero()[:, 0]
