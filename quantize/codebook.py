"""Codebooks: levels or vectors shared by many weights, and their fits by Lloyd and k-means.

Shapes: R rows, N values of a row, K levels of a codebook, S starts, D components of a vector,
P points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Most rounds of Lloyd's algorithm; it usually converges much sooner.
ROUNDS = 100
# Most rounds of k-means on vectors.
VECTOR_ROUNDS = 25
# Trained values start at most this share of the way from their level to the border of its cell.
CELL_SHARE = 0.7
# Candidates for each further centre of greedy k-means++.
DRAWN = 8


def fit_levels(values_RN: Tensor, weights_RN: Tensor, count: int) -> Tensor:
    """Fit `count` levels [R, K] to each row, ascending, for the least weighted squared error.

    Lloyd's algorithm in one dimension (Lloyd 1957; Max 1960), in double precision: every value
    belongs to its nearest level, every level moves to the mean of its values. Values of weight 0
    are ignored. Rows with fewer distinct values than levels keep levels that no value uses.
    """
    # On sorted values and prefix sums a round costs only K searches a row.
    values_RN, order_RN = values_RN.double().sort(-1)
    weights_RN = weights_RN.double().gather(-1, order_RN)
    # Rows whose weights are all 0 are fitted with equal weights.
    weights_RN = torch.where(weights_RN.sum(-1, keepdim=True) > 0, weights_RN, 1.0)
    mass_RN, first_RN, second_RN = (
        torch.nn.functional.pad(part.cumsum(-1), (1, 0))
        for part in (weights_RN, weights_RN * values_RN, weights_RN * values_RN.square())
    )
    shares_K = (torch.arange(count, device=values_RN.device) + 0.5) / count
    wanted_RK = mass_RN[:, -1:] * shares_K
    last = values_RN.shape[1] - 1
    index_RK = torch.searchsorted(mass_RN[:, 1:].contiguous(), wanted_RK).clamp(max=last)
    # Two starts, levels at equal shares of the weight and at equal distances; the better fit wins.
    counted_RN = weights_RN > 0
    low_R1 = torch.where(counted_RN, values_RN, torch.inf).amin(-1, keepdim=True)
    high_R1 = torch.where(counted_RN, values_RN, -torch.inf).amax(-1, keepdim=True)
    level_RSK = torch.stack(
        [values_RN.gather(-1, index_RK), low_R1 + (high_R1 - low_R1) * shares_K], 1
    )
    level_RSK = _lloyd(values_RN, mass_RN, first_RN, level_RSK)
    error_RS = _error(values_RN, mass_RN, first_RN, second_RN, level_RSK)
    first_R1 = error_RS[:, :1] <= error_RS[:, 1:]
    return torch.where(first_R1, level_RSK[:, 0], level_RSK[:, 1]).float()


def _cells(values_RN: Tensor, level_RSK: Tensor) -> Tensor:
    """Return the borders [R, S, K + 1] between the levels' cells, as indices of sorted values."""
    middle_RSK = (level_RSK[..., 1:] + level_RSK[..., :-1]) / 2
    inner_RSK = torch.searchsorted(values_RN, middle_RSK.flatten(1), right=True)
    cells_RSK = torch.nn.functional.pad(inner_RSK.view(middle_RSK.shape), (1, 1))
    cells_RSK[..., -1] = values_RN.shape[1]
    return cells_RSK


def _between(sums_RN: Tensor, cells_RSK: Tensor) -> Tensor:
    """Return the sum within each cell [R, S, K], from prefix sums."""
    return sums_RN.gather(-1, cells_RSK.flatten(1)).view(cells_RSK.shape).diff(dim=-1)


def _lloyd(values_RN: Tensor, mass_RN: Tensor, first_RN: Tensor, level_RSK: Tensor) -> Tensor:
    """Move levels [R, S, K] to the means of their cells until they stay."""
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
    """Return the weighted squared error [R, S], the sum of w (x - c)^2 over all cells."""
    cells_RSK = _cells(values_RN, level_RSK)
    mass, first, second = (_between(part, cells_RSK) for part in (mass_RN, first_RN, second_RN))
    return (second - 2 * level_RSK * first + level_RSK.square() * mass).sum(-1)


def nearest_codes(values_RN: Tensor, level_RK: Tensor) -> Tensor:
    """Return the index [R, N], uint8, of each value's nearest level; levels ascend."""
    middle_RK = (level_RK[:, 1:] + level_RK[:, :-1]) / 2
    codes_RN = torch.zeros(values_RN.shape, dtype=torch.uint8, device=values_RN.device)
    # With at most 16 levels comparisons are faster than a search.
    for k in range(middle_RK.shape[1]):
        codes_RN += values_RN > middle_RK[:, k, None]
    return codes_RN


