"""From logits to probabilities, and from probabilities to tokens: warping, seeds, draws.

Suffixes: B batch, N nodes, V vocabulary, M a subset of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spectool.decode.control.base import Control
from spectool.decode.control.penalties import NoRepeatNgram, RepetitionPenalty
from spectool.errors import NotFinite, UsageError

# Purposes of random numbers. Each (request, position, purpose, draw) has its own number, so neither
# the other requests of a batch nor the shape of earlier drafts change it.
_PURPOSES = {"token": 1, "accept": 2, "draft": 3}
_MASK = (1 << 64) - 1
# Beyond these temperatures the probabilities are one-hot or flat to the last bit of fp32; quotients
# become NaN only further out.
_COLDEST, _HOTTEST = 1e-30, 1e30


class SamplingOptions(TypedDict, total=False):
    """The options of `SamplingParams`, as keyword arguments of functions that make one."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The logits processors before the verifier, in transformers' order.

    Temperature 0 means greedy; the filters `top_k`, `top_p` and `min_p` then change nothing. These
    values turn an option off: `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1,
    `no_repeat_ngram_size` 0.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    warpers: tuple[LogitsProcessor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature {self.temperature}: expected 0 or a positive number")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: expected 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: expected a number above 0, up to 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p}: expected a number from 0 (off) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(
                f"--repetition-penalty {self.repetition_penalty}: expected a positive number (1: "
                "off)"
            )
        if self.no_repeat_ngram_size < 0:
            raise UsageError(
                f"--no-repeat-ngram-size {self.no_repeat_ngram_size}: expected 0 (off) or a "
                "positive number"
            )
        warpers: list[LogitsProcessor] = []
        if self.temperature not in (0.0, 1.0):
            bounded = min(max(float(self.temperature), _COLDEST), _HOTTEST)
            warpers.append(TemperatureLogitsWarper(bounded))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            warpers.append(MinPLogitsWarper(self.min_p))
        object.__setattr__(self, "warpers", tuple(warpers))

    @property
    def greedy(self) -> bool:
        """Return whether decoding is greedy."""
        return self.temperature == 0

    def controls(self) -> list[Control[Any]]:
        """Return the penalties as controls, in transformers' order."""
        found: list[Control[Any]] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenalty(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            found.append(NoRepeatNgram(self.no_repeat_ngram_size))
        return found

    def probs(self, logits_BNV: Tensor) -> Tensor:
        """Return the probabilities of the token after each node, fp32 [B, N, V].

        `logits_BNV` are what the request's controls left of the model's. When greedy they are
        returned as they are: one-hot rows would cost a vocabulary a node and say no more.
        """
        if self.greedy:
            return logits_BNV
        scores_NV = logits_BNV.flatten(0, 1).float()
        if self.temperature != 1:
            # With 0 as the largest score no quotient overflows upwards, however cold it gets.
            scores_NV = scores_NV - scores_NV.amax(-1, keepdim=True)
        for warper in self.warpers:
            # None of the four reads the token ids.
            scores_NV = warper(cast(torch.LongTensor, None), cast(torch.FloatTensor, scores_NV))
        return scores_NV.softmax(-1).view(logits_BNV.shape)


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
