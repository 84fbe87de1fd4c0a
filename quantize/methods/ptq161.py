"""PTQ1.61 (`ptq161`): salient columns at 4 bits, signs with fitted scales for the others.

The salient columns of a matrix are its k inputs of largest activation in the original model,
max_t |X_tj| or the mean. They are stored on the asymmetric 4-bit grid of `rtn`, one group per row.
The other columns are binarised:

    W'_ij = r1_i r2_j (alpha_i B_ij + mu_i),   B_ij = +1 if W_ij >= mu_i else -1,

with mu_i the row's mean over these columns. alpha, r1 and r2 are fitted per block (`fitting.py`);
B and mu are constants. Stored in float16: row_a = alpha r1, row_b = mu r1, col_r = r2.

With `compensate` (not in the paper) columns are rounded one by one with compensation as in `gptq`,
the salient ones first. alpha is tried 1 to 1.8 times as large, and then set to the least squares
optimum of the outputs for the resulting signs.

Source: Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179); its preprocessing is `preprocess.py`.
Deviations and their measured effects are listed in docs/concepts/ptq161.md.
Shapes: n outputs, m inputs, k salient of them, r others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.base import FitReport, PackedFields, Statistics
from spectool.quantize.fitting import BlockQuantizer, TrainableMatrix
from spectool.quantize.methods.gptq import DAMPING, HessianFactor, compensate, factor_hessian
from spectool.quantize.methods.rtn import RTN, SCALE_MAX, check_scale
from spectool.quantize.statistics import LinearStats

# Grid of the salient columns.
SALIENT = RTN(RTN.Config(bits=4, group_size=0))

# alpha is tried this many times as large as without compensation.
WIDTHS = (1.0, 1.2, 1.4, 1.6, 1.8)

# Fields that the fit changes.
FITTED_FIELDS = ("row_a", "row_b", "col_r")


class PTQ161(BlockQuantizer):
    """PTQ1.61; see the module docstring."""

    name = "ptq161"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        ratio: float = option(0.2, "share of salient columns", minimum=0, maximum=1)
        saliency: Literal["mean", "max"] = option(
            "mean", "statistic of the activations that ranks the columns"
        )
        epochs: int = option(20, "passes over the calibration sequences", minimum=0)
        compensate: bool = option(True, "compensate rounding errors by later columns, as gptq does")
        lr: float = option(3e-2, "learning rate at the start, relative to the scales", minimum=0)

    config: Config
    statistics: ClassVar[Statistics] = {
        "absmax": "original",
        "mean_abs": "original",
        "hessian": "packed",
    }

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        k = num_salient(m, self.config.ratio)
        return {
            "mask": (torch.uint8, (packed_bytes(m, 1),)),
            "hi": (torch.uint8, (n, packed_bytes(k, 4))),
            "hi_scale": (torch.float16, (n,)),
            "hi_zero": (torch.uint8, (n,)),
            "lo": (torch.uint8, (n, packed_bytes(m - k, 1))),
            "row_a": (torch.float16, (n,)),
            "row_b": (torch.float16, (n,)),
            "col_r": (torch.float16, (m - k,)),
        }

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix, as it is before the fit: r1 = r2 = 1."""
        weight_nm = weight_nm.float()
        num = num_salient(weight_nm.shape[1], self.config.ratio)
        salient_m = mask_salient(_column_saliency(weight_nm, stats, self.config), num)
        high = _pack_salient(weight_nm[:, salient_m], generator)
        rest_nr = weight_nm[:, ~salient_m]
        # Without other columns the mean is 0, not NaN.
        mu_n = rest_nr.sum(1) / max(1, rest_nr.shape[1])
        rest_nr -= mu_n[:, None]
        # The least squares scale of B. The paper uses mean |W|, which is the same for mu = 0 but
        # doubles a row of equal weights otherwise.
        alpha_n = rest_nr.abs().sum(1) / max(1, rest_nr.shape[1])
        check_scale(float((alpha_n + mu_n.abs()).max()))
        signs_nr = rest_nr >= 0
        if self.config.compensate and stats is not None and stats.hessian is not None:
            diagonal_m = stats.hessian.diagonal()
            # Salient columns first, each kind in decreasing order of H_jj.
            rank_m = diagonal_m + salient_m * diagonal_m.max()
            order_m = rank_m.argsort(descending=True, stable=True)
            factor = factor_hessian(stats.hessian, DAMPING, order_m=order_m)
            tried = [
                _round_compensated(
                    weight_nm, salient_m, high, width * alpha_n, mu_n, stats.hessian, factor
                )
                for width in WIDTHS
            ]
            _, high["hi"], signs_nr, alpha_n = min(tried, key=lambda each: each[0])
        return {
            "mask": pack_bits(salient_m[None].to(torch.uint8), 1)[0],
            **high,
            "lo": pack_bits(signs_nr.to(torch.uint8), 1),
            "row_a": alpha_n.half(),
            "row_b": mu_n.half(),
            "col_r": torch.ones(rest_nr.shape[1], dtype=torch.float16, device=weight_nm.device),
        }

    def fit_bytes(self) -> int:
        """Return the bytes per weight of signs and salient columns in the compute dtype."""
        return 4

    def make_trainable(
        self, linear: Any, weight_nm: Tensor, diagonal_m: Tensor | None, dtype: torch.dtype
    ) -> TrainedScales:
        return TrainedScales(linear, dtype)

    def make_optimizers(self, parts: Sequence[nn.Module]) -> Sequence[torch.optim.Optimizer]:
        trained = [p for part in parts for p in part.parameters()]
        return [torch.optim.AdamW(trained, lr=self.config.lr, weight_decay=0.0)]

    def extend_report(
        self, report: FitReport, before: Mapping[str, PackedFields], linears: Mapping[str, Any]
    ) -> FitReport:
        flipped = sum(int((linear.q.row_a < 0).sum()) for linear in linears.values())
        return replace(report, rows_flipped=flipped)

    def build(self, shape: tuple[int, int]) -> PTQ161Linear:
        return PTQ161Linear(self.layout(shape), shape)


