"""Scores of tasks, and what a checkpoint lost of its reference's, item by item.

`recovery` is the score divided by the reference's, or the inverse where lower is better; the one of
the whole run is that of the mean over tasks of each one's first metric among `acc_norm`, `acc` and
those where higher is better. Intervals resample items, those of both checkpoints together, within
each task (Efron, 1979); a share of right answers by itself has Wilson's. `lost` and `gained` count
the items that the reference alone and the checkpoint alone answers rightly, and `p` is McNemar's
(1947).

Shapes: N items, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from spectool.evaluate.context import Context, Need
from spectool.evaluate.intervals import Interval, bootstrap, bootstrap_within, mcnemar, share
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.results import number_names

# What stands in names of metrics for names that only the harness knows.
TASK, METRIC = "TASK", "METRIC"

# The aggregations of the harness, of means [R, K] over items.
_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda means_RK: means_RK[:, 0],
    "perplexity": lambda means_RK: torch.exp(-means_RK[:, 0]),
    "weighted_perplexity": lambda means_RK: torch.exp(-means_RK[:, 0] / means_RK[:, 1]),
    "bits_per_byte": lambda means_RK: -means_RK[:, 0] / means_RK[:, 1] / math.log(2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric of a task. A metric that is no mean over items has no interval."""

    items: int
    score: Interval
    reference: Interval | None = None
    difference: Interval | None = None
    recovery: Interval | None = None
    lost: int | None = None
    gained: int | None = None
    p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks(Measure):
    """`tasks`: scores by task and metric."""

    needs: ClassVar[tuple[Need, ...]] = ("tasks",)

    tasks: dict[str, dict[str, Score]]
    recovery: Interval | None = None

    @classmethod
    def run(cls, context: Context) -> Self:
        from spectool.evaluate.tasks.ask import ask

        assert context.tasks is not None
        draft = next(iter(context.options.draft), None)
        own = ask(context, context.checkpoint, kv=context.load.kv, draft=draft)
        theirs = ask(context, context.paired) if context.paired is not None else None
        scores: dict[str, dict[str, Score]] = {}
        means: dict[str, dict[str, Tensor]] = {}
        for task, metric, aggregation, higher in context.tasks.metrics():
            values = own.get(task, {}).get(metric)
            if values is None:
                continue
            reference = None if theirs is None else theirs[task][metric]
            by_metric = scores.setdefault(task, {})
            by_metric[metric] = compare(values, reference, aggregation, higher=higher)
            if theirs is not None and higher and aggregation.__name__ == "mean":
                means.setdefault(task, {})[metric] = _stack(values, theirs[task][metric])
        return cls(tasks=scores, recovery=recover(means) if means else None)

    @classmethod
    def metrics(cls, context: Context | None = None) -> list[str]:
        names = list(number_names(Score))
        if context is None:
            return [*(f"tasks.{TASK}.{METRIC}.{name}" for name in names), *number_names(cls)]
        assert context.tasks is not None
        paired = context.paired is not None
        return [
            f"tasks.{task}.{metric}.{name}"
            for task, metric, *_ in context.tasks.metrics()
            for name in names
            if paired or name.split(".")[0] in ("items", "score")
        ] + (list(number_names(cls)) if paired else [])

    def lines(self) -> Iterator[str]:
        for task, scores in self.tasks.items():
            for metric, found in scores.items():
                parts = [f"{task}, {metric}: {found.score} of {found.items} items"]
                if found.reference is not None:
                    parts.append(f"reference {found.reference.value:.4g}")
                    parts.append(f"difference {found.difference}, recovery {found.recovery}")
                if found.p is not None:
                    parts.append(f"{found.lost} lost and {found.gained} gained (p = {found.p:.2g})")
                yield "; ".join(parts)
        if self.recovery is not None:
            yield f"recovery, of the mean over tasks: {self.recovery}"


def compare(
    own: list[Any], reference: list[Any] | None, aggregation: Any, *, higher: bool
) -> Score:
    """Compare the values of items, numbers or pairs of them, under an aggregation of the harness.

    Statistics of means are resampled; any other aggregation gives values without an interval.
    """
    if aggregation.__name__ not in _STATISTICS:
        bare = [
            Interval(float(aggregation(values)), math.nan, math.nan)
            for values in (own, reference)
            if values is not None
        ]
        return Score(items=len(own), score=bare[0], reference=bare[1] if bare[1:] else None)
    statistic = _STATISTICS[aggregation.__name__]
    own_NK = _columns(own)
    yes_no = aggregation.__name__ == "mean" and all(value in (0, 1) for value in own)
    score = share(int(own_NK.sum()), len(own)) if yes_no else bootstrap(own_NK, statistic)
    if reference is None:
        return Score(items=len(own), score=score)
    width, their_NK = own_NK.shape[1], _columns(reference)
    both_NK = torch.cat([own_NK, their_NK], 1)
    lost = gained = p = None
    theirs = bootstrap(their_NK, statistic)
    if yes_no and all(value in (0, 1) for value in reference):
        theirs = share(int(their_NK.sum()), len(reference))
        lost = int((their_NK > own_NK).sum())
        gained = int((own_NK > their_NK).sum())
        p = mcnemar(lost, gained)

    def divide(means_RK: Tensor) -> Tensor:
        both = statistic(means_RK[:, :width]), statistic(means_RK[:, width:])
        return _divide(*(both if higher else reversed(both)))

    return Score(
        items=len(own),
        score=score,
        reference=theirs,
        difference=bootstrap(
            both_NK, lambda means: statistic(means[:, :width]) - statistic(means[:, width:])
        ),
        recovery=bootstrap(both_NK, divide),
        lost=lost,
        gained=gained,
        p=p,
    )


def _divide(one_R: Tensor, other_R: Tensor) -> Tensor:
    """Return quotients; 1 where both are equal, also where no answer of a resample is right."""
    return torch.where(one_R == other_R, 1.0, one_R / other_R)


def _columns(values: list[Any]) -> Tensor:
    """Return the values of items as columns [N, K]."""
    columns = torch.tensor(values, dtype=torch.float64)
    return columns[:, None] if columns.ndim == 1 else columns


def _stack(own: list[Any], reference: list[Any]) -> Tensor:
    return torch.cat([_columns(own), _columns(reference)], 1)


def recover(means: dict[str, dict[str, Tensor]]) -> Interval:
    """Return the mean score over tasks divided by the reference's."""
    chosen = [
        next((scores[name] for name in ("acc_norm", "acc") if name in scores), None)
        for scores in means.values()
    ]
    picked = [
        next(iter(scores.values())) if found is None else found
        for found, scores in zip(chosen, means.values(), strict=True)
    ]
    return bootstrap_within(picked, lambda means_RK: _divide(means_RK[:, 0], means_RK[:, 1]))
