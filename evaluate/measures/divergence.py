"""Distance from a reference on the same tokens.

KL = mean of KL(reference || model) in nats per token; top-1 agreement = share of positions where
both have the same most likely token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from spectool.data.stored_log_probs import StoredLogProbs
from spectool.evaluate.context import Context, Need
from spectool.evaluate.measures.base import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence(Measure):
    """`kl_is_lower_bound`: the reference is a file without all log-probabilities."""

    needs: ClassVar[tuple[Need, ...]] = ("windows", "reference")

    reference: ReferenceModel
    perplexity_ratio: float
    kl: float
    kl_is_lower_bound: bool
    top1_agreement: float

    @classmethod
    def run(cls, context: Context) -> Self:
        scores, reference = context.scores, context.reference
        return cls(
            reference=ReferenceModel(perplexity=scores.reference_perplexity),
            perplexity_ratio=scores.perplexity / scores.reference_perplexity,
            kl=scores.kl / scores.num_tokens,
            kl_is_lower_bound=isinstance(reference, StoredLogProbs) and not reference.is_lossless,
            top1_agreement=scores.same_top / scores.num_tokens,
        )

    def lines(self) -> Iterator[str]:
        yield f"reference perplexity: {self.reference.perplexity:.4f}"
        yield f"perplexity ratio: {self.perplexity_ratio:.4f}"
        least = "at least " if self.kl_is_lower_bound else ""
        yield f"KL from the reference: {least}{self.kl:.3e} nats per token"
        yield f"top-1 agreement: {self.top1_agreement:.2%}"
