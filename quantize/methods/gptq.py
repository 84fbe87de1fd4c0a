"""GPTQ (`gptq`): round one input after another, and let later ones make up for the error.

With H = mean x x^T over the inputs as the packed blocks before produce them, and R the upper
triangle with R R^T = H + damping mean(diag H) I, one column after another is rounded to q_j, on the
grid of `rtn` the nearest to

    v_j = w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj.

The authors' steps, w_k <- w_k - (w_j - q_j) U_jk / U_jj for all later k with U^T U = (R R^T)^-1,
lead to the same (Chen et al., 2025), but to have U costs four times what R does.

With `act_order` columns come by falling H_jj, so that those that matter most err least, and groups
have the grids of the original weights: what is stored is what `rtn` stores, with no order of
columns beside it. Without it a group's grid is made when it is reached, of the weights as
they then should be.

Source: Frantar et al., GPTQ, 2022 (arXiv:2210.17323); Chen et al., The Geometry of LLM
Quantization, 2025 (arXiv:2507.18553). Deviation: inputs that were always zero are rounded like
others; the authors set their weights to zero.
Shapes: n outputs, m inputs, g groups, c columns of a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits
from spectool.model.packed import FieldSpec
from spectool.options import option
from spectool.quantize.calibration import LinearStats, PackedFields, Statistic, Stream
from spectool.quantize.methods.rtn import RTN, RTNLinear, check_scale, fit_grid

# Columns whose errors are brought into all later ones at once.
SEGMENT = 128


class GPTQ:
    """The quantizer; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(RTN.Config):
        act_order: bool = option(True, "round inputs of large activations first")
        damping: float = option(
            0.01, "added to the diagonal of H, relative to its mean", minimum=0, maximum=1
        )

    statistics: ClassVar[Mapping[Statistic, Stream]] = {"hessian": "packed"}

    @classmethod
    def layout(cls, shape: tuple[int, int], config: GPTQ.Config) -> FieldSpec:
        return RTN.layout(shape, config)

    @classmethod
    def pack(
        cls,
        weight_nm: Tensor,
        stats: LinearStats | None,
        config: GPTQ.Config,
        generator: torch.Generator,
    ) -> PackedFields:
        """Without statistics as `rtn`."""
        if stats is None or stats.hessian is None:
            return RTN.pack(weight_nm, None, config, generator)
        n, m = weight_nm.shape
        columns, top = config.group_size or m, 2**config.bits - 1
        given = factor_hessian(stats.hessian, config.damping, by_size=config.act_order)
        order = given.order_m.tolist()
        step_ng, zero_ng, largest = fit_grid(weight_nm.float(), config)
        check_scale(float(largest))
        codes_mn = torch.empty(m, n, dtype=torch.uint8, device=weight_nm.device)

        def round_column(j: int, weight_mn: Tensor) -> Tensor:
            if not config.act_order and j and j % columns == 0:
                group, inside = slice(j // columns, j // columns + 1), slice(j, j + columns)
                whole_cn = weight_nm[:, inside].T.float()
                best_cn = whole_cn + torch.linalg.solve_triangular(
                    given.upper_mm[inside, inside].T,
                    weight_mn[inside] - whole_cn,
                    upper=False,
                    unitriangular=True,
                )
                grid = fit_grid(best_cn.T, config)
                step_ng[:, group], zero_ng[:, group], largest = grid
                check_scale(float(largest))
            group_j = order[j] // columns
            step_n, zero_n = step_ng[:, group_j].float(), zero_ng[:, group_j]
            code_n = (weight_mn[j] / step_n).round_().add_(zero_n).clamp_(0, top)
            codes_mn[order[j]] = code_n.to(torch.uint8)
            return step_n * (code_n - zero_n)

        # Groups whose grids are known have no need of weights that are up to date when they begin.
        compensate(weight_nm.float(), given, m if config.act_order else columns, round_column)
        fields = {"codes": pack_bits(codes_mn.T, config.bits), "scale": step_ng}
        if not config.symmetric:
            fields["zero"] = zero_ng.to(torch.uint8)
        return fields

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: GPTQ.Config) -> RTNLinear:
        return RTNLinear(spec, shape, config)


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """The order of the inputs [m]; in that order R_ij / R_jj [m, m] of the module docstring;
    R_jj^2 [m], what the squared error of an input's weights costs, made up for; and what was added
    to the diagonal of H [m]."""

    order_m: Tensor
    upper_mm: Tensor
    cost_m: Tensor
    added_m: Tensor


