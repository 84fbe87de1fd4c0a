"""Speed of decoding with each drafter, next to plain decoding in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from spectool.evaluate.bench import Row
from spectool.evaluate.context import Context, Need
from spectool.evaluate.measures.base import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """`value`: the largest speed-up of a drafter over plain decoding."""

    value: float
    tokens_per_second: float
    drafters: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("prompts",)

    speed: Speeds

    @classmethod
    def run(cls, context: Context) -> Self:
        run = context.decoding
        return cls(
            speed=Speeds(
                value=max(row.speedup for row in run.drafters),
                tokens_per_second=run.baseline.tokens_per_second,
                drafters=run.drafters,
            )
        )

    def lines(self) -> Iterator[str]:
        yield f"plain decoding: {self.speed.tokens_per_second:.1f} tok/s"
        for row in self.speed.drafters:
            yield (
                f"{row.name}: {row.tokens_per_second:.1f} tok/s, {row.speedup:.2f} times plain "
                f"decoding, {row.tokens_per_forward:.2f} tokens per forward"
            )
