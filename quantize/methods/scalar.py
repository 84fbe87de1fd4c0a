"""Scalar codebooks (`scalar`): a codebook per input, with more levels for more important inputs.

With b_j bits for input j, K_j = 2^b_j levels v_j shared by all rows, and codes k_ij,

    w'_ij = v_j[k_ij].

No scales are stored, and inputs with large activations need no mask, as they get more bits. Columns
are rounded one by one with compensation as in `gptq`; the levels of a column are Lloyd's for its
compensated weights, slightly widened as in `jlcm`. Levels and codes are then fitted per block
(`fitting.py`), codes in the latent form of `jlcm`.

Source: scalar codebooks per dimension of Hsu et al., QLAE, 2023 (arXiv:2305.18378), there of a
latent space; their use for weights, the allocation of bits and the compensation are ours.
Shapes: n outputs, m inputs, K levels of an input at most, L levels of all inputs, T tries,
B bits of a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.base import PackedFields, Statistics
from spectool.quantize.codebook import (
    SelectLevels,
    clamp_to_cells,
    fit_levels,
    nearest_codes,
    recompute_product,
)
from spectool.quantize.fitting import BlockQuantizer, TrainableMatrix
from spectool.quantize.methods.gptq import DAMPING, HessianFactor, compensate, factor_hessian
from spectool.quantize.methods.rtn import SCALE_MAX, SCALE_MIN
from spectool.quantize.statistics import LinearStats

# Most bits of an input.
MAX_BITS = 4
# Share of a Gaussian's variance that the best levels of 0, 1, ... bits leave (Max 1960).
DISTORTION = (1.0, 0.3634, 0.1175, 0.0345, 0.0095)
# Storage for levels, relative to that of equal bits for all inputs.
LEVEL_STORAGE = 1.5
# Levels are tried this many times as wide as Lloyd's.
WIDTHS = (1.0, 1.2, 1.4)


class Scalar(BlockQuantizer):
    """Scalar codebooks; see the module docstring."""

    name = "scalar"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: float = option(2.0, "mean bits of a code", minimum=1, maximum=MAX_BITS)
        epochs: int = option(4, "passes over the calibration sequences", minimum=0)
        lr: float = option(
            5e-3, "learning rate of levels: cells per step of the mean gradient", minimum=0
        )
        lr_codes: float = option(
            5e-4, "learning rate of codes: cells per step of the mean gradient", minimum=0
        )

    config: Config
    statistics: ClassVar[Statistics] = {"hessian": "packed"}

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        return {
            "codes": (torch.uint8, (n, packed_bytes(int(self.config.bits * m), 1))),
            "levels": (torch.float16, (max_levels(m, self.config.bits),)),
            "bits": (torch.uint8, (m,)),
        }

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix, as it is before the fit; without a Hessian by the identity."""
        weight_nm = weight_nm.float()
        m = weight_nm.shape[1]
        largest = float(weight_nm.abs().max())
        if largest > SCALE_MAX or 0 < largest < SCALE_MIN:
            raise UnsupportedError(
                f"its weights reach {largest:.3g}, and float16, which stores their levels, "
                f"ranges from {SCALE_MIN:.3g} to {SCALE_MAX:.0f}",
                hint="leave it dense with --skip, or rescale the checkpoint",
            )
        hessian_mm = torch.eye(m, device=weight_nm.device)
        if stats is not None and stats.hessian is not None:
            hessian_mm = stats.hessian
        factor = factor_hessian(hessian_mm, DAMPING)
        cost_m = torch.empty(m, device=weight_nm.device)
        cost_m[factor.order_m] = factor.cost_m
        bits_m = allocate(cost_m * weight_nm.var(0, correction=0), self.config.bits)
        level_mK, codes_nm = _round_compensated(weight_nm, bits_m, factor)
        return _make_fields(level_mK, codes_nm, bits_m, self.config.bits)

    def fit_bytes(self) -> int:
        """Return the bytes per weight of `choice_nm`, its gradient and its momentum."""
        return 12

    def make_trainable(
        self, linear: Any, weight_nm: Tensor, diagonal_m: Tensor | None, dtype: torch.dtype
    ) -> TrainedLevels:
        weight_nm = weight_nm.to(linear.q.codes.device).float()
        return TrainedLevels(linear, weight_nm, dtype, diagonal_m)

    def make_optimizers(self, parts: Sequence[Any]) -> Sequence[torch.optim.Optimizer]:
        groups = [
            {"params": [values], "lr": rate * part.unit}
            for part in parts
            for values, rate in (
                (part.level_mK, self.config.lr),
                (part.choice_nm, self.config.lr_codes),
            )
        ]
        # Not AdamW: few weights share a level, so the size of its gradient matters.
        return [torch.optim.SGD(groups, momentum=0.9, dampening=0.9)]

    def build(self, shape: tuple[int, int]) -> ScalarLinear:
        return ScalarLinear(self.layout(shape), shape, self.config)


def max_levels(m: int, bits: float) -> int:
    """Return the number of stored levels of a matrix with m inputs; unused ones are zeros."""
    return int(LEVEL_STORAGE * 2**bits * m)