def num_salient(m: int, ratio: float) -> int:
    """Return the number of salient columns of m inputs.

    It is the share `ratio`, reduced until the signs fill whole 32-bit words: 800 instead of 819 of
    4096 inputs, which saves 0.02 bits. Small matrices, where that takes more than a tenth of the
    salient columns, keep the padding.
    """
    k = math.floor(ratio * m)
    spare = -(m - k) % 32
    return k - spare if 10 * spare <= k else k


def mask_salient(saliency_m: Tensor, k: int) -> Tensor:
    """Return a mask [m] of the k largest saliencies; of equal ones the first."""
    salient_m = torch.zeros(len(saliency_m), dtype=torch.bool, device=saliency_m.device)
    salient_m[saliency_m.argsort(descending=True, stable=True)[:k]] = True
    return salient_m


def _column_saliency(weight_nm: Tensor, stats: LinearStats | None, config: PTQ161.Config) -> Tensor:
    """Return the saliency [m] of each column; without statistics the mean of |w|."""
    if stats is None:
        return weight_nm.abs().mean(0)
    saliency_m = stats.absmax if config.saliency == "max" else stats.mean_abs
    assert saliency_m is not None
    if not torch.isfinite(saliency_m).all():
        raise UnsupportedError(
            "its inputs are not finite on the calibration text", hint="--dtype float32"
        )
    return saliency_m


def _pack_salient(weight_nk: Tensor, generator: torch.Generator) -> PackedFields:
    """Pack the salient columns [n, k] on the grid of `rtn`."""
    n, k = weight_nk.shape
    if not k:
        return {
            "hi": torch.zeros(n, 0, dtype=torch.uint8, device=weight_nk.device),
            "hi_scale": torch.ones(n, dtype=torch.float16, device=weight_nk.device),
            "hi_zero": torch.zeros(n, dtype=torch.uint8, device=weight_nk.device),
        }
    fields = SALIENT.pack(weight_nk, None, generator)
    return {
        "hi": fields["codes"],
        "hi_scale": fields["scale"][:, 0],
        "hi_zero": fields["zero"][:, 0],
    }


