"""Perplexity: exp of the mean of -log p(token) over the scored tokens of a text.

Besides, by the token's place in its window, and by how frequent the token is in the text: rare
tokens are where compression costs most. With a reference, the ratio to its perplexity beside each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from spectool.evaluate.context import Context, Need
from spectool.evaluate.fidelity import Scores, exp
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures.base import Measure

# The first places of a window, as one part; after them the parts double.
_FIRST_PLACES = 32
_DECILES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Perplexity of the tokens from place `first` to `last` of their windows, counted from 0."""

    first: int
    last: int
    tokens: int
    perplexity: float
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decile:
    """Perplexity of a tenth of the text's tokens, of the most frequent ones in decile 1.

    All occurrences of a token are in one decile, so that deciles are of unequal size and one may be
    missing. `least`, `most`: the occurrences of its rarest and of its most frequent token.
    """

    decile: int
    least: int
    most: int
    tokens: int
    perplexity: float
    ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPerplexity:
    """A perplexity with its interval, what it holds for, and its parts.

    `stride`: None where windows do not overlap. `activations`, `kv`:
    as the model computed with.
    """

    value: float
    lower: float
    upper: float
    tokens: int
    protocol: str
    window: int
    stride: int | None
    bos: bool
    activations: str
    kv: str
    by_position: list[Places]
    by_frequency: list[Decile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("windows",)

    perplexity: TextPerplexity

    @classmethod
    def run(cls, context: Context) -> Self:
        scores, windows = context.scores, context.windows
        found = scores.interval(["nll"], torch.exp)
        return cls(
            perplexity=TextPerplexity(
                value=scores.perplexity,
                lower=found.lower,
                upper=found.upper,
                tokens=scores.num_tokens,
                protocol=windows.protocol,
                window=windows.length,
                stride=windows.stride,
                bos=windows.bos is not None,
                activations=scores.activations,
                kv=context.load.kv,
                by_position=_by_position(scores),
                by_frequency=_by_frequency(scores),
            )
        )

    def lines(self) -> Iterator[str]:
        found = self.perplexity
        yield f"perplexity: {Interval(found.value, found.lower, found.upper):.4f}"
        alone = found.by_position[0].ratio is None
        what = "perplexity" if alone else "times the reference's perplexity"
        places = (f"{part.first}-{part.last}: {_shown(part)}" for part in found.by_position)
        yield f"{what} by place in the window: {', '.join(places)}"
        deciles = (f"{part.decile}: {_shown(part)}" for part in found.by_frequency)
        yield f"{what} by tenths of tokens, frequent ones first: {', '.join(deciles)}"


def _shown(part: Places | Decile) -> str:
    return f"{part.perplexity:.4g}" if part.ratio is None else f"{part.ratio:.3f}"


def _by_position(scores: Scores) -> list[Places]:
    place_N = scores.windows.positions()
    part_N = (place_N // _FIRST_PLACES).double().clamp(min=0.5).log2().floor().long() + 1
    return [
        Places(
            first=int(place_N[rows_N].min()),
            last=int(place_N[rows_N].max()),
            **_shared(scores, rows_N),
        )
        for rows_N in _parts(part_N)
    ]


def _by_frequency(scores: Scores) -> list[Decile]:
    token_N = scores.windows.tokens()
    count_V = torch.bincount(token_N)
    order_V = count_V.argsort(descending=True, stable=True)
    ordered_V = count_V[order_V].double()
    # A token belongs where the middle of its occurrences is.
    middle_V = (ordered_V.cumsum(0) - ordered_V / 2) / len(token_N)
    decile_V = torch.empty_like(count_V)
    decile_V[order_V] = (middle_V * _DECILES).long() + 1
    decile_N = decile_V[token_N]
    return [
        Decile(
            decile=int(decile_N[rows_N][0]),
            least=int(count_V[token_N[rows_N]].min()),
            most=int(count_V[token_N[rows_N]].max()),
            **_shared(scores, rows_N),
        )
        for rows_N in _parts(decile_N)
    ]


def _parts(part_N: Tensor) -> Iterator[Tensor]:
    """Yield which tokens belong to each part, in the parts' order."""
    return (part_N == part for part in sorted(set(part_N.tolist())))


def _shared(scores: Scores, rows_N: Tensor) -> dict[str, Any]:
    """Return the fields that parts of both kinds have."""
    nll = float(scores.figures["nll"][rows_N].double().mean())
    ratio = None
    if "reference_nll" in scores.figures:
        ratio = exp(nll - float(scores.figures["reference_nll"][rows_N].double().mean()))
    return {"tokens": int(rows_N.sum()), "perplexity": exp(nll), "ratio": ratio}
