"""Drift of a checkpoint's predictions on a text from those of its reference.

It needs no labels, and says how much changed, not whether for better or worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spectool.data.windows import Windows
from spectool.evaluate.fidelity import LogProbsReference, score
from spectool.evaluate.intervals import Interval
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.report import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Distance from the reference over the tokens of a text, with intervals over its windows.

    `kl`: mean of KL(reference || model) in nats, `kl_99` the value that 99% of the tokens stay
    below. `top1_agreement`: share of tokens with the same likeliest one.
    """

    tokens: int
    kl: Interval
    kl_99: float
    top1_agreement: Interval


def measure_drift(
    reference: ResidentLogProbs,
    model: ResidentLogProbs,
    windows: Windows,
    vocabulary: int,
    *,
    reporter: Reporter = SILENT,
) -> Drift:
    """Run both models over the windows, one at a time.

    Raises:
        NotFinite: one of them computes NaN.
    """
    scores = score(
        windows,
        model,
        vocabulary,
        reference=LogProbsReference(reference),
        batch_size=1,
        reporter=reporter,
    )
    return Drift(
        tokens=scores.num_tokens,
        kl=scores.interval(["kl"]),
        kl_99=float(torch.quantile(scores.figures["kl"].double(), 0.99)),
        top1_agreement=scores.interval(["same_top"]),
    )
