"""Fit of a judge head: a logistic regression on states, and a threshold from a recall.

The states x of the substituted tokens of the training prompts are standardised. Classes are
balanced:

    min over w, b of  |w|^2 / 2 + C sum_r c_r log(1 + exp(-y_r (w x_r + b))),  c_r = R / (2 R_class)

for y_r = 1 if token r is important, else -1. C is the value of a grid whose head ranks the tokens
of the held-out prompts best (area under the ROC curve), by their loss among equals. The threshold
catches the share `recall` of the important tokens there, or more if that costs no unimportant one.
No prompt is on both sides.

Source: Garipov et al., AutoJudge, 2025 (arXiv:2504.20039), section 3. Shapes: R substitutions, D
width of both models' states together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.decode.heads.judge import METHOD, JudgeHead
from spectool.decode.sampling import not_finite_logits
from spectool.distill.data.substitutions import Labelled
from spectool.errors import TextError
from spectool.report import SILENT, Reporter, TrainingStep

# Values of C.
GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Shares of important tokens that the stored curve has thresholds for.
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)


def fit_head(
    training: Sequence[Labelled],
    held_out: Sequence[Labelled],
    config: JudgeHead.Config,
    reporter: Reporter = SILENT,
) -> tuple[JudgeHead, dict[str, Any]]:
    """Fit a head to labelled substitutions; return it and the figures of the held-out ones.

    Raises:
        TextError: a side lacks important or unimportant tokens.
        SpectoolError: states are NaN or infinite.
    """
    train_RD, train_R = _join(training, "training")
    held_RD, held_R = _join(held_out, "held-out")
    began = time.monotonic()
    best: tuple[float, float, float, JudgeHead] | None = None
    for number, strength in enumerate(GRID, 1):
        head, loss = fit(train_RD, train_R, strength)
        auc = rank(head(held_RD).detach(), held_R)
        missed = float(F.binary_cross_entropy_with_logits(head(held_RD), held_R.float()))
        if best is None or (auc, -missed) > best[:2]:
            best = auc, -missed, strength, head
        measured = {"score": auc, "auc": auc, "loss": missed}
        step = {
            "loss": loss,
            "C": strength,
            "tokens": len(train_R),
            "seconds": time.monotonic() - began,
        }
        reporter.event(TrainingStep(METHOD, number, len(GRID), step, measured))
    assert best is not None
    auc, _, strength, head = best
    with torch.no_grad():
        prob_R = head(held_RD).sigmoid()
    curve = [find_threshold(prob_R, held_R, recall) for recall in sorted({*RECALLS, config.recall})]
    chosen = next(point for point in curve if point["recall_wanted"] == config.recall)
    head.threshold = chosen["threshold"]
    figures = {
        "threshold": head.threshold,
        "C": strength,
        "auc": auc,
        "curve": curve,
        "substitutions": {
            name: {
                "prompts": len(side),
                "right": sum(each.is_right for each in side),
                "important": int(important_R.sum()),
                "unimportant": int((~important_R).sum()),
            }
            for name, side, important_R in (
                ("training", training, train_R),
                ("held_out", held_out, held_R),
            )
        },
    }
    return head, figures


def _join(labelled: Sequence[Labelled], side: str) -> tuple[Tensor, Tensor]:
    """Return the states [R, D] and labels [R] of all prompts of a side."""
    state_RD = torch.cat([each.state_RD for each in labelled])
    important_R = torch.cat([each.important_R for each in labelled])
    if not state_RD.isfinite().all():
        raise not_finite_logits("the model or its draft model")
    for name, count in (("changes", important_R.sum()), ("keeps", (~important_R).sum())):
        if not count:
            raise TextError(
                f"none of the draft model's {len(important_R)} different tokens {name} the answer "
                f"of a {side} prompt, so nothing can be learnt",
                hint="more or other prompts, or another --answer",
            )
    return state_RD, important_R


def fit(state_RD: Tensor, important_R: Tensor, strength: float) -> tuple[JudgeHead, float]:
    """Minimise the objective of the module's docstring for C = `strength`, in float64.

    Returns the head and the mean weighted loss, without the penalty.
    """
    state_RD, important_R = state_RD.double(), important_R.double()
    mean_D, std_D = state_RD.mean(0), state_RD.std(0, correction=0)
    # A number that never changes tells nothing.
    std_D = torch.where(std_D > 0, std_D, 1.0)
    x_RD = (state_RD - mean_D) / std_D
    size, positive = len(important_R), float(important_R.sum())
    weight_R = torch.where(important_R > 0, size / (2 * positive), size / (2 * (size - positive)))
    w_D = torch.zeros(x_RD.shape[1], dtype=torch.float64, requires_grad=True)
    b_1 = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w_D, b_1],
        max_iter=2000,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss_of() -> Tensor:
        return F.binary_cross_entropy_with_logits(x_RD @ w_D + b_1, important_R, weight_R)

    def closure() -> Tensor:
        solver.zero_grad()
        # Divided by C and the number of tokens, so that the scale does not depend on them.
        value = loss_of() + w_D.square().sum() / (2 * strength * size)
        torch.autograd.backward(value)
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    head = JudgeHead(len(w_D)).requires_grad_(False)
    head.judge.weight.copy_(w_D.detach())
    head.judge.bias.copy_(b_1.detach())
    head.mean.copy_(mean_D)
    head.std.copy_(std_D)
    return head, float(loss_of().detach())


def rank(score_R: Tensor, important_R: Tensor) -> float:
    """Return the area under the ROC curve: how often an important token scores above another.

    Equal scores count half.
    """
    above = score_R[important_R].double()
    below = score_R[~important_R].double().sort().values
    lower = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
    return float(lower.sum()) / (2 * len(above) * len(below))


def find_threshold(prob_R: Tensor, important_R: Tensor, recall: float) -> dict[str, float]:
    """Return a threshold that catches a share of the important tokens, and what it does.

    A token is caught if its probability is not below the threshold. Of the thresholds that catch
    enough it is one of those that accept most unimportant tokens, halfway between the highest of
    these and the next important token; 0 where none accepts any.
    `recall`: the share caught; `accepted`: the share of the unimportant tokens that are accepted.
    """
    falling = prob_R[important_R].sort(descending=True).values
    count = math.ceil(recall * len(falling) - 1e-9)
    # Nothing is to be caught: all is accepted.
    highest = float(falling[count - 1]) if count else 1.0
    accepted = prob_R[~important_R][prob_R[~important_R] < highest]
    threshold = 0.0
    if len(accepted):
        above = falling[falling > accepted.max()]
        threshold = (float(accepted.max()) + (float(above[-1]) if len(above) else 1.0)) / 2
    return {
        "recall_wanted": recall,
        "threshold": threshold,
        "recall": float((falling >= threshold).float().mean()),
        "accepted": float((prob_R[~important_R] < threshold).float().mean()),
    }
