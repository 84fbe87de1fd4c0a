"""HQQ (`hqq`): data-free; zero points optimised for a sparse error.

The scale of a group is s = (max - min) / (2^b - 1). Its zero point z, a real number here, minimises
the p-norm of the errors with p = 0.7, which favours a few large errors over many medium ones. With
v = w / s, half-quadratic splitting with the auxiliary error e alternates

    q = clamp(round(v + z)),   e = shrink(v + z - q),   z = mean(q - v + e),

shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta), with beta growing by 1 % per round. Each group
keeps the z of least norm of all rounds.

Source: Badri and Shaji, HQQ, 2023 (mobiusml.github.io/hqq_blog). Deviations: errors are in steps of
the grid, not in units of the weights, where the authors' beta shrinks every error of usual weights
to zero; the best round is chosen per group by the norm, where the authors stop a whole matrix at
the first round without a gain.
Shapes: n outputs, m inputs, g groups, c columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.kernels.pack import pack_bits
from spectool.model.packed import FieldSpec
from spectool.options import option
from spectool.quantize.base import PackedFields, Quantizer
from spectool.quantize.methods.rtn import PIECE, RTN, SCALE_MAX, SCALE_MIN, RTNLinear, check_scale
from spectool.quantize.statistics import LinearStats

ROUNDS = 20
# p, the initial beta and its growth per round, as the authors have them.
NORM = 0.7
BETA, GROWTH = 10.0, 1.01
# Integers up to this are exact in float16.
LARGEST_EXACT = 2048


class HQQ(Quantizer):
    """HQQ; see the module docstring."""

    name = "hqq"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: int = option(4, "bits of a code", minimum=2, maximum=8)
        group_size: int = option(64, "weights that share a scale; 0: a whole row", minimum=0)

    config: Config

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        spec = RTN(_rtn_config(self.config)).layout(shape)
        return {**spec, "zero": (torch.float16, spec["zero"][1])}

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        rows = max(1, PIECE // weight_nm.shape[1])
        parts = [_pack_rows(part.float(), self.config) for part in torch.split(weight_nm, rows)]
        check_scale(max(largest for _, largest in parts))
        return {name: torch.cat([fields[name] for fields, _ in parts]) for name in parts[0][0]}

    def build(self, shape: tuple[int, int]) -> RTNLinear:
        return RTNLinear(self.layout(shape), shape, _rtn_config(self.config))


def _rtn_config(config: HQQ.Config) -> RTN.Config:
    """Return the options of `rtn` with the same bits and groups."""
    return RTN.Config(bits=config.bits, group_size=config.group_size)


def _pack_rows(weight_nm: Tensor, config: HQQ.Config) -> tuple[PackedFields, float]:
    """Pack some rows; return their fields and their largest scale before clamping."""
    n, m = weight_nm.shape
    columns = min(config.group_size or m, m)
    # The last group is padded with its last weight, which changes no extreme.
    padded_nm = F.pad(weight_nm, (0, -m % columns), mode="replicate")
    weight_ngc = padded_nm.view(n, -1, columns)
    low_ng, high_ng = weight_ngc.amin(-1), weight_ngc.amax(-1)
    scale_ng = (high_ng - low_ng) / (2**config.bits - 1)
    # A group of nearly equal weights far from zero has a large zero point, -low / scale: widen its
    # scale until float16 holds the zero point to within one step.
    far_ng = torch.maximum(low_ng.abs(), high_ng.abs())
    scale_ng = torch.maximum(scale_ng, far_ng / LARGEST_EXACT)
    # A group of zeros may have any scale.
    scale_ng = torch.where(scale_ng == 0, 1.0, scale_ng)
    largest = float(scale_ng.max())
    stored_ng = scale_ng.clamp(SCALE_MIN, SCALE_MAX).half()
    steps_ngc = weight_ngc / stored_ng.float()[..., None]
    zero_ng = solve(steps_ngc, -low_ng / stored_ng.float(), config.bits)
    codes_ngc = _round_to_codes(steps_ngc, zero_ng, config.bits)
    codes_nm = codes_ngc.to(torch.uint8).flatten(1)[:, :m]
    return {"codes": pack_bits(codes_nm, config.bits), "scale": stored_ng, "zero": zero_ng}, largest


def solve(steps_ngc: Tensor, zero_ng: Tensor, bits: int) -> Tensor:
    """Optimise zero points [n, g] from a start, for weights in steps of their grid; in float16."""
    best_norm_ng = torch.full_like(zero_ng, torch.inf)
    best_zero_ng = zero_ng
    beta = BETA
    for _ in range(ROUNDS):
        zero_ng = zero_ng.clamp(-SCALE_MAX, SCALE_MAX).half().float()
        codes_ngc = _round_to_codes(steps_ngc, zero_ng, bits)
        error_ngc = steps_ngc + zero_ng[..., None] - codes_ngc
        norm_ng = error_ngc.abs().pow(NORM).sum(-1)
        better_ng = norm_ng < best_norm_ng
        best_norm_ng = torch.where(better_ng, norm_ng, best_norm_ng)
        best_zero_ng = torch.where(better_ng, zero_ng, best_zero_ng)
        zero_ng = (codes_ngc - steps_ngc + _shrink(error_ngc, beta)).mean(-1)
        beta *= GROWTH
    return best_zero_ng.half()


def _round_to_codes(steps_ngc: Tensor, zero_ng: Tensor, bits: int) -> Tensor:
    """Round weights in steps of their grid to codes [n, g, c], as floats."""
    return (steps_ngc + zero_ng[..., None].float()).round_().clamp_(0, 2**bits - 1)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """Apply the generalised soft threshold: zero for small x, slightly smaller for large x."""
    size = x.abs()
    # 0^(p-1) is infinite.
    cut = torch.where(size > 0, size.pow(NORM - 1) / beta, 0.0)
    return x.sign() * (size - cut).clamp_(min=0)
