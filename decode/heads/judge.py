"""Judge head: from the states of a draft model and its target, does a token change the answer?

Judge decoding (Bachmann et al. 2025) accepts drafted tokens that the target would not have chosen,
if they leave the quality of the reply as it is; AutoJudge (Garipov et al. 2025) finds them by the
final answer. The head reads, at the drafted token's own position, the state [D1] after the draft
model's final norm and the state [D2] after the target's, which the verifying pass computes anyway:

    x = (concat(state1, state2) - mean) / std,  p = sigmoid(w x + b)

p is the predicted probability that the token is important: that with it the target comes to another
answer. A drafted token is accepted if the verifier accepts it or p < threshold; the longest prefix
of accepted tokens is committed, then one token of the verifier. So threshold 0 is the verifier
alone, and where all drafted tokens agree with the target nothing changes. Everything else is
lossy: the text is not the target's, and neither is its distribution.

`distill/train_judge.py` trains it. The last token of a chain costs a pass of the draft model
more, for its state.

Source: arXiv:2501.19309, sections 3 and 4; arXiv:2504.20039, section 3. Shapes: R tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import options
from spectool.checkpoint.headers import HEADS
from spectool.decode.heads.pair import load_pair_head, read_pair_record
from spectool.decode.target.base import Target
from spectool.errors import CheckpointError
from spectool.options import option

METHOD = "judge"


class JudgeHead(nn.Module):
    """Linear head over the states of both models, `width` numbers in all, in float32."""

    mean: Tensor
    std: Tensor

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `judge`."""

        recall: float = option(
            0.9, "share of important tokens that the threshold is to catch", minimum=0, maximum=1
        )

    def __init__(self, width: int, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.judge = nn.Linear(width, 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, state_RD: Tensor) -> Tensor:
        """Return logits [R] of importance from concatenated states."""
        logits_R: Tensor = self.judge((state_RD.float() - self.mean) / self.std)[..., 0]
        return logits_R

    def probs(self, draft_RD: Tensor, target_RD: Tensor) -> Tensor:
        """Return the predicted probabilities [R] that tokens are important."""
        prob_R: Tensor = self(torch.cat([draft_RD.float(), target_RD.float()], -1)).sigmoid()
        return prob_R


def open_judge(
    path: Path,
    *,
    draft: Target[Any],
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool,
    checksums: bool = True,
) -> JudgeHead:
    """Load the judge head of a directory, on the target's device.

    `allow_other_target` accepts one that was trained for other checkpoints of the same shape.

    Raises:
        CheckpointError: it is damaged, holds NaN, or was trained for another draft model or target.
        UsageError: the directory holds other heads.
    """
    record = read_pair_record(
        path, METHOD, draft, target, tokenizer, allow_other_target=allow_other_target
    )
    training: Any = record.training
    threshold = training.get("threshold") if isinstance(training, dict) else None
    if not isinstance(threshold, float) or not 0 <= threshold <= 1:
        raise CheckpointError(f"{path / HEADS}: its threshold is {threshold}, expected 0 to 1")
    head = JudgeHead(draft.width + target.width, threshold)
    load_pair_head(head, path, record, target.device, checksums=checksums)
    return head