def _round_compensated(
    weight_nm: Tensor,
    salient_m: Tensor,
    high: PackedFields,
    alpha_n: Tensor,
    mu_n: Tensor,
    hessian_mm: Tensor,
    factor: HessianFactor,
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Round column by column with compensation.

    Returns the squared error of the outputs, bit-packed codes of the salient columns, signs
    [n, r] of the others, and the optimal alpha [n] for these signs.
    """
    is_salient, order = salient_m.tolist(), factor.order_m.tolist()
    step_n, zero_n = high["hi_scale"].float(), high["hi_zero"].float()
    n, m = weight_nm.shape
    rounded_mn = torch.empty(m, n, device=weight_nm.device)
    codes_mn = torch.empty_like(rounded_mn, dtype=torch.uint8)

    def round_column(j: int, weight_mn: Tensor) -> Tensor:
        column, column_n = order[j], weight_mn[j]
        if is_salient[column]:
            code_n = (column_n / step_n).round_().add_(zero_n).clamp_(0, 15)
            rounded_mn[column] = step_n * (code_n - zero_n)
        else:
            code_n = (column_n >= mu_n).float()
            rounded_mn[column] = mu_n + alpha_n * (2 * code_n - 1)
        codes_mn[column] = code_n.to(torch.uint8)
        return rounded_mn[column]

    error_n = compensate(weight_nm, factor, m, round_column)
    codes_nm = codes_mn.T.contiguous()
    error_nm = rounded_mn.T - weight_nm
    # For fixed signs B the optimal alpha is that of least squares per row, with errors E:
    # alpha + gain, gain = -(B H E^T)_ii / (B H B^T)_ii.
    signs_nm = torch.where(salient_m, 0.0, 2 * codes_nm.float() - 1)
    signs_hessian_nm = signs_nm @ hessian_mm
    slope_n = (signs_hessian_nm * error_nm).sum(1)
    gain_n = -slope_n / (signs_hessian_nm * signs_nm).sum(1).clamp(min=1e-30)
    error = float((error_n + gain_n * slope_n).sum())
    hi, lo = pack_bits(codes_nm[:, salient_m], 4), codes_nm[:, ~salient_m].bool()
    return error, hi, lo, alpha_n + gain_n


class TrainedScales(TrainableMatrix):
    """One matrix in training: alpha, r1 and r2, with constant signs and salient columns.

    alpha is trained as a multiple `gain_n` of its start, so that one learning rate suits all three
    whatever the size of the weights.
    """

    def __init__(self, linear: PTQ161Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.high, self.low = linear.columns()
        self.high_nk, self.signs_nr = (
            torch.cat(pieces).to(dtype)
            for pieces in zip(*map(linear.constants, linear.row_slices()), strict=True)
        )
        self.alpha_n, self.mu_n = linear.q.row_a.float(), linear.q.row_b.float()
        self.gain_n = nn.Parameter(torch.ones_like(self.alpha_n))
        self.r1_n = nn.Parameter(torch.ones_like(self.alpha_n))
        self.r2_r = nn.Parameter(linear.q.col_r.float())

    def forward(self, x: Tensor) -> Tensor:
        # Scales are applied to x and to the outputs, never to a weight matrix: gradients have
        # n + m values instead of n m, at two thirds of the work.
        low = (x.index_select(-1, self.low) * self.r2_r).to(x.dtype)
        a_n, b_n = self.rows()
        out = a_n * F.linear(low, self.signs_nr)
        out = out + b_n * low.sum(-1, keepdim=True, dtype=torch.float32)
        return (out + F.linear(x.index_select(-1, self.high), self.high_nk)).to(x.dtype)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return scale alpha r1 and shift mu r1 of each row [n]."""
        return self.alpha_n * self.gain_n * self.r1_n, self.mu_n * self.r1_n

    @torch.no_grad()
    def store(self) -> None:
        """Write the current scales into the linear's fields."""
        for field, value in zip(FITTED_FIELDS, (*self.rows(), self.r2_r), strict=True):
            self.linear.q.get_buffer(field).copy_(value.clamp(-SCALE_MAX, SCALE_MAX))


class PTQ161Linear(PackedLinear):
    """Packed linear of `ptq161`.

    Fields: mask U8 [bit-packed m], hi U8 [n, bit-packed k], hi_scale F16 [n], hi_zero U8 [n],
    lo U8 [n, bit-packed r] (bit 1 is +1), row_a F16 [n], row_b F16 [n], col_r F16 [r]. Columns of
    `hi` are those in the mask and columns of `lo` the others, in order.
    """

    def salient(self) -> Tensor:
        """Unpack the mask [m] of salient columns."""
        return unpack_bits(self.q.mask[None], 1, self.in_features)[0].bool()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the salient columns [k] and of the others [r]."""
        salient_m = self.salient()
        return salient_m.nonzero()[:, 0], (~salient_m).nonzero()[:, 0]

    def constants(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Unpack salient columns [., k] and signs [., r] of some rows, in float32."""
        codes_nk = self._codes(rows, torch.float32)
        high_nk = self.q.hi_scale[rows, None].float() * (codes_nk - self.q.hi_zero[rows, None])
        return high_nk, 2 * self._bits(rows, torch.float32) - 1

    def rows(self, rows: slice | Tensor) -> Tensor:
        high, low = self.columns()
        high_nk, signs_nr = self.constants(rows)
        weight_nm = high_nk.new_empty(len(high_nk), self.in_features)
        weight_nm[:, high] = high_nk
        low_nr = signs_nr.mul_(self.q.row_a[rows, None]).add_(self.q.row_b[rows, None])
        weight_nm[:, low] = low_nr * self.q.col_r
        return weight_nm

    def segments(self) -> list[Segment]:
        high, low = self.columns()
        a_n, b_n = self.q.row_a.float(), self.q.row_b.float()
        found = []
        if len(low):
            found.append(
                Segment(
                    codes=self._bits(slice(None), torch.uint8),
                    bits=1,
                    group_size=len(low),
                    # a B + b with bits for B: 2 a bit + b - a.
                    scale=2 * a_n[:, None],
                    offset=(b_n - a_n)[:, None],
                    columns=low,
                    column_scale=self.q.col_r.float(),
                )
            )
        if len(high):
            found.append(
                Segment(
                    codes=self._codes(slice(None), torch.uint8),
                    bits=4,
                    group_size=len(high),
                    scale=self.q.hi_scale.float()[:, None],
                    zero=self.q.hi_zero.float()[:, None],
                    columns=high,
                )
            )
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Compute the product from codes and bits, without dequantizing the matrix.

        With low = x r2 over the other columns, high = x over the salient ones, P_i the sum of low
        where row i's bit is set and Q_i the sum of high times its codes,

            y_i = 2 a_i P_i + (b_i - a_i) sum(low) + s_i (Q_i - z_i sum(high)).
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        # In float32: the differences cancel most digits of a half type.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        high, low = (wide.index_select(-1, columns) for columns in self.columns())
        low *= self.q.col_r
        sum_high, sum_low = high.sum(-1, keepdim=True), low.sum(-1, keepdim=True)
        out = []
        for rows in self.row_slices():
            a, b, s, z = (
                self.q.get_buffer(name)[rows].to(wide.dtype)
                for name in ("row_a", "row_b", "hi_scale", "hi_zero")
            )
            y = F.linear(high, self._codes(rows, wide.dtype))
            y.addcmul_(sum_high, z, value=-1).mul_(s).addcmul_(sum_low, b - a)
            out.append(y.addcmul_(F.linear(low, self._bits(rows, wide.dtype)), 2 * a))
        y = torch.cat(out, -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _bits(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Unpack the bits [., r] of some rows."""
        return unpack_bits(self.q.lo[rows], 1, len(self.q.col_r), dtype)

    def _codes(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Unpack the codes [., k] of the salient columns of some rows."""
        return unpack_bits(self.q.hi[rows], 4, self.in_features - len(self.q.col_r), dtype)