def clamp_to_cells(values_RN: Tensor, level_RK: Tensor, codes_RN: Tensor) -> Tensor:
    """Clamp each value [R, N] into the cell of its code, at most `CELL_SHARE` towards a border.

    Codes from error compensation are often not the nearest ones. A value at or across the border
    would change its code as soon as a level moves a little, and undo the compensation.
    """
    codes_RN = codes_RN.long()
    level_RN = level_RK.gather(1, codes_RN)
    border_RK = torch.nn.functional.pad((level_RK[:, 1:] + level_RK[:, :-1]) / 2, (1, 1))
    border_RK[:, 0], border_RK[:, -1] = -torch.inf, torch.inf
    low_RN = level_RN + CELL_SHARE * (border_RK.gather(1, codes_RN) - level_RN)
    high_RN = level_RN + CELL_SHARE * (border_RK.gather(1, codes_RN + 1) - level_RN)
    return values_RN.clamp(low_RN, high_RN)


class SelectLevels(torch.autograd.Function):
    """Levels [R, N] selected by codes: `SelectLevels.apply(values_RN, level_RK, codes_RN)`.

    The backward pass gives each value the gradient of its selected level (straight-through), and
    each level the sum of the gradients where it was selected.
    """

    @staticmethod
    def forward(ctx: Any, values_RN: Tensor, level_RK: Tensor, codes_RN: Tensor) -> Tensor:
        ctx.save_for_backward(codes_RN)
        ctx.count = level_RK.shape[1]
        return level_RK.gather(1, codes_RN.long())

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope_RN,), (codes_RN,) = slopes, ctx.saved_tensors
        level_slope_RK = slope_RN.new_zeros(len(slope_RN), ctx.count)
        return slope_RN, level_slope_RK.scatter_add_(1, codes_RN.long(), slope_RN), None


def recompute_product(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute product(x), and its intermediates again in the backward pass.

    Kept in between, the selected levels of all matrices of a block would be as large as the block.
    """
    return checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class LinearCodebook(nn.Module):
    """Codebooks C = E A in training (SimVQ; Zhu et al. 2024, arXiv:2411.02038).

    E [..., K, D] are the initial vectors, in units of their root mean square; A [..., D, D] begins
    as the identity and moves all vectors of a codebook, also those that no point uses. Both are
    trained; C is stored.
    """

    def __init__(self, basis_KD: Tensor) -> None:
        super().__init__()
        size = basis_KD.square().mean((-2, -1), keepdim=True).sqrt()
        self.size = torch.where(size > 0, size, 1.0)
        self.basis_KD = nn.Parameter(basis_KD / self.size)
        *books, _, width = basis_KD.shape
        eye_DD = torch.eye(width, device=basis_KD.device).expand(*books, width, width)
        self.transform_DD = nn.Parameter(eye_DD.clone())

    def forward(self) -> Tensor:
        """Return C [..., K, D]."""
        return self.size * (self.basis_KD @ self.transform_DD)


def cluster_vectors(
    points_PD: Tensor, weights_P: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Assign each point a code [P] below `count`, by weighted k-means.

    Initial centres are points drawn by weight. A centre that loses all its points restarts at the
    point furthest from its centre.
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
        centres_KD = mean_by_label(points_PD, weights_P, label_P, count)
    return label_P


def mean_by_label(points_PD: Tensor, weights_P: Tensor, label_P: Tensor, count: int) -> Tensor:
    """Return the weighted mean [K, D] of each label's points; zeros for labels without points."""
    mass_K = weights_P.new_zeros(count).index_add_(0, label_P, weights_P)
    sums_KD = points_PD.new_zeros(count, points_PD.shape[1])
    sums_KD.index_add_(0, label_P, points_PD * weights_P[:, None])
    return sums_KD / mass_K.clamp(min=1e-30)[:, None]


def cluster_rows(points_PD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Assign each point to one of at most `count` clusters [P], numbered by first appearance.

    k-means from a greedy k-means++ start (Arthur and Vassilvitskii 2007): of `DRAWN` points, drawn
    by squared distance, the one that lowers the sum of squared distances most.
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
    used = list(dict.fromkeys(label_P.tolist()))
    renamed_K = torch.zeros(len(centres_KD), dtype=torch.long, device=points_PD.device)
    renamed_K[used] = torch.arange(len(used), device=points_PD.device)
    return renamed_K[label_P]