def allocate(cost_m: Tensor, bits: float) -> Tensor:
    """Allocate bits [m] to inputs by reverse water-filling, as uint8.

    `cost_m` is R_jj^2 of `gptq` times the variance of the column. The bits sum to int(bits m), or
    less if the levels run out.
    """
    cost = cost_m.double().tolist()
    bits_left, levels_left = int(bits * len(cost)), max_levels(len(cost), bits) - len(cost)
    allocated = [0] * len(cost)
    # The next bit goes to the input with the largest var_j R_jj^2 (c_b - c_(b+1)), c_b being the
    # distortion at its b bits; of equal ones to the first.
    queue = [(-value * (DISTORTION[0] - DISTORTION[1]), j) for j, value in enumerate(cost)]
    heapq.heapify(queue)
    while bits_left and queue:
        _, j = heapq.heappop(queue)
        new_levels = 1 << allocated[j]
        if new_levels > levels_left:
            continue
        allocated[j] += 1
        bits_left -= 1
        levels_left -= new_levels
        if allocated[j] < MAX_BITS:
            gain = cost[j] * (DISTORTION[allocated[j]] - DISTORTION[allocated[j] + 1])
            heapq.heappush(queue, (-gain, j))
    return torch.tensor(allocated, dtype=torch.uint8, device=cost_m.device)


def _round_compensated(
    weight_nm: Tensor, bits_m: Tensor, factor: HessianFactor
) -> tuple[Tensor, Tensor]:
    """Round column by column with compensation, at the best of `WIDTHS`.

    Returns levels [m, K] as stored, the last one of an input repeated, and codes [n, m].
    """
    tries, (n, m) = len(WIDTHS), weight_nm.shape
    bits, order = bits_m.tolist(), factor.order_m.tolist()
    width_T1 = torch.tensor(WIDTHS, device=weight_nm.device)[:, None]
    weight_Tnm = weight_nm.expand(tries, -1, -1)
    level_TmK = torch.empty(tries, m, 1 << max(bits), device=weight_nm.device)
    codes_mTn = torch.empty(m, tries, n, dtype=torch.uint8, device=weight_nm.device)

    def round_column(j: int, weight_mTn: Tensor) -> Tensor:
        column_Tn, column = weight_mTn[j], order[j]
        level_TK = fit_levels(column_Tn, torch.ones_like(column_Tn), 1 << bits[column])
        middle_T1 = level_TK.mean(1, keepdim=True)
        level_TK = middle_T1 + width_T1 * (level_TK - middle_T1)
        level_TK = level_TK.clamp(-SCALE_MAX, SCALE_MAX).half().float()
        count = level_TK.shape[1]
        level_TmK[:, column, :count] = level_TK
        level_TmK[:, column, count:] = level_TK[:, -1:]
        code_Tn = nearest_codes(column_Tn, level_TK)
        codes_mTn[column] = code_Tn
        return level_TK.gather(1, code_Tn.long())

    best = int(compensate(weight_Tnm, factor, m, round_column).sum(1).argmin())
    return level_TmK[best], codes_mTn[:, best].T


def _make_fields(level_mK: Tensor, codes_nm: Tensor, bits_m: Tensor, bits: float) -> PackedFields:
    """Make the stored fields of levels [m, K] and codes [n, m]."""
    m = len(bits_m)
    index_K = torch.arange(level_mK.shape[1], device=level_mK.device)
    used_mK = index_K < (1 << bits_m.long())[:, None]
    level_L = torch.zeros(max_levels(m, bits), dtype=torch.float16, device=level_mK.device)
    used = level_mK[used_mK].half()
    level_L[: len(used)] = used
    bits_nmb = torch.stack([(codes_nm >> bit) & 1 for bit in range(MAX_BITS)], -1)
    stored_mb = torch.arange(MAX_BITS, device=bits_m.device) < bits_m[:, None]
    flat_nB = bits_nmb[:, stored_mb]
    flat_nB = F.pad(flat_nB, (0, int(bits * m) - flat_nB.shape[1]))
    return {"codes": pack_bits(flat_nB, 1), "levels": level_L, "bits": bits_m}


