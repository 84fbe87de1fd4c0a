"""Constants added to the logits of single tokens (the OpenAI protocol's `logit_bias`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectool.decode.control.base import Control
from spectool.errors import UsageError


class LogitBias(Control[None]):
    """Adds a constant to the logits of given token ids; -inf excludes a token. Has no state.

    Raises:
        UsageError: a bias that is no number or positive infinity, an id below 0.
    """

    def __init__(self, biases: Mapping[int, float]) -> None:
        for token, value in biases.items():
            if token < 0 or math.isnan(value) or value == math.inf:
                raise UsageError(
                    f"--logit-bias {token}={value}: expected a token id and a finite number or -inf"
                )
        self.ids = torch.tensor(list(biases), dtype=torch.long)
        self.values = torch.tensor(list(biases.values()), dtype=torch.float32)

    def start(self, tokens: Sequence[int]) -> None:
        return None

    def advance(self, state: None, token: int) -> None:
        return None

    def process(self, state: None, logits_V: Tensor) -> Tensor:
        # A draft model may have fewer tokens than the target.
        known = self.ids < len(logits_V)
        logits_V[self.ids[known].to(logits_V.device)] += self.values[known].to(logits_V)
        return logits_V


def parse_biases(items: Sequence[str], *, num_tokens: int) -> dict[int, float]:
    """Read `TOKEN=VALUE` items of `--logit-bias`; TOKEN is an id below `num_tokens`.

    Raises:
        UsageError: an item that is no such pair, an id twice or beyond the vocabulary.
    """
    found: dict[int, float] = {}
    for item in items:
        name, sign, value = item.partition("=")
        try:
            token, bias = int(name), float(value)
        except ValueError:
            sign = ""
        if not sign:
            raise UsageError(f"--logit-bias {item}: expected TOKEN=VALUE, an id and a number")
        if not 0 <= token < num_tokens:
            raise UsageError(
                f"--logit-bias {item}: token ids of this model run from 0 to {num_tokens - 1}"
            )
        if token in found:
            raise UsageError(f"--logit-bias {item}: token {token} has a bias already")
        found[token] = bias
    return found