def factor_hessian(
    hessian_mm: Tensor, damping: float, *, by_size: bool = True, order_m: Tensor | None = None
) -> HessianFactor:
    """How errors are made up for; `by_size`: the inputs of large activations first; or in a given
    order.

    Raises:
        UnsupportedError: the inputs are not finite, or H is singular with this damping.
    """
    if order_m is None:
        order_m = torch.arange(len(hessian_mm), device=hessian_mm.device)
        if by_size:
            order_m = hessian_mm.diagonal().argsort(descending=True, stable=True)
    return HessianFactor(order_m, *_factor(hessian_mm, order_m, damping))


def compensate(
    weight_nm: Tensor,
    given: HessianFactor,
    columns: int,
    round_column: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Round the inputs in order, each time letting those that follow make up for the error; the
    squared error of each output [n] then, as a mean over the inputs' tokens.

    `round_column(j, weight_mn)` gives what the j-th in order becomes, [n], of weights [m, n] in
    that order: the j-th with what makes up for all errors before it, and where a group of `columns`
    begins all of the group with what makes up for those before; rows before j are spent. Several
    tries at once, of weights [tries, n, m], are [tries, n] of [m, tries, n].
    """
    order_m, upper_mm = given.order_m, given.upper_mm
    # An input's weights lie together, as they are taken together.
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
        excess_N += given.added_m[start:end] @ errors_cN.square_()
    # sum_j R_jj^2 (v_j - q_j)^2 = (w - q)^T R R^T (w - q), of which H is not all.
    return (given.cost_m @ rows_mN.square_() - excess_N).view(weight_mn.shape[1:])


def _segment_bounds(m: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ends of segments: no group begins inside one, so that its weights are up to date."""
    cuts = sorted({*range(0, m, SEGMENT), *range(0, m, columns), m})
    yield from itertools.pairwise(cuts)


def _factor(hessian_mm: Tensor, order_m: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `HessianFactor` has beside the order; in double precision, as H is often singular.

    Raises:
        UnsupportedError: the inputs are not finite, or H is singular with this damping.
    """
    if not torch.isfinite(hessian_mm).all():
        raise UnsupportedError(
            "its inputs are not finite on the calibration text", hint="--dtype float32"
        )
    # All in one place, as it is as large as a block of small models; turned round some rows at a
    # time. The lower factor of H back to front is R back to front.
    wide_mm = torch.empty_like(hessian_mm, dtype=torch.float64)
    back_m = order_m.flip(0)
    parts = (torch.split(each, SEGMENT) for each in (wide_mm, back_m))
    for wide_cm, back_c in zip(*parts, strict=True):
        wide_cm.copy_(hessian_mm[back_c[:, None], back_m])
    diagonal = wide_mm.diagonal()
    mean = float(diagonal.sum() / diagonal.count_nonzero().clamp(min=1)) or 1.0
    # An input that was never seen: the error of its weights is nobody's matter.
    added_m = damping * mean + mean * (diagonal == 0)
    diagonal += added_m
    # By columns, as LAPACK has it.
    place_mm = wide_mm.T
    failed = torch.zeros((), dtype=torch.int32, device=place_mm.device)
    torch.linalg.cholesky_ex(place_mm, out=(place_mm, failed))
    if failed:
        raise UnsupportedError(
            f"the second moments of its inputs are singular with a damping of {damping}",
            hint="a larger --damping, or more calibration text",
        )
    own_m = diagonal.clone()
    place_mm /= own_m
    upper_mm = torch.empty_like(hessian_mm)
    m = len(upper_mm)
    for start, end in _segment_bounds(m, m):
        upper_mm[start:end] = place_mm[m - end : m - start].flip(0, 1)
    return upper_mm, own_m.square().flip(0).float(), added_m.flip(0).float()
