"""Perplexity: exp of the mean of -log p(token) over the scored tokens of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from spectool.evaluate.context import Context, Need
from spectool.evaluate.measures.base import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A perplexity, with the windows, activations and store of keys and values it holds for."""

    value: float
    tokens: int
    window: int
    bos: bool
    activations: str
    kv: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("windows",)

    perplexity: Protocol

    @classmethod
    def run(cls, context: Context) -> Self:
        return cls(
            perplexity=Protocol(
                value=context.scores.perplexity,
                tokens=context.scores.num_tokens,
                window=context.windows.length,
                bos=context.windows.bos is not None,
                activations=context.scores.activations,
                kv=context.load.kv,
            )
        )

    def lines(self) -> Iterator[str]:
        yield f"perplexity: {self.perplexity.value:.4f}"
