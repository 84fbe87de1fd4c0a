"""Distance from a reference on the same tokens, in the words of llama.cpp's perplexity tool.

Each figure is a mean over tokens, with its interval over the windows of the text, in which both
models are resampled together (`intervals.py`):

- perplexity ratio and difference (PPL ratio, delta PPL) of the model to the reference;
- KL(reference || model) per token, in nats, with percentiles, and the reverse KL;
- RMS of the change of the probability that the text's token has;
- the share of tokens where both have the same most likely token, and of the five likeliest;
- flips: where the most likely tokens differ, by how much the reference preferred its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from spectool.checkpoint.tensors import Checkpoint
from spectool.data.stored_log_probs import StoredLogProbs
from spectool.evaluate.context import Context, Need
from spectool.evaluate.fidelity import Scores
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures.base import Measure

_PERCENTILES = {"median": 0.5, "p99": 0.99, "p99_9": 0.999, "max": 1.0}
# The figures that a file without all log-probabilities may lack.
_PARTIAL = {
    "reverse_kl": "reverse KL",
    "top5_agreement": "top-5 agreement",
    "flips": "flips weighted by margin",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergences:
    """KL of a token: the mean with its interval, percentiles (nearest rank) and the largest."""

    value: float
    lower: float
    upper: float
    median: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence(Measure):
    """`kl_is_lower_bound`: the reference is a file without all log-probabilities.

    `not_measured`: the figures that it cannot give, which are None. `reference_error`: the largest
    error of its log-probabilities, of which all figures are, where it is a file of states.
    """

    needs: ClassVar[tuple[Need, ...]] = ("windows", "reference")

    reference: ReferenceModel
    perplexity_ratio: Interval
    perplexity_difference: Interval
    kl: Divergences
    kl_is_lower_bound: bool
    reference_error: float | None = None
    reverse_kl: Interval | None = None
    rms_delta_p: Interval
    top1_agreement: Interval
    top5_agreement: Interval | None = None
    flips: Interval | None = None
    not_measured: list[str]

    @classmethod
    def run(cls, context: Context) -> Self:
        scores, reference = context.scores, context.reference
        both, given = ("nll", "reference_nll"), scores.figures
        found = {
            "reverse_kl": scores.interval(["reverse_kl"]) if "reverse_kl" in given else None,
            "top5_agreement": scores.interval(["top5"]) if "top5" in given else None,
            "flips": scores.interval(["flip"]) if "flip" in given else None,
        }
        return cls(
            reference=ReferenceModel(perplexity=scores.reference_perplexity),
            perplexity_ratio=scores.interval(both, lambda ours, theirs: (ours - theirs).exp()),
            perplexity_difference=scores.interval(both, lambda o, t: o.exp() - t.exp()),
            kl=_divergences(scores),
            kl_is_lower_bound=isinstance(reference, StoredLogProbs) and not reference.is_complete,
            reference_error=_error_of(reference),
            rms_delta_p=scores.interval(["delta_p_squared"], Tensor.sqrt),
            top1_agreement=scores.interval(["same_top"]),
            **found,
            not_measured=[name for name, figure in found.items() if figure is None],
        )

    def lines(self) -> Iterator[str]:
        yield f"reference perplexity: {self.reference.perplexity:.4f}"
        if self.reference_error is not None:
            yield (
                "the reference is kept as states: its log-probabilities are off by at most "
                f"{self.reference_error:.1e}"
            )
        yield f"perplexity ratio: {self.perplexity_ratio:.4f}"
        yield f"perplexity difference: {self.perplexity_difference:.4f}"
        least = "at least " if self.kl_is_lower_bound else ""
        kl = self.kl
        yield (
            f"KL from the reference: {least}{Interval(kl.value, kl.lower, kl.upper):.3e} nats per "
            f"token; median {kl.median:.2e}, 99% {kl.p99:.2e}, 99.9% {kl.p99_9:.2e}, "
            f"max {kl.max:.2e}"
        )
        if self.reverse_kl is not None:
            yield f"reverse KL: {self.reverse_kl:.3e} nats per token"
        yield f"RMS change of p(token): {self.rms_delta_p:.3%}"
        yield f"same top token: {self.top1_agreement:.2%}"
        if self.top5_agreement is not None:
            yield f"same top five tokens: {self.top5_agreement:.2%}"
        if self.flips is not None:
            yield f"flips weighted by margin: {self.flips:.3%}"
        if self.not_measured:
            names = ", ".join(_PARTIAL[name] for name in self.not_measured)
            yield f"not in the reference's file: {names}"


def _error_of(reference: StoredLogProbs | Checkpoint | None) -> float | None:
    """Return the largest error of a reference's log-probabilities; None where there is none."""
    if isinstance(reference, StoredLogProbs) and reference.record.width:
        return reference.record.error
    return None


def _divergences(scores: Scores) -> Divergences:
    mean = scores.interval(["kl"])
    ordered_N = scores.figures["kl"].sort().values
    ranks = {name: math.ceil(share * len(ordered_N)) - 1 for name, share in _PERCENTILES.items()}
    return Divergences(
        value=mean.value,
        lower=mean.lower,
        upper=mean.upper,
        **{name: float(ordered_N[rank]) for name, rank in ranks.items()},
    )
