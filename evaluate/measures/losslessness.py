"""Losslessness: whether each drafter's greedy output is plain decoding's, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from spectool.evaluate.bench import Run
from spectool.evaluate.context import Context, Need
from spectool.evaluate.measures.base import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Identical:
    """Share of prompts, of the drafter with the fewest, whose output is plain decoding's.

    In float32 with exact activations it is 1; in other dtypes, or where products with packed
    weights round them to int8, near ties may be decided otherwise.
    """

    value: float
    prompts: int
    dtype: str
    activations: str
    drafters: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losslessness(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("prompts",)

    losslessness: Identical

    @classmethod
    def run(cls, context: Context) -> Self:
        run = context.decoding
        counts = {row.name: row.identical or 0 for row in run.drafters}
        return cls(
            losslessness=Identical(
                value=min(counts.values()) / run.prompts,
                prompts=run.prompts,
                dtype=run.dtype,
                activations=run.activations,
                drafters=counts,
            )
        )

    def lines(self) -> Iterator[str]:
        found = self.losslessness
        how = f"{found.dtype}, {found.activations} activations"
        for name, count in found.drafters.items():
            yield f"{name}: {count} of {found.prompts} outputs as plain decoding's ({how})"


def list_mismatches(run: Run) -> list[str]:
    """List the lossless drafters whose float32 output differs from plain decoding.

    With rounded activations near ties may be decided otherwise, as in other dtypes.
    """
    return [
        row.name
        for row in run.drafters
        if run.dtype == "float32"
        and run.activations == "exact"
        and row.lossless
        and row.identical is not None
        and row.identical < row.prompts
    ]
