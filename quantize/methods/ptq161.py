"""PTQ1.61 (`ptq161`): a fifth of the columns at 4 bits, signs with fitted scales for the rest.

Salient columns S of a matrix are the k inputs of largest activation, as the original model feeds
them: sigma_j = max_t |X_tj|, or the mean. They get rtn's asymmetric 4-bit grid, a row a group. Of
the other columns only signs are stored:

    W'_ij = r1_i r2_j (alpha_i B_ij + mu_i),   B_ij = +1 if W_ij >= mu_i else -1,

with mu_i the row's mean over them. alpha, r1 and r2 are fitted one decoder block at a time, B and
mu are constants: see `fitting.py`.

With `compensate` (not in the paper) columns are rounded one after another, the salient ones first,
and W is what `gptq` makes of the weights by then: later columns make up for the errors of earlier
ones. Alpha is tried 1 to 1.8 times as large, and then the best for these signs in the outputs.

What is stored of the scales: row_a = alpha r1, row_b = mu r1, col_r = r2, as float16. Both kinds of
columns are multiplied by sums that all rows share; see `PTQ161Linear`.

Source: Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179); its preprocessing is `preprocess.py`.
Deviations, with what they are worth, are in docs/concepts/ptq161.md.
Shapes: n outputs, m inputs, k salient of them, r others, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.calibration import (
    Block,
    Fitted,
    LinearStats,
    PackedFields,
    Statistic,
    Stream,
    Streams,
    Tick,
)
from spectool.quantize.fitting import fit_block, init_linears
from spectool.quantize.methods.gptq import HessianFactor, compensate, factor_hessian
from spectool.quantize.methods.rtn import RTN, SCALE_MAX, check_scale

# The salient columns' grid.
SALIENT = RTN.Config(bits=4, group_size=0)

# As `gptq` has it.
DAMPING = 0.01
# So many times as large as that of single weights is alpha tried.
WIDTHS = (1.0, 1.2, 1.4, 1.6, 1.8)

# The fields that the fit changes.
LEARNED = ("row_a", "row_b", "col_r")


class PTQ161:
    """The quantizer; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        ratio: float = option(0.2, "share of salient columns", minimum=0, maximum=1)
        saliency: Literal["mean", "max"] = option(
            "mean", "what of the activations ranks the columns"
        )
        epochs: int = option(20, "passes over the calibration sequences", minimum=0)
        compensate: bool = option(
            True, "let later columns make up for the errors of earlier ones, as gptq does"
        )
        lr: float = option(3e-2, "learning rate at the start, relative to the scales", minimum=0)

    statistics: ClassVar[Mapping[Statistic, Stream]] = {
        "absmax": "original",
        "mean_abs": "original",
        "hessian": "packed",
    }

    @classmethod
    def layout(cls, shape: tuple[int, int], config: PTQ161.Config) -> FieldSpec:
        n, m = shape
        k = num_salient(m, config.ratio)
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

    @classmethod
    def pack(
        cls,
        weight_nm: Tensor,
        stats: LinearStats | None,
        config: PTQ161.Config,
        generator: torch.Generator,
    ) -> PackedFields:
        """One matrix before the fit: r1 = r2 = 1."""
        weight_nm = weight_nm.float()
        num = num_salient(weight_nm.shape[1], config.ratio)
        salient_m = mask_salient(_column_saliency(weight_nm, stats, config), num)
        high = _pack_salient(weight_nm[:, salient_m], generator)
        rest_nr = weight_nm[:, ~salient_m]
        # Of no columns the mean is 0 here, not NaN.
        mu_n = rest_nr.sum(1) / max(1, rest_nr.shape[1])
        rest_nr -= mu_n[:, None]
        # The least squares scale of B. The paper has mean |W|, which is the same where mu is 0, and
        # doubles a row of equal weights where it is not.
        alpha_n = rest_nr.abs().sum(1) / max(1, rest_nr.shape[1])
        check_scale(float((alpha_n + mu_n.abs()).max()))
        signs_nr = rest_nr >= 0
        if config.compensate and stats is not None and stats.hessian is not None:
            moment_m = stats.hessian.diagonal()
            order_m = (moment_m + salient_m * moment_m.max()).argsort(descending=True, stable=True)
            given = factor_hessian(stats.hessian, DAMPING, order_m=order_m)
            tried = [
                _round_compensated(
                    weight_nm, salient_m, high, width * alpha_n, mu_n, stats.hessian, given
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

    @classmethod
    def fit_bytes(cls, config: PTQ161.Config) -> int:
        """Signs and salient columns as numbers."""
        return 4

    @classmethod
    def fit(
        cls,
        block: Block,
        streams: Streams | None,
        stats: dict[str, LinearStats],
        config: PTQ161.Config,
        generator: torch.Generator,
        tick: Tick,
    ) -> Fitted:
        if not block.weights:
            return Fitted({})
        assert streams is not None and block.module is not None
        linears: dict[str, PTQ161Linear] = init_linears(cls, block, stats, config, generator)
        fitted = fit_block(
            block,
            streams,
            linears,
            lambda name, dtype: Part(linears[name], dtype),
            lambda parts: [
                torch.optim.AdamW(
                    [p for part in parts for p in part.parameters()], lr=config.lr, weight_decay=0.0
                )
            ],
            epochs=config.epochs,
            generator=generator,
            tick=tick,
        )
        flipped = sum(int((fields["row_a"] < 0).sum()) for fields in fitted.fields.values())
        fitted.report["rows_flipped"] = flipped
        return fitted

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: PTQ161.Config) -> PTQ161Linear:
        return PTQ161Linear(spec, shape)


def num_salient(m: int, ratio: float) -> int:
    """Salient columns of m inputs: the share, less what fills the last 32-bit word of the signs.

    4096 inputs have 800 instead of 819, which saves 0.02 bits. Where it would take more than a
    tenth of them, as in small matrices, the word keeps its padding.
    """
    k = math.floor(ratio * m)
    spare = -(m - k) % 32
    return k - spare if 10 * spare <= k else k


def mask_salient(sigma_m: Tensor, k: int) -> Tensor:
    """Mask [m] of the k largest; of equal ones the first."""
    salient_m = torch.zeros(len(sigma_m), dtype=torch.bool, device=sigma_m.device)
    salient_m[sigma_m.argsort(descending=True, stable=True)[:k]] = True
    return salient_m


def _column_saliency(weight_nm: Tensor, stats: LinearStats | None, config: PTQ161.Config) -> Tensor:
    """What ranks the columns; without statistics the mean of |w|.

    Raises:
        UnsupportedError: the activations are not finite.
    """
    if stats is None:
        return weight_nm.abs().mean(0)
    sigma_m = stats.absmax if config.saliency == "max" else stats.mean_abs
    assert sigma_m is not None
    if not torch.isfinite(sigma_m).all():
        raise UnsupportedError(
            "its inputs are not finite on the calibration text", hint="--dtype float32"
        )
    return sigma_m


def _pack_salient(weight_nk: Tensor, generator: torch.Generator) -> PackedFields:
    n, k = weight_nk.shape
    if not k:
        return {
            "hi": torch.zeros(n, 0, dtype=torch.uint8, device=weight_nk.device),
            "hi_scale": torch.ones(n, dtype=torch.float16, device=weight_nk.device),
            "hi_zero": torch.zeros(n, dtype=torch.uint8, device=weight_nk.device),
        }
    packed = RTN.pack(weight_nk, None, SALIENT, generator)
    return {
        "hi": packed["codes"],
        "hi_scale": packed["scale"][:, 0],
        "hi_zero": packed["zero"][:, 0],
    }


def _round_compensated(
    weight_nm: Tensor,
    salient_m: Tensor,
    high: PackedFields,
    alpha_n: Tensor,
    mu_n: Tensor,
    hessian_mm: Tensor,
    given: HessianFactor,
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The squared error of the outputs, codes of the salient columns, signs of the others, and the
    alpha that is best for them."""
    is_salient, order = salient_m.tolist(), given.order_m.tolist()
    step_n, zero_n = high["hi_scale"].float(), high["hi_zero"].float()
    n, m = weight_nm.shape
    made_mn = torch.empty(m, n, device=weight_nm.device)
    codes_mn = torch.empty_like(made_mn, dtype=torch.uint8)

    def round_column(j: int, weight_mn: Tensor) -> Tensor:
        place, column_n = order[j], weight_mn[j]
        if is_salient[place]:
            code_n = (column_n / step_n).round_().add_(zero_n).clamp_(0, 15)
            made_mn[place] = step_n * (code_n - zero_n)
        else:
            code_n = (column_n >= mu_n).float()
            made_mn[place] = mu_n + alpha_n * (2 * code_n - 1)
        codes_mn[place] = code_n.to(torch.uint8)
        return made_mn[place]

    error_n = compensate(weight_nm, given, m, round_column)
    codes_nm = codes_mn.T.contiguous()
    apart_nm = made_mn.T - weight_nm
    # With the signs known the best alpha is that of least squares, row by row.
    signs_nm = torch.where(salient_m, 0.0, 2 * codes_nm.float() - 1)
    pulled_nm = signs_nm @ hessian_mm
    slope_n = (pulled_nm * apart_nm).sum(1)
    gain_n = -slope_n / (pulled_nm * signs_nm).sum(1).clamp(min=1e-30)
    error = float((error_n + gain_n * slope_n).sum())
    hi, lo = pack_bits(codes_nm[:, salient_m], 4), codes_nm[:, ~salient_m].bool()
    return error, hi, lo, alpha_n + gain_n


class Part(nn.Module):
    """One matrix during the fit: signs and salient columns as constants, alpha, r1 and r2 to train.

    alpha is trained as a multiple `gain_n` of its start, so that one learning rate fits all three,
    whatever the size of a model's weights.

    Its product is taken in the order of the format, so that no gradient of a whole matrix is ever
    made: two thirds of the work, and n + m values instead of n m.
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
        low = (x.index_select(-1, self.low) * self.r2_r).to(x.dtype)
        a_n, b_n = self.rows()
        out = a_n * F.linear(low, self.signs_nr)
        out = out + b_n * low.sum(-1, keepdim=True, dtype=torch.float32)
        return (out + F.linear(x.index_select(-1, self.high), self.high_nk)).to(x.dtype)

    def rows(self) -> tuple[Tensor, Tensor]:
        """What rows are scaled by and shifted by: alpha r1 and mu r1."""
        return self.alpha_n * self.gain_n * self.r1_n, self.mu_n * self.r1_n

    @torch.no_grad()
    def store(self) -> None:
        """Write the present scales into the linear's fields."""
        for field, value in zip(LEARNED, (*self.rows(), self.r2_r), strict=True):
            self.linear.q.get_buffer(field).copy_(value.clamp(-SCALE_MAX, SCALE_MAX))


class PTQ161Linear(PackedLinear):
    """Fields: mask U8 [packed m], hi U8 [n, packed k], hi_scale F16 [n], hi_zero U8 [n],
    lo U8 [n, packed r] (1 is +1), row_a F16 [n], row_b F16 [n], col_r F16 [r].

    Columns of `hi` and of `lo` are those in and outside the mask, in their order.
    """

    def salient(self) -> Tensor:
        """The mask [m]."""
        return unpack_bits(self.q.mask[None], 1, self.in_features)[0].bool()

    def columns(self) -> tuple[Tensor, Tensor]:
        """Places of the salient inputs [k] and of the others [r]."""
        salient_m = self.salient()
        return salient_m.nonzero()[:, 0], (~salient_m).nonzero()[:, 0]

    def constants(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Salient columns [., k] and signs [., r] of some rows, float32."""
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

    def forward(self, x: Tensor) -> Tensor:
        """By sums of x that all rows share: with low = x r2 over the others and high = x over S,

        y_i = 2 a_i P_i + (b_i - a_i) sum(low) + s_i (Q_i - z_i sum(high)),

        P_i the sum of low where the bit is set, Q_i that of high times the codes. In float32, as
        the differences cancel most of what half types hold.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        high, low = (wide.index_select(-1, places) for places in self.columns())
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
        return unpack_bits(self.q.lo[rows], 1, len(self.q.col_r), dtype)

    def _codes(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        return unpack_bits(self.q.hi[rows], 4, self.in_features - len(self.q.col_r), dtype)
