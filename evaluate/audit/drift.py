"""How far a checkpoint's predictions on a text moved from those of its reference.

It says how much changed, not whether for better or worse.

Shapes: L tokens of a window, V vocabulary, R positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.data.windows import Windows
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.report import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Distance from the reference over the positions of a text; windows are resampled as one.

    `kl`: mean of KL(reference || model) in nats, `kl_99` the value that 99% of the positions stay
    below. `top1_agreement`: share of positions with the same likeliest token. `right_to_wrong`:
    share of those where only the reference's likeliest token is the text's, and the reverse.
    """

    tokens: int
    kl: Interval
    kl_99: float
    top1_agreement: Interval
    right_to_wrong: Interval
    wrong_to_right: Interval


def measure_drift(
    reference: ResidentLogProbs,
    model: ResidentLogProbs,
    windows: Windows,
    vocabulary: int,
    *,
    reporter: Reporter = SILENT,
) -> Drift:
    """Run both models over the windows, one window at a time.

    Raises:
        NotFinite: one of them computes NaN.
    """
    parts: list[Tensor] = []
    clusters: list[Tensor] = []
    for index, batch in enumerate(windows.batches(vocabulary, batch_size=1)):
        ref_LV, ours_LV = reference(batch)[0], model(batch)[0]
        following_L = batch.ids_BL[0, 1:].to(ours_LV.device)
        # Where the reference has probability 0 the term is 0; as 0 * inf it would be NaN.
        terms_LV = torch.where(ref_LV > -torch.inf, ref_LV.exp() * (ref_LV - ours_LV), 0.0)
        kl_L = terms_LV.sum(-1, dtype=torch.float64)
        for each, logp_LV in ((reference, ref_LV), (model, ours_LV)):
            if logp_LV.isnan().any():
                raise each.not_finite(batch, "cannot be audited")
        tops = ref_LV.argmax(-1), ours_LV.argmax(-1)
        was_L, is_L = (top_L == following_L for top_L in tops)
        columns = (kl_L, tops[0] == tops[1], was_L & ~is_L, ~was_L & is_L)
        parts.append(torch.stack([column.double().cpu() for column in columns], -1))
        clusters.append(torch.full((len(kl_L),), index))
        reporter.progress(index + 1, sum(map(len, windows.groups)), "windows compared")
    values_RK, clusters_R = torch.cat(parts), torch.cat(clusters)
    kl, same, lost, gained = (
        bootstrap(values_R1, lambda means_R1: means_R1[:, 0], clusters_N=clusters_R)
        for values_R1 in torch.split(values_RK, 1, 1)
    )
    return Drift(
        tokens=len(values_RK),
        kl=kl,
        kl_99=float(torch.quantile(values_RK[:, 0], 0.99)),
        top1_agreement=same,
        right_to_wrong=lost,
        wrong_to_right=gained,
    )
