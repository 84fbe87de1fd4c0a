"""Codebooks: the few values, or vectors, that many weights share.

Shapes: R rows, N values of a row, K levels of a codebook, S starts, D components of a vector,
P points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Rounds of Lloyd's algorithm at most; it stops by itself much sooner.
ROUNDS = 100
# Rounds of k-means on vectors at most.
VECTOR_ROUNDS = 25
# How far from its level to the border of its cell a value may lie that is to be learned.
INSIDE = 0.7
# Points that a further centre is chosen among.
DRAWN = 8


def levels(values_RN: Tensor, weights_RN: Tensor, count: int) -> Tensor:
    """Of each row the levels [R, K], ascending, that bring the least weighted squared error.

    Lloyd's algorithm in one dimension (Lloyd 1957; Max 1960), on sorted values, so that a round
    costs K searches a row: every value belongs to the nearest level, every level moves to the mean
    of its values. From two starts, levels at equal shares of the weights and at equal distances;
    the better end counts. A level without values, or a row with fewer different values than levels,
    keeps levels that nothing uses. Values of weight 0 count nowhere. In double precision.
    """
    values_RN, order_RN = values_RN.double().sort(-1)
    weights_RN = weights_RN.double().gather(-1, order_RN)
    # A row of no weight at all counts its values alike.
    weights_RN = torch.where(weights_RN.sum(-1, keepdim=True) > 0, weights_RN, 1.0)
    mass_RN, first_RN, second_RN = (
        torch.nn.functional.pad(part.cumsum(-1), (1, 0))
        for part in (weights_RN, weights_RN * values_RN, weights_RN * values_RN.square())
    )
    shares_K = (torch.arange(count, device=values_RN.device) + 0.5) / count
    wanted_RK = mass_RN[:, -1:] * shares_K
    last = values_RN.shape[1] - 1
    places_RK = torch.searchsorted(mass_RN[:, 1:].contiguous(), wanted_RK).clamp(max=last)
    low_R1, high_R1 = _ends(values_RN, weights_RN)
    level_RSK = torch.stack(
        [values_RN.gather(-1, places_RK), low_R1 + (high_R1 - low_R1) * shares_K], 1
    )
    level_RSK = _lloyd(values_RN, mass_RN, first_RN, level_RSK)
    error_RS = _error(values_RN, mass_RN, first_RN, second_RN, level_RSK)
    first_R1 = error_RS[:, :1] <= error_RS[:, 1:]
    return torch.where(first_R1, level_RSK[:, 0], level_RSK[:, 1]).float()


def _ends(values_RN: Tensor, weights_RN: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value [R, 1] that has a weight."""
    low_R1 = torch.where(weights_RN > 0, values_RN, torch.inf).amin(-1, keepdim=True)
    high_R1 = torch.where(weights_RN > 0, values_RN, -torch.inf).amax(-1, keepdim=True)
    return low_R1, high_R1


def _cells(values_RN: Tensor, level_RSK: Tensor) -> Tensor:
    """Where the values of each level begin and end among the sorted ones, [R, S, K + 1]."""
    middle_RSK = (level_RSK[..., 1:] + level_RSK[..., :-1]) / 2
    inner_RSK = torch.searchsorted(values_RN, middle_RSK.flatten(1), right=True)
    cells_RSK = torch.nn.functional.pad(inner_RSK.view(middle_RSK.shape), (1, 1))
    cells_RSK[..., -1] = values_RN.shape[1]
    return cells_RSK


def _between(sums_RN: Tensor, cells_RSK: Tensor) -> Tensor:
    """What is summed up within each cell [R, S, K], of sums up to each place."""
    return sums_RN.gather(-1, cells_RSK.flatten(1)).view(cells_RSK.shape).diff(dim=-1)


