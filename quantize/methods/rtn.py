"""Round to nearest (`rtn`): each group of weights on a uniform grid between its extremes.

Asymmetric: s = (max - min) / (2^b - 1) over the group and 0, z = round(-min / s),
q = clamp(round(w / s) + z), w' = s (q - z). Symmetric: s = 2 max|w| / (2^b - 1), z = 2^(b-1), not
stored. Groups run along the inputs; the last may be shorter.

Shapes: n outputs, m inputs, g groups, c columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear, TensorSpec
from spectool.options import option
from spectool.quantize.base import PackedFields, Quantizer
from spectool.quantize.statistics import LinearStats

# Rows are packed in pieces of about this many weights, to keep float32 temporaries in cache.
PIECE = 1 << 19

# The smallest and largest positive float16. Smaller scales are raised to the smallest, which is
# harmless next to larger ones; a matrix with no larger ones would become zeros and is refused.
SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0


class RTN(Quantizer):
    """Round to nearest; see the module docstring."""

    name = "rtn"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: int = option(4, "bits of a code", minimum=2, maximum=8)
        group_size: int = option(128, "weights that share a scale; 0: a whole row", minimum=0)
        symmetric: bool = option(False, "grid around zero, without a stored zero point")

    config: Config

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        groups = -(-m // (self.config.group_size or m))
        spec: dict[str, TensorSpec] = {
            "codes": (torch.uint8, (n, packed_bytes(m, self.config.bits))),
            "scale": (torch.float16, (n, groups)),
        }
        if not self.config.symmetric:
            spec["zero"] = (torch.uint8, (n, groups))
        return spec

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        rows = max(1, PIECE // weight_nm.shape[1])
        parts = [_pack_rows(part.float(), self.config) for part in torch.split(weight_nm, rows)]
        check_scale(float(torch.stack([largest for _, largest in parts]).max()))
        return {name: torch.cat([fields[name] for fields, _ in parts]) for name in parts[0][0]}

    def build(self, shape: tuple[int, int]) -> RTNLinear:
        return RTNLinear(self.layout(shape), shape, self.config)


def check_scale(largest: float) -> None:
    """Raise an UnsupportedError if float16 cannot represent the largest scale of a matrix."""
    if largest > SCALE_MAX or 0 < largest < SCALE_MIN:
        raise UnsupportedError(
            f"its weights need a scale of {largest:.3g}, and float16, which stores it, ranges "
            f"from {SCALE_MIN:.3g} to {SCALE_MAX:.0f}",
            hint="leave it dense with --skip, or rescale the checkpoint",
        )


def _pack_rows(weight_nm: Tensor, config: RTN.Config) -> tuple[PackedFields, Tensor]:
    """Pack some rows; return their fields and their largest scale before clamping."""
    m = weight_nm.shape[1]
    stored_ng, zero_ng, largest = fit_grid(weight_nm, config)
    weight_ngc = _split_groups(weight_nm, config.group_size)
    codes_ngc = (weight_ngc / stored_ng.float()[..., None]).round_().add_(zero_ng[..., None])
    codes_nm = codes_ngc.clamp_(0, 2**config.bits - 1).to(torch.uint8).flatten(1)[:, :m]
    fields = {"codes": pack_bits(codes_nm, config.bits), "scale": stored_ng}
    if not config.symmetric:
        fields["zero"] = zero_ng.to(torch.uint8)
    return fields, largest


def fit_grid(weight_nm: Tensor, config: RTN.Config) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the grid of float32 weights [n, m].

    Returns stored scales [n, g], zero points [n, g], and the largest scale before clamping.
    """
    top = 2**config.bits - 1
    weight_ngc = _split_groups(weight_nm, config.group_size)
    if config.symmetric:
        scale_ng = weight_ngc.abs().amax(-1) * (2 / top)
    else:
        low_ng = weight_ngc.amin(-1).clamp_(max=0)
        high_ng = weight_ngc.amax(-1).clamp_(min=0)
        scale_ng = (high_ng - low_ng) / top
    # Rounded to float16 before the codes are computed, so that codes are nearest on the stored
    # grid. A group of zeros may have any scale; 1 keeps the division finite and the zeros exact.
    stored_ng = torch.where(scale_ng == 0, 1.0, scale_ng.clamp(SCALE_MIN, SCALE_MAX)).half()
    if config.symmetric:
        zero_ng = torch.full_like(scale_ng, 2 ** (config.bits - 1))
    else:
        zero_ng = (-low_ng / stored_ng.float()).round_().clamp_(0, top)
    return stored_ng, zero_ng, scale_ng.max()


def _split_groups(rows_nm: Tensor, group_size: int) -> Tensor:
    """Split rows [n, m] into groups [n, g, c], the last one padded with zeros."""
    n, m = rows_nm.shape
    columns = min(group_size or m, m)
    # Zeros are on every grid, so they change no scale. Padding by nothing would copy.
    padded_nm = F.pad(rows_nm, (0, -m % columns)) if m % columns else rows_nm
    return padded_nm.reshape(n, -1, columns)


class RTNLinear(PackedLinear):
    """Packed linear of `rtn` and `gptq`.

    Fields: codes U8 [n, bit-packed row], scale F16 [n, g], zero U8 [n, g] unless symmetric.
    """

    config: RTN.Config

    def rows(self, rows: slice | Tensor) -> Tensor:
        codes_nm = unpack_bits(self.q.codes[rows], self.config.bits, self.in_features)
        codes_ngc = _split_groups(codes_nm, self.config.group_size).float()
        if self.config.symmetric:
            codes_ngc -= 2 ** (self.config.bits - 1)
        else:
            codes_ngc -= self.q.zero[rows].float()[..., None]
        codes_ngc *= self.q.scale[rows].float()[..., None]
        return codes_ngc.flatten(1)[:, : self.in_features]

    def segments(self) -> list[Segment]:
        bits, symmetric, m = self.config.bits, self.config.symmetric, self.in_features
        return [
            Segment(
                codes=unpack_bits(self.q.codes, bits, m),
                bits=bits,
                group_size=min(self.config.group_size or m, m),
                scale=self.q.scale.float(),
                zero=None if symmetric else self.q.zero.float(),
                center=2 ** (bits - 1) if symmetric else 0,
            )
        ]
