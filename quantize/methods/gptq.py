"""GPTQ (`gptq`): round column by column; later columns compensate for the error of earlier ones.

With H = mean x x^T over the inputs in the packed stream, and R the upper triangular matrix with
R R^T = H + damping mean(diag H) I, column j is rounded to the value q_j of the grid of `rtn` that
is nearest to

    v_j = w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj.

The authors' update, w_k <- w_k - (w_j - q_j) U_jk / U_jj for all k > j with U^T U = (R R^T)^-1, is
equivalent (Chen et al., 2025), but U costs four times as much as R.

With `act_order` columns are processed in decreasing order of H_jj, and grids are those of the
original weights, so that the fields are those of `rtn` and no column order is stored. Without it
the grid of a group is computed when the group is reached, from its compensated weights.

Source: Frantar et al., GPTQ, 2022 (arXiv:2210.17323); Chen et al., The Geometry of LLM
Quantization, 2025 (arXiv:2507.18553). Deviation: inputs that are always zero are rounded like
others; the authors set their weights to zero.
Shapes: n outputs, m inputs, g groups, c columns of a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits
from spectool.options import option
from spectool.quantize.base import PackedFields, Statistics
from spectool.quantize.methods.rtn import RTN, check_scale, fit_grid
from spectool.quantize.statistics import LinearStats

# Errors of this many columns are applied to all later columns in one matrix product.
SEGMENT = 128

# Added to the diagonal of H by default, relative to its mean.
DAMPING = 0.01


class GPTQ(RTN):
    """GPTQ; see the module docstring."""

    name = "gptq"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(RTN.Config):
        act_order: bool = option(True, "round inputs of large activations first")
        damping: float = option(
            DAMPING, "added to the diagonal of H, relative to its mean", minimum=0, maximum=1
        )

    config: Config
    statistics: ClassVar[Statistics] = {"hessian": "packed"}

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix; without a Hessian as `rtn` does."""
        if stats is None or stats.hessian is None:
            return super().pack(weight_nm, None, generator)
        n, m = weight_nm.shape
        columns, top = self.config.group_size or m, 2**self.config.bits - 1
        factor = factor_hessian(stats.hessian, self.config.damping, by_size=self.config.act_order)
        order = factor.order_m.tolist()
        step_ng, zero_ng, largest = fit_grid(weight_nm.float(), self.config)
        check_scale(float(largest))
        codes_mn = torch.empty(m, n, dtype=torch.uint8, device=weight_nm.device)

        def round_column(j: int, weight_mn: Tensor) -> Tensor:
            if not self.config.act_order and j and j % columns == 0:
                # The grid of a new group, from the v that its columns would have with no rounding
                # error inside the group.
                group, inside = slice(j // columns, j // columns + 1), slice(j, j + columns)
                whole_cn = weight_nm[:, inside].T.float()
                best_cn = whole_cn + torch.linalg.solve_triangular(
                    factor.upper_mm[inside, inside].T,
                    weight_mn[inside] - whole_cn,
                    upper=False,
                    unitriangular=True,
                )
                grid = fit_grid(best_cn.T, self.config)
                step_ng[:, group], zero_ng[:, group], largest = grid
                check_scale(float(largest))
            group_j = order[j] // columns
            step_n, zero_n = step_ng[:, group_j].float(), zero_ng[:, group_j]
            code_n = (weight_mn[j] / step_n).round_().add_(zero_n).clamp_(0, top)
            codes_mn[order[j]] = code_n.to(torch.uint8)
            return step_n * (code_n - zero_n)

        # With act_order grids are known, and no group needs its weights updated when it begins.
        compensate(weight_nm.float(), factor, m if self.config.act_order else columns, round_column)
        fields = {"codes": pack_bits(codes_mn.T, self.config.bits), "scale": step_ng}
        if not self.config.symmetric:
            fields["zero"] = zero_ng.to(torch.uint8)
        return fields


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """Factor R of a damped Hessian, R R^T = H + damping, with inputs in processing order."""

    order_m: Tensor
    # R_ij / R_jj.
    upper_mm: Tensor
    # R_jj^2, the cost of a squared error of column j with compensation.
    cost_m: Tensor
    # What damping added to the diagonal of H.
    added_m: Tensor


def factor_hessian(
    hessian_mm: Tensor, damping: float, *, by_size: bool = True, order_m: Tensor | None = None
) -> HessianFactor:
    """Factor a Hessian [m, m] with its inputs in the order `order_m`.

    Without `order_m` inputs are ordered by decreasing H_jj if `by_size`, else kept in order.

    Raises:
        UnsupportedError: the Hessian is not finite, or singular with this damping.
    """
    if order_m is None:
        order_m = torch.arange(len(hessian_mm), device=hessian_mm.device)
        if by_size:
            order_m = hessian_mm.diagonal().argsort(descending=True, stable=True)
    if not torch.isfinite(hessian_mm).all():
        raise UnsupportedError(
            "its inputs are not finite on the calibration text", hint="--dtype float32"
        )
    # R reversed is the lower Cholesky factor of H reversed, in double precision as H is often
    # singular. Computed in place and reversed in chunks to save memory: it can be as large as a
    # block of a small model.
    wide_mm = torch.empty_like(hessian_mm, dtype=torch.float64)
    back_m = order_m.flip(0)
    parts = (torch.split(each, SEGMENT) for each in (wide_mm, back_m))
    for wide_cm, back_c in zip(*parts, strict=True):
        wide_cm.copy_(hessian_mm[back_c[:, None], back_m])
    diagonal = wide_mm.diagonal()
    mean = float(diagonal.sum() / diagonal.count_nonzero().clamp(min=1)) or 1.0
    # Inputs that were always zero: any value works, and the mean keeps the matrix regular.
    added_m = damping * mean + mean * (diagonal == 0)
    diagonal += added_m
    # Transposed into LAPACK's column order, so that the factor can overwrite its input.
    factor_mm = wide_mm.T
    failed = torch.zeros((), dtype=torch.int32, device=factor_mm.device)
    torch.linalg.cholesky_ex(factor_mm, out=(factor_mm, failed))
    if failed:
        raise UnsupportedError(
            f"the Hessian of its inputs is singular with a damping of {damping}",
            hint="a larger --damping, or more calibration text",
        )
    diagonal_m = diagonal.clone()
    factor_mm /= diagonal_m
    upper_mm = torch.empty_like(hessian_mm)
    m = len(upper_mm)
    for start, end in _segment_bounds(m, m):
        upper_mm[start:end] = factor_mm[m - end : m - start].flip(0, 1)
    cost_m, added_m = diagonal_m.square().flip(0).float(), added_m.flip(0).float()
    return HessianFactor(order_m, upper_mm, cost_m, added_m)


def compensate(
    weight_nm: Tensor,
    factor: HessianFactor,
    columns: int,
    round_column: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Round the columns of a matrix in order, with compensation by later columns.

    `round_column(j, weight_mn)` returns the rounded j-th column [n]. `weight_mn` is the matrix in
    processing order; row j is compensated for all errors before j, and where a group of `columns`
    begins all rows of the group are compensated for the errors before it. Rows before j hold
    other values. Returns the squared error of each output [n], averaged over the tokens of H.
    Several matrices [tries, n, m] are processed at once as [m, tries, n], with errors [tries, n].
    """
    order_m, upper_mm = factor.order_m, factor.upper_mm
    # Columns are made contiguous, as they are processed one by one.
    whole_mn = weight_nm.movedim(-1, 0)
    weight_mn = whole_mn.index_select(0, order_m)
    rows_mN = weight_mn.view(len(weight_mn), -1)
    excess_N = torch.zeros_like(rows_mN[0])
    for start, end in _segment_bounds(len(weight_mn), columns):
        errors_cn = whole_mn.index_select(0, order_m[start:end])
        errors_cN = errors_cn.view(len(errors_cn), -1)
        for j in range(start, end):
            rounded_n = round_column(j, weight_mn)
            errors_cn[j - start] -= rounded_n
            weight_mn[j] -= rounded_n
            rows_mN[j + 1 : end].addr_(upper_mm[j, j + 1 : end], errors_cN[j - start])
        rows_mN[end:].addmm_(upper_mm[start:end, end:].T, errors_cN)
        excess_N += factor.added_m[start:end] @ errors_cN.square_()
    # sum_j R_jj^2 (v_j - q_j)^2 = (w - q)^T R R^T (w - q), which includes the damping: subtract it.
    return (factor.cost_m @ rows_mN.square_() - excess_N).view(weight_mn.shape[1:])


def _segment_bounds(m: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each segment; every group of `columns` begins a segment."""
    cuts = sorted({*range(0, m, SEGMENT), *range(0, m, columns), m})
    yield from itertools.pairwise(cuts)