class TrainedLevels(TrainableMatrix):
    """One matrix in training: levels, and a number per weight that is rounded to the nearest one.

    Both are in units of the column's standard deviation. `diagonal_m` is the Hessian's diagonal.
    """

    def __init__(
        self,
        linear: ScalarLinear,
        weight_nm: Tensor,
        dtype: torch.dtype,
        diagonal_m: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.dtype = linear, dtype
        if diagonal_m is None:
            diagonal_m = torch.ones(weight_nm.shape[1], device=weight_nm.device)
        level_mK, codes_nm = linear.table(), linear.codes()
        self.spread_m = weight_nm.std(0, correction=0).clamp(min=SCALE_MIN)
        self.level_mK = nn.Parameter(level_mK / self.spread_m[:, None])
        distance_mK = self.level_mK.detach().diff(dim=1)
        # Mean distance of neighbouring levels; repeated ones are no neighbours.
        self.unit = float(distance_mK[distance_mK > 0].mean()) if (distance_mK > 0).any() else 1.0
        ratio_nm = weight_nm / self.spread_m
        self.choice_nm = nn.Parameter(
            clamp_to_cells(ratio_nm.T, self._ascending().detach(), codes_nm.T).T
        )
        self.choice_nm.register_post_accumulate_grad_hook(_normalise_gradient)  # type: ignore[no-untyped-call]
        # Curvature of the loss along a level: its number of weights times the input's mean square.
        # Without this preconditioner levels of large inputs diverge before others have moved.
        count_mK = torch.zeros_like(level_mK).scatter_add_(
            1, codes_nm.T.long(), torch.ones_like(weight_nm.T)
        )
        curvature_mK = count_mK * (diagonal_m * self.spread_m.square())[:, None]

        def precondition(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad /= curvature_mK.clamp(min=1e-30)
                _normalise_gradient(parameter)

        self.level_mK.register_post_accumulate_grad_hook(precondition)  # type: ignore[no-untyped-call]

    def _ascending(self) -> Tensor:
        """Return the levels [m, K], ascending; infinite beyond the levels of an input."""
        count_m1 = (1 << self.linear.q.bits.long())[:, None]
        index_K = torch.arange(self.level_mK.shape[1], device=count_m1.device)
        return self.level_mK.masked_fill(index_K >= count_m1, torch.inf).sort(-1).values

    def select(self) -> tuple[Tensor, Tensor]:
        """Return levels [m, K], ascending and differentiable, and the nearest codes [n, m]."""
        level_mK = self._ascending()
        codes_nm = nearest_codes(self.choice_nm.detach().T, level_mK.detach()).T
        return level_mK, codes_nm

    def forward(self, x: Tensor) -> Tensor:
        return recompute_product(self._product, x).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        level_mK, codes_nm = self.select()
        value_mn: Tensor = SelectLevels.apply(self.choice_nm.T, level_mK, codes_nm.T)  # type: ignore[no-untyped-call]
        return F.linear(x, (value_mn.T * self.spread_m).to(self.dtype))

    @torch.no_grad()
    def store(self) -> None:
        """Write the current codes and levels into the linear's fields."""
        level_mK, codes_nm = self.select()
        level_mK = (level_mK * self.spread_m[:, None]).clamp(-SCALE_MAX, SCALE_MAX)
        fields = self.linear.q
        new_fields = _make_fields(level_mK, codes_nm, fields.bits, self.linear.config.bits)
        for name, value in new_fields.items():
            fields.get_buffer(name).copy_(value)


def _normalise_gradient(parameter: Tensor) -> None:
    """Divide a gradient by the mean size of its nonzero elements."""
    if parameter.grad is not None:
        sizes = parameter.grad.abs()
        parameter.grad /= (sizes.sum() / sizes.count_nonzero().clamp(min=1)).clamp(min=1e-30)


class ScalarLinear(PackedLinear):
    """Packed linear of `scalar`.

    Fields: codes U8 [n, bit-packed row], levels F16 [L], bits U8 [m]. A row holds b_j bits of each
    code in order of the inputs, lowest bit first; levels are in the same order.
    """

    config: Scalar.Config

    def table(self) -> Tensor:
        """Return the levels of each input [m, K], the last one repeated."""
        count_m = 1 << self.q.bits.long()
        index_K = torch.arange(int(count_m.max()), device=count_m.device)
        begin_m = count_m.cumsum(0) - count_m
        return self.q.levels.float()[begin_m[:, None] + index_K.minimum(count_m[:, None] - 1)]

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Unpack codes [n, m] as uint8."""
        bits_m = self.q.bits
        flat_nB = unpack_bits(self.q.codes[rows], 1, int(self.config.bits * self.in_features))
        stored_mb = torch.arange(MAX_BITS, device=bits_m.device) < bits_m[:, None]
        bits_nmb = flat_nB.new_zeros(len(flat_nB), self.in_features, MAX_BITS)
        bits_nmb[:, stored_mb] = flat_nB[:, : int(stored_mb.sum())]
        shifts_b = torch.arange(MAX_BITS, dtype=torch.uint8, device=bits_m.device)
        return (bits_nmb << shifts_b).sum(-1, dtype=torch.uint8)

    def rows(self, rows: slice | Tensor) -> Tensor:
        return self.table().gather(1, self.codes(rows).T.long()).T

    def segments(self) -> list[Segment]:
        """Return a segment for each number of bits; inputs of no bits have codes 0 of one bit."""
        codes_nm, table_mK = self.codes(), self.table()
        found, width_m = [], self.q.bits.clamp(min=1)
        for bits in range(1, MAX_BITS + 1):
            columns_k = (width_m == bits).nonzero()[:, 0]
            if not len(columns_k):
                continue
            found.append(
                Segment(
                    codes=codes_nm[:, columns_k],
                    bits=bits,
                    group_size=len(columns_k),
                    scale=torch.ones(len(codes_nm), 1, device=codes_nm.device),
                    column_levels=table_mK[columns_k, : 1 << bits],
                    columns=columns_k,
                )
            )
        return found
