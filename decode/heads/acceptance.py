"""Acceptance head: from a draft model's states, will the target accept a drafted token?

SpecDec++ (Huang et al. 2024). The head reads the state [D] after the draft model's final norm at
the drafted token's own position, so the token has passed through the draft model:

    s_0 = state,  s_i = s_{i-1} + SiLU(W_i s_{i-1} + b_i),  z = U s_last + c

with two logits z, of rejection and acceptance.

It is trained with rejections weighted w times (`distill/objectives/acceptance.py`), whose optimum
for a token of acceptance a is softmax(z) = a / (a + w (1 - a)). The weight is undone, so that the
result is a probability: a = sigmoid(z_1 - z_0 + ln w). The authors use softmax(z) itself, under
which the same threshold h (0.3 in their example) ends chains earlier. A chain x_1, x_2, ... ends
with x_{j+1} for the first j where

    1 - a_1 a_2 ... a_j > h,

the predicted probability that one of these tokens is rejected. The pass that x_j is judged by also
gives q after it, so x_{j+1} costs no pass of the draft model; the authors end with x_j, and never
before the second token.

Why this changes no distribution, whatever the head says. Whether x_{i+1} is drawn is a function of
the text and x_1 .. x_{i-1} alone: it is decided before x_{i+1} is drawn. So where x_{i+1} is drawn
it follows q(. | x_1 .. x_i), its accept test with min(1, p/q) and the residual give p there, and
where it is not drawn the token after x_i is drawn from p. By induction along the chain every text
has the probability of plain decoding. Two things would break it: to drop a token because of what it
is, instead of those after it (it would then follow q on condition that it was kept), and to verify
with another q than it was drawn from. Neither is done: all drawn tokens stay in the chain. A
position's random number is used again where a token is discarded behind a rejected one and the
position is drafted anew; the committed text does not depend on that number so far, whatever the
head made of the discarded token, because the rejection came before it in the chain.

Source: arXiv:2405.19715, sections 3.2 and 3.3. Shapes: R tokens, D hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import options
from spectool.decode.heads.pair import load_pair_head, read_pair_record
from spectool.decode.target.base import Target
from spectool.options import option

METHOD = "acceptance"


class AcceptanceHead(nn.Module):
    """Head that predicts acceptance from states of the given width, in float32."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `acceptance`."""

        num_blocks: int = option(3, "residual blocks of the head", minimum=0, maximum=16)
        reject_weight: float = option(
            6.0, "weight of rejected tokens in the loss, 1 for accepted ones", minimum=0.01
        )
        data_share: float = option(
            0.15,
            "share of training positions that keep the text's token instead of a drafted one",
            minimum=0,
            maximum=0.95,
        )

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        blocks = [nn.Linear(width, width) for _ in range(config.num_blocks)]
        for block in blocks:
            # Blocks begin as the identity.
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(width, 2)

    def forward(self, state_RD: Tensor) -> Tensor:
        """Return logits [R, 2], of rejection and acceptance, as the weighted loss trains them."""
        hidden_RD = state_RD.float()
        for block in self.blocks:
            hidden_RD = hidden_RD + nn.functional.silu(block(hidden_RD))
        logits_R2: Tensor = self.out(hidden_RD)
        return logits_R2

    def probs(self, state_RD: Tensor) -> Tensor:
        """Return the predicted probabilities [R] that the target accepts."""
        logits_R2 = self(state_RD)
        odds_R: Tensor = logits_R2[:, 1] - logits_R2[:, 0] + math.log(self.config.reject_weight)
        return odds_R.sigmoid()


def open_acceptance(
    path: Path,
    *,
    draft: Target[Any],
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool,
    checksums: bool = True,
) -> AcceptanceHead:
    """Load the acceptance head of a directory, on the draft model's device.

    `allow_other_target` accepts one that was trained for other checkpoints of the same shape.

    Raises:
        CheckpointError: it is damaged, holds NaN, or was trained for another draft model or target.
        UsageError: the directory holds draft heads.
    """
    record = read_pair_record(
        path, METHOD, draft, target, tokenizer, allow_other_target=allow_other_target
    )
    head = AcceptanceHead(AcceptanceHead.Config.from_dict(record.options), draft.width)
    load_pair_head(head, path, record, draft.device, checksums=checksums)
    return head
