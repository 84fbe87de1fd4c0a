"""Intervals of figures, and tests of differences between two checkpoints on the same items.

Items of two checkpoints are resampled together, so that what makes an item hard for both cancels:
an interval of a difference is far narrower than the difference of two intervals. Items that belong
together (tokens of a window, variants of a question) form a cluster and are resampled as one.

Shapes: N items, K columns of figures, C clusters, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Standard normal quantile of a two-sided interval of 95%.
_Z = 1.959963984540054
# Draws of one batch of resamples: 32 MB.
_DRAWS = 1 << 22


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its interval of 95%. A gate compares `value`, or `.lower` and `.upper`."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Write the value, and the interval if there is one, all by one format of numbers; by
        default with four digits."""
        spec = spec or ".4g"
        value = format(self.value, spec)
        if math.isnan(self.lower):
            return value
        return f"{value} [{format(self.lower, spec)}, {format(self.upper, spec)}]"


def bootstrap(
    values_NK: Tensor,
    statistic: Callable[[Tensor], Tensor] = lambda means_RK: means_RK[:, 0],
    *,
    clusters_N: Tensor | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic of the columns' means, with its percentile interval (Efron, 1979).

    `statistic` maps means [R, K] to [R]. `clusters_N` gives the cluster of each item as an integer
    from 0 on; without it each item is its own. One cluster shows no spread: its interval is NaN,
    which holds no gate. The result depends on the seed alone, not on the device or on threads.
    """
    values_NK = values_NK.detach().cpu().double()
    ones_N = torch.ones(len(values_NK), dtype=torch.float64)
    if clusters_N is None:
        sums_CK, sizes_C = values_NK, ones_N
    else:
        clusters_N = clusters_N.cpu().long()
        count = int(clusters_N.max()) + 1
        sums_CK = values_NK.new_zeros(count, values_NK.shape[1]).index_add(0, clusters_N, values_NK)
        sizes_C = ones_N.new_zeros(count).index_add(0, clusters_N, ones_N)
    drawn_R = statistic(_resample(sums_CK, sizes_C, resamples, torch.Generator().manual_seed(seed)))
    value = float(statistic((sums_CK.sum(0) / sizes_C.sum())[None]))
    return _cut_ends(value, drawn_R, known=len(sums_CK) > 1)


def bootstrap_within(
    groups: Sequence[Tensor],
    statistic: Callable[[Tensor], Tensor],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a statistic of the mean over groups of their columns' means, with its interval.

    `groups` are the values [N, K] of each group's items, which are resampled within it: each group
    weighs the same in every resample, whatever its number of items. A group of one item shows no
    spread, so that the interval is NaN. See `bootstrap`.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [values_NK.detach().cpu().double() for values_NK in groups]
    drawn = [_resample(each, each.new_ones(len(each)), resamples, generator) for each in columns]
    value = float(statistic(torch.stack([each.mean(0) for each in columns]).mean(0)[None]))
    drawn_R = statistic(torch.stack(drawn).mean(0))
    return _cut_ends(value, drawn_R, known=all(len(each) > 1 for each in columns))


def _resample(
    sums_CK: Tensor, sizes_C: Tensor, resamples: int, generator: torch.Generator
) -> Tensor:
    """Return the means [R, K] of resamples of clusters with these sums and numbers of items."""
    clusters, found = len(sums_CK), []
    for start in range(0, resamples, step := max(1, _DRAWS // clusters)):
        rows = min(step, resamples - start)
        drawn_RC = torch.randint(clusters, (rows, clusters), generator=generator)
        times_RC = torch.zeros(rows, clusters, dtype=torch.float64)
        times_RC.scatter_add_(1, drawn_RC, torch.ones_like(times_RC))
        found.append(times_RC @ sums_CK / (times_RC @ sizes_C)[:, None])
    return torch.cat(found)


def _cut_ends(value: float, drawn_R: Tensor, *, known: bool) -> Interval:
    """Return the interval between the ends of what was drawn, where it says something."""
    if not known:
        return Interval(value, math.nan, math.nan)
    edges = torch.quantile(drawn_R, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value, float(edges[0]), float(edges[1]))


def share(count: int, of: int) -> Interval:
    """Return a share of independent items with Wilson's score interval (1927).

    Near 0 and 1 it stays inside them and keeps a width, unlike a bootstrap.

    Raises:
        ValueError: there are no items.
    """
    if of < 1:
        raise ValueError("a share of no items")
    value, weight = count / of, _Z * _Z / of
    middle = (value + weight / 2) / (1 + weight)
    reach = math.sqrt(value * (1 - value) * weight + weight * weight / 4) / (1 + weight)
    return Interval(value, max(0.0, middle - reach), min(1.0, middle + reach))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test for paired yes-no items (1947).

    Args:
        only_first: the number of items that the first checkpoint alone has right.
        only_second: the number that the second alone has right.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << total))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the same order (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