def _lloyd(values_RN: Tensor, mass_RN: Tensor, first_RN: Tensor, level_RSK: Tensor) -> Tensor:
    for _ in range(ROUNDS):
        cells_RSK = _cells(values_RN, level_RSK)
        mass_RSK = _between(mass_RN, cells_RSK)
        mean_RSK = _between(first_RN, cells_RSK) / mass_RSK.clamp(min=1e-300)
        moved_RSK = torch.where(mass_RSK > 0, mean_RSK, level_RSK).sort(-1).values
        if torch.equal(moved_RSK, level_RSK):
            break
        level_RSK = moved_RSK
    return level_RSK


def _error(
    values_RN: Tensor, mass_RN: Tensor, first_RN: Tensor, second_RN: Tensor, level_RSK: Tensor
) -> Tensor:
    """The weighted squared error [R, S]: the sum of w (x - c)^2 over all cells."""
    cells_RSK = _cells(values_RN, level_RSK)
    mass, first, second = (_between(part, cells_RSK) for part in (mass_RN, first_RN, second_RN))
    return (second - 2 * level_RSK * first + level_RSK.square() * mass).sum(-1)


def nearest(values_RN: Tensor, level_RK: Tensor) -> Tensor:
    """The place of the nearest level of its row for each value [R, N], uint8; levels ascend."""
    middle_RK = (level_RK[:, 1:] + level_RK[:, :-1]) / 2
    codes_RN = torch.zeros(values_RN.shape, dtype=torch.uint8, device=values_RN.device)
    # For so few levels faster than a search.
    for k in range(middle_RK.shape[1]):
        codes_RN += values_RN > middle_RK[:, k, None]
    return codes_RN


def within(values_RN: Tensor, level_RK: Tensor, codes_RN: Tensor) -> Tensor:
    """The values, each brought to where its code is the nearest one, and stays so when levels move.

    Codes that make up for other errors are often not the nearest. A value just across the border
    would fall back as soon as a level moves a little, and with it what its code made up for; so
    none lies further than `INSIDE` of the way from its level to the next border.
    """
    codes_RN = codes_RN.long()
    own_RN = level_RK.gather(1, codes_RN)
    between_RK = torch.nn.functional.pad((level_RK[:, 1:] + level_RK[:, :-1]) / 2, (1, 1))
    between_RK[:, 0], between_RK[:, -1] = -torch.inf, torch.inf
    low_RN = own_RN + INSIDE * (between_RK.gather(1, codes_RN) - own_RN)
    high_RN = own_RN + INSIDE * (between_RK.gather(1, codes_RN + 1) - own_RN)
    return values_RN.clamp(low_RN, high_RN)


class Chosen(torch.autograd.Function):
    """The levels [R, N] that codes choose: `Chosen.apply(values_RN, level_RK, codes_RN)`.

    Values get the gradient of what was chosen for them, as if it were they (straight through), and
    a level those of all that chose it.
    """

    @staticmethod
    def forward(ctx: Any, values_RN: Tensor, level_RK: Tensor, codes_RN: Tensor) -> Tensor:
        ctx.save_for_backward(codes_RN)
        ctx.count = level_RK.shape[1]
        return level_RK.gather(1, codes_RN.long())

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope_RN,), (codes_RN,) = slopes, ctx.saved_tensors
        of_levels_RK = slope_RN.new_zeros(len(slope_RN), ctx.count)
        return slope_RN, of_levels_RK.scatter_add_(1, codes_RN.long(), slope_RN), None


