"""The interface of a method that fits a model's lm_head on text (`--lm-head`).

Shapes: V vocabulary, D width, T tokens of text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectool.quantize.base import PackedFields, Quantizer, Tick


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """An lm_head and the text to fit it on.

    `weight_VD` and `bias_V` are the original's, in float32 on the device to compute on; `finish`
    maps its products to the model's logits. `states_TD` are its inputs, on the host; `counts_V`
    counts the text's tokens; `special` tokens are those of the model's configuration.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    finish: Callable[[Tensor], Tensor]
    states_TD: Tensor
    counts_V: Tensor
    special: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHeadReport:
    """Metrics of a fitted lm_head: held-out KL from the original before and after, the best epoch.

    `nats_within_codes` is H(token | code) of the text, `codes_used` their mean number by codebook;
    None for methods without shared codes.
    """

    loss_start: float
    loss_after: float
    best_epoch: int
    nats_within_codes: float | None = None
    codes_used: float | None = None


@dataclass(frozen=True, slots=True)
class FittedLmHead:
    """Fields of a fitted lm_head, its bias [V] and its metrics."""

    fields: PackedFields
    bias_V: Tensor
    report: LmHeadReport


class LmHeadQuantizer(Quantizer):
    """Quantizer that can fit an lm_head, with a bias, on text; others it packs by `pack`."""

    def find_lm_head_misfit(self, shape: tuple[int, int], num_special: int) -> str:
        """Return why an lm_head with so many special tokens cannot be fitted; empty if it can."""
        return self.find_misfit(shape)

    @abstractmethod
    def fit_lm_head_bytes(self, shape: tuple[int, int]) -> int:
        """Estimate the bytes of fitting an lm_head of this shape, without its text."""

    @abstractmethod
    def fit_lm_head(self, lm_head: LmHead, generator: torch.Generator, tick: Tick) -> FittedLmHead:
        """Fit an lm_head."""


def special_tokens(config: Any, vocabulary: int) -> tuple[int, ...]:
    """Return the start, end and padding tokens of a model's configuration."""
    tokens: list[int] = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config.get_text_config(), key, None)
        tokens += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return tuple(token for token in dict.fromkeys(tokens) if 0 <= token < vocabulary)
