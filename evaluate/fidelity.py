"""One pass of a model, and of a reference, over the windows of a text.

Shapes: B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.data.stored_log_probs import StoredLogProbs, sum_kept_kl
from spectool.data.windows import Batch, Windows
from spectool.evaluate.log_probs import LogProbs
from spectool.report import SILENT, Reporter


@dataclass(slots=True)
class Scores:
    """Sums over scored tokens; the last three are of a reference, and 0 without one.

    `activations`: how the model's products with packed weights took them.
    """

    activations: str = "exact"
    num_tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    same_top: int = 0

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / self.num_tokens)

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_nll / self.num_tokens)


class LogProbsReference:
    """Reference that a model is compared with, whose log-probabilities are computed in this run."""

    def __init__(self, log_probs: LogProbs) -> None:
        self.log_probs = log_probs

    def compare(self, batch: Batch, logp_BLV: Tensor) -> tuple[float, float, int]:
        """Return the reference's summed -log p, the summed KL and the count of equal top tokens.

        Raises:
            NotFinite: the reference's log-probabilities are not finite.
        """
        ref_BLV = self.log_probs(batch).to(logp_BLV.device)
        nll = -float(_sum_next_tokens(ref_BLV, batch))
        if not math.isfinite(nll):
            raise self.log_probs.not_finite(batch, f"its perplexity is {nll}")
        same = int((ref_BLV.argmax(-1) == logp_BLV.argmax(-1)).sum())
        return nll, sum_kl(ref_BLV, logp_BLV), same


class StoredReference:
    """Reference that a model is compared with, whose log-probabilities are in a file."""

    def __init__(self, stored: StoredLogProbs) -> None:
        self.stored = stored

    def compare(self, batch: Batch, logp_BLV: Tensor) -> tuple[float, float, int]:
        """See `LogProbsReference.compare`.

        Raises:
            CheckpointError: the file holds values that are not finite.
        """
        model = logp_BLV.reshape(-1, logp_BLV.shape[-1]).cpu()
        ref = self.stored.read("logp", batch.group, batch.rows)
        following = batch.ids_BL[:, 1:].reshape(-1, 1)
        if self.stored.is_lossless:
            same = int((ref.argmax(-1) == model.argmax(-1)).sum())
            nll = -float(ref.gather(-1, following).sum(dtype=torch.float64))
            return nll, sum_kl(ref, model), same
        top = self.stored.read("top", batch.group, batch.rows).long()
        same = int((top[:, 0] == model.argmax(-1)).sum())
        chosen = self.stored.read("chosen", batch.group, batch.rows)
        nll = -float(chosen.sum(dtype=torch.float64))
        return nll, float(sum_kept_kl(ref, model, top)), same


def sum_kl(ref: Tensor, ours: Tensor) -> float:
    """Sum KL(reference || model) over log-probabilities [..., V]."""
    kl = torch.nn.functional.kl_div(ours, ref, reduction="sum", log_target=True)
    if not torch.isfinite(kl):
        # Terms with reference probability 0 are 0; computed as 0 * inf they would be NaN.
        p = ref.exp()
        kl = torch.where(p > 0, p * (ref - ours), 0.0).sum()
    return float(kl)


def score(
    windows: Windows,
    log_probs: LogProbs,
    vocabulary: int,
    *,
    reference: LogProbsReference | StoredReference | None = None,
    batch_size: int | None = None,
    sink: Callable[[Batch, Tensor], None] | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Run all windows once and sum the scores in double precision.

    `sink` is called with every batch and its log-probabilities [B, L - 1, V].

    Raises:
        NotFinite: a log-probability of the model or the reference is NaN, or a token of the text
            has probability 0.
    """
    scores = Scores()
    for batch in windows.batches(vocabulary, batch_size=batch_size):
        logp_BLV = log_probs(batch)
        nll = -float(_sum_next_tokens(logp_BLV, batch))
        if not math.isfinite(nll):
            raise log_probs.not_finite(batch, f"its perplexity is {nll}")
        if sink is not None:
            sink(batch, logp_BLV)
        scores.num_tokens += logp_BLV.shape[0] * logp_BLV.shape[1]
        scores.nll += nll
        if reference is not None:
            nll, kl, same = reference.compare(batch, logp_BLV)
            scores.reference_nll += nll
            scores.kl += kl
            scores.same_top += same
        reporter.progress(scores.num_tokens, windows.num_tokens, "tokens scored")
    return scores


def _sum_next_tokens(logp_BLV: Tensor, batch: Batch) -> Tensor:
    """Sum the log-probabilities of the text's next tokens."""
    next_BL = batch.ids_BL[:, 1:].to(logp_BLV.device)
    return logp_BLV.gather(-1, next_BL[..., None]).sum(dtype=torch.float64)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