def chosen_again(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A product with chosen levels, which the backward pass chooses again: kept, those of all
    matrices of a block would be as large as the block. The product itself is not taken again."""
    return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class LinearCodebook(nn.Module):
    """A codebook C = E A while it is trained (SimVQ; Zhu et al. 2024, arXiv:2411.02038).

    E [..., K, D] are the vectors that it begins with, of several codebooks at once. A, at first
    the identity, moves all vectors of one, also those that nothing has chosen lately; E may learn
    beside it, in units of its root mean square. What is stored and decoded by is C.
    """

    def __init__(self, basis_KD: Tensor) -> None:
        super().__init__()
        size = basis_KD.square().mean((-2, -1), keepdim=True).sqrt()
        self.size = torch.where(size > 0, size, 1.0)
        self.basis_KD = nn.Parameter(basis_KD / self.size)
        *books, _, width = basis_KD.shape
        eye_DD = torch.eye(width, device=basis_KD.device).expand(*books, width, width)
        self.turn_DD = nn.Parameter(eye_DD.clone())

    def forward(self) -> Tensor:
        """C [..., K, D]."""
        return self.size * (self.basis_KD @ self.turn_DD)


def vectors(points_PD: Tensor, weights_P: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each point's code [P] among `count`: weighted k-means from points drawn by their weight.

    A centre that loses all its points begins again at the point that is the furthest from its own.
    """
    drawn_K = torch.multinomial(weights_P.double().cpu(), count, generator=generator)
    centres_KD = points_PD[drawn_K.to(points_PD.device)]
    label_P = torch.full((len(points_PD),), -1, device=points_PD.device)
    for _ in range(VECTOR_ROUNDS):
        before_P = label_P
        parts = [torch.cdist(part, centres_KD).min(1) for part in torch.split(points_PD, 1 << 13)]
        distance_P = torch.cat([part.values for part in parts])
        label_P = torch.cat([part.indices for part in parts])
        empty_E = (torch.bincount(label_P, minlength=count) == 0).nonzero()[:, 0]
        if len(empty_E):
            furthest_E = distance_P.topk(len(empty_E)).indices
            label_P[furthest_E] = empty_E
        elif torch.equal(before_P, label_P):
            break
        centres_KD = means(points_PD, weights_P, label_P, count)
    return label_P


def means(points_PD: Tensor, weights_P: Tensor, label_P: Tensor, count: int) -> Tensor:
    """The weighted mean [K, D] of the points of each label; zeros where there are none."""
    mass_K = weights_P.new_zeros(count).index_add_(0, label_P, weights_P)
    sums_KD = points_PD.new_zeros(count, points_PD.shape[1])
    sums_KD.index_add_(0, label_P, points_PD * weights_P[:, None])
    return sums_KD / mass_K.clamp(min=1e-30)[:, None]


def clusters(points_PD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each point's cluster [P], of at most `count`: k-means, begun as greedy k-means++ begins.

    (Arthur and Vassilvitskii 2007: of a few points drawn by their squared distance, the one that
    lowers the others' most.) Clusters are numbered as their first points stand.
    """
    points_PD = points_PD.double()
    count = min(count, len(points_PD))
    first = int(torch.randint(len(points_PD), (1,), generator=generator))
    centres_KD = points_PD[first, None]
    while len(centres_KD) < count:
        distance_P = torch.cdist(points_PD, centres_KD).amin(1).square()
        if not distance_P.any():
            break
        drawn = torch.multinomial(distance_P.cpu(), DRAWN, replacement=True, generator=generator)
        tried_TD = points_PD[drawn.to(points_PD.device)]
        left_T = torch.cdist(points_PD, tried_TD).square().minimum(distance_P[:, None]).sum(0)
        centres_KD = torch.cat([centres_KD, tried_TD[left_T.argmin(), None]])
    label_P = torch.full((len(points_PD),), -1, device=points_PD.device)
    for _ in range(ROUNDS):
        before_P, label_P = label_P, torch.cdist(points_PD, centres_KD).argmin(1)
        if torch.equal(before_P, label_P):
            break
        size_K = torch.bincount(label_P, minlength=len(centres_KD)).double()
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, label_P, points_PD)
        centres_KD = torch.where(
            size_K[:, None] > 0, sums_KD / size_K.clamp(min=1)[:, None], centres_KD
        )
    found = list(dict.fromkeys(label_P.tolist()))
    places_K = torch.zeros(len(centres_KD), dtype=torch.long, device=points_PD.device)
    places_K[found] = torch.arange(len(found), device=points_PD.device)
    return places_K[label_P]
