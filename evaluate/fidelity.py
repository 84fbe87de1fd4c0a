"""One pass of a model, and of a reference, over the windows of a text.

Of each scored token a few numbers are kept, of which every metric is made: means with intervals
over windows, percentiles, and parts of the text. Log-probabilities are never kept.

Shapes: B windows, L tokens, V vocabulary, N scored tokens, R of a batch or a part of it, S windows
of the text, K figures or tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectool.data.stored_log_probs import StoredLogProbs, kept_kl
from spectool.data.windows import Batch, Windows
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.log_probs import LogProbs
from spectool.report import SILENT, Reporter

# Elements of log-probabilities that are compared at a time: 4 MB of float32 stay in the cache.
_ELEMENTS = 1 << 20
# Tokens of each side whose overlap is the top-5 agreement.
_TOP = 5

# The figures of a token, by name. With a reference that holds all log-probabilities:
#   nll, reference_nll   -log p of the text's token
#   kl, reverse_kl       KL(reference || model) and KL(model || reference), nats
#   delta_p_squared      square of the change of p(token) from the reference to the model
#   same_top             1 if both have the same most likely token
#   top5                 share of the reference's five likeliest tokens among the model's
#   flip                 where the most likely tokens differ: p(its own) - p(the model's), as the
#                        reference has them, which is what the other choice costs it; else 0
Figures = dict[str, Tensor]


class Scores:
    """The figures of all scored tokens, each a float32 [N] in the order of the windows.

    `activations`: how the model's products with packed weights took them.
    """

    def __init__(self, windows: Windows, figures: Figures, activations: str = "exact") -> None:
        self.windows, self.figures, self.activations = windows, figures, activations
        self.num_tokens = windows.num_tokens

    def mean(self, name: str) -> float:
        """Return the mean of a figure, summed in double precision."""
        return float(self.figures[name].double().mean())

    @property
    def perplexity(self) -> float:
        return exp(self.mean("nll"))

    @property
    def reference_perplexity(self) -> float:
        return exp(self.mean("reference_nll"))

    def interval(
        self, names: Sequence[str], statistic: Callable[..., Tensor] = lambda mean: mean
    ) -> Interval:
        """Return a function of the means of some figures, with its interval over windows.

        `statistic` takes the means [R] of each name. Windows are resampled whole, with the figures
        of both models. A text of one window has no interval: its ends are NaN.
        """
        counts_S = self.windows.counts()
        values_NK = torch.stack([self.figures[name] for name in names], 1).double()
        sums_SK = values_NK.new_zeros(len(counts_S), len(names))
        sums_SK.index_add_(0, torch.repeat_interleave(counts_S), values_NK)
        # Sums and counts, not tokens: thousands of resamples of windows, not of what is in them.
        columns_SK = torch.cat([sums_SK, counts_S[:, None].double()], 1)
        return bootstrap(
            columns_SK, lambda m_RK: statistic(*(m_RK[:, :-1] / m_RK[:, -1:]).unbind(1))
        )


class LogProbsReference:
    """Reference that a model is compared with, whose log-probabilities are computed in this run."""

    def __init__(self, log_probs: LogProbs) -> None:
        self.log_probs = log_probs

    def compare(self, batch: Batch, logp_BLV: Tensor) -> Figures:
        """Return the figures of a batch's scored tokens, see `Figures`.

        Raises:
            NotFinite: the reference's log-probabilities are not finite.
        """
        ref_BLV = self.log_probs(batch).to(logp_BLV.device)
        figures = _compare(ref_BLV.flatten(0, 1), logp_BLV.flatten(0, 1), batch.next_ids)
        nll = float(figures["reference_nll"].sum())
        if not math.isfinite(nll):
            raise self.log_probs.not_finite(batch, f"its perplexity is {nll}")
        return figures


class StoredReference:
    """Reference that a model is compared with, whose log-probabilities are in a file.

    With the K largest only, KL is a lower bound, and reverse KL and flips are not to be had; nor is
    the top-5 agreement of fewer than five.
    """

    def __init__(self, stored: StoredLogProbs) -> None:
        self.stored = stored

    def compare(self, batch: Batch, logp_BLV: Tensor) -> Figures:
        """See `LogProbsReference.compare`.

        Raises:
            CheckpointError: the file holds values that are not finite.
        """
        ours_RV = logp_BLV.flatten(0, 1).cpu()
        ref_RK = self.stored.read("logp", batch.group, batch.rows)
        if self.stored.is_complete:
            return _compare(ref_RK, ours_RV, batch.next_ids)
        kept_RK = self.stored.read("top", batch.group, batch.rows).long()
        chosen_R = self.stored.read("chosen", batch.group, batch.rows)
        return _compare_kept(ref_RK, kept_RK, chosen_R, ours_RV, batch.next_ids)


Reference = LogProbsReference | StoredReference


def score(
    windows: Windows,
    log_probs: LogProbs,
    vocabulary: int,
    *,
    reference: Reference | None = None,
    batch_size: int | None = None,
    sink: Callable[[Batch, Tensor], None] | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Run all windows once, and keep the figures of each scored token.

    `sink` is called with every batch and the log-probabilities [B, L, V] of its scored tokens.

    Raises:
        NotFinite: a log-probability of the model or the reference is NaN, or a token of the text
            has probability 0.
    """
    parts: list[Figures] = []
    num_tokens = 0
    for batch in windows.batches(vocabulary, batch_size=batch_size):
        logp_BLV = log_probs(batch)
        nll_R = -_pick(logp_BLV.flatten(0, 1), batch.next_ids)
        nll = float(nll_R.sum())
        if not math.isfinite(nll):
            raise log_probs.not_finite(batch, f"its perplexity is {nll}")
        if sink is not None:
            sink(batch, logp_BLV)
        figures = {} if reference is None else reference.compare(batch, logp_BLV)
        parts.append({"nll": nll_R.cpu(), **figures})
        num_tokens += len(nll_R)
        reporter.progress(num_tokens, windows.num_tokens, "tokens scored")
    return Scores(windows, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _compare(ref_RV: Tensor, ours_RV: Tensor, next_R: Tensor) -> Figures:
    """Return the figures of tokens whose log-probabilities are known to both."""
    parts = []
    for rows in _slices(*ours_RV.shape):
        ref, ours = ref_RV[rows], ours_RV[rows]
        p, q, difference = ref.exp(), ours.exp(), ref - ours
        top_RK, own_RK = _top(ref), _top(ours)
        flipped = top_RK[:, 0] != own_RK[:, 0]
        cost = _pick(p, top_RK[:, 0]) - _pick(p, own_RK[:, 0])
        parts.append(
            {
                **_shared(_pick(ref, next_R[rows]), ours, next_R[rows], top_RK, own_RK),
                "kl": _weighted(p, difference),
                "reverse_kl": -_weighted(q, difference),
                "flip": torch.where(flipped, cost, 0.0),
            }
        )
    return _join(parts)


def _compare_kept(
    ref_RK: Tensor, kept_RK: Tensor, chosen_R: Tensor, ours_RV: Tensor, next_R: Tensor
) -> Figures:
    """Return the figures of tokens of which the reference has the K likeliest and the text's."""
    parts = []
    for rows in _slices(*ours_RV.shape):
        ours, kept = ours_RV[rows], kept_RK[rows]
        parts.append(
            {
                **_shared(chosen_R[rows], ours, next_R[rows], kept, _top(ours)),
                "kl": kept_kl(ref_RK[rows], ours, kept),
            }
        )
    return _join(parts)


def _shared(
    chosen_R: Tensor, ours_RV: Tensor, next_R: Tensor, top_RK: Tensor, own_RK: Tensor
) -> Figures:
    """Return the figures that need of the reference its text's tokens and likeliest ones only."""
    figures = {
        "reference_nll": -chosen_R,
        "delta_p_squared": (_pick(ours_RV, next_R).exp() - chosen_R.exp()).square(),
        "same_top": (top_RK[:, 0] == own_RK[:, 0]).float(),
    }
    count = own_RK.shape[1]
    if top_RK.shape[1] >= count:
        found_RKK = top_RK[:, :count, None] == own_RK[:, None]
        figures["top5"] = found_RKK.sum((1, 2)) / count
    return figures


def _slices(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def _join(parts: Sequence[Figures]) -> Figures:
    return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}


def _pick(values_RV: Tensor, ids_R: Tensor) -> Tensor:
    return values_RV.gather(-1, ids_R.to(values_RV.device)[:, None])[:, 0]


def _top(logp_RV: Tensor) -> Tensor:
    """Return the likeliest tokens, most likely first; on a GPU `topk` alone orders ties freely."""
    return logp_RV.topk(min(_TOP, logp_RV.shape[-1]), -1).indices


def _weighted(p_RV: Tensor, difference_RV: Tensor) -> Tensor:
    """Sum differences of log-probabilities by probability; those of probability 0 count nothing."""
    sum_R = (p_RV * difference_RV).sum(-1)
    if not torch.isfinite(sum_R).all():
        # Computed as 0 * inf they would be NaN.
        sum_R = torch.where(p_RV > 0, p_RV * difference_RV, 0.0).sum(-1)
    return sum_R


def exp(value: float) -> float:
    """Return e to the power of `value`; infinity where that is no double."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
