"""OliVe (`olive`): outlier-victim pairs; an outlier is stored at the cost of its neighbour.

Inputs 2t and 2t + 1 of a row form a pair. Codes are integers times the row's scale, of a normal
type or, for outliers, of the type `abfloat`, whose values begin above the normal range,

    int4    -7 ... 7, two's complement          abfloat +-12, 16, 24, 32, 48, 64, 96
    flint4  0, +-1, 2, 3, 4, 6, 8, 16           abfloat +-24, 32, 48, 64, 96, 128, 192
    int8    -127 ... 127, two's complement      abfloat +-144 ... 2^15, four bits of exponent

abfloat: +-(2^m + mantissa) 2^(exponent + bias), m mantissa bits. The code 1000...0 of the normal
types marks the victim, a zero whose neighbour is an abfloat. Of two outliers in a pair the smaller
becomes the victim. With mu and sigma of the row and T = f max(|mu + 3 sigma|, |mu - 3 sigma|), the
scale is T / (largest normal value); f from 0.75 to 2.49 is searched for the least squared error of
the row. The type of the given width with the least error of the matrix is used.

`olive-activations` also rounds the inputs in this way, with one scale and type per matrix, searched
on the first calibration tokens. It serves to measure the loss only: values are decoded before the
product, so it is no faster than `olive`.

Source: Guo et al., OliVe, 2023 (arXiv:2304.07493). Deviation from the authors' code: of two
outliers they keep the first; the paper keeps the larger, as here.
Shapes: n outputs, m inputs, p pairs, K numbers of a type and its outliers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.errors import CheckpointError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.base import PackedFields, Quantizer, Statistics
from spectool.quantize.methods.rtn import SCALE_MIN, check_scale
from spectool.quantize.statistics import LinearStats

# Rows are searched in pieces of about this many weights, to stay in cache.
PIECE = 1 << 18

# The values of f that are tried.
FACTORS = [0.75 + 0.02 * step for step in range(88)]


@dataclass(frozen=True, slots=True)
class Type:
    """Number type: values by code, of normal weights and of outliers; None for unused codes."""

    bits: int
    normal: tuple[int | None, ...]
    outlier: tuple[int | None, ...]

    @property
    def largest(self) -> int:
        """The largest normal value."""
        return max(value for value in self.normal if value is not None)

    @property
    def victim(self) -> int:
        """The code of a victim."""
        return 1 << (self.bits - 1)


def _integers(bits: int) -> tuple[int | None, ...]:
    """Return the values of two's complement by code, without the most negative one."""
    half = 1 << (bits - 1)
    return (*range(half), None, *range(1 - half, 0))


def _signed(magnitudes: list[int | None]) -> tuple[int | None, ...]:
    """Return the values of codes with a sign bit above the magnitude."""
    return (*magnitudes, *(None if value is None else -value for value in magnitudes))


def _abfloat(exponent_bits: int, mantissa_bits: int, bias: int, limit: int) -> list[int | None]:
    """Return the magnitudes of abfloat by code, up to `limit`.

    The first one is not used: with the sign bit it would be the code of a victim.
    """
    ones = 1 << mantissa_bits
    values = [
        (ones + mantissa) << (exponent + bias)
        for exponent in range(1 << exponent_bits)
        for mantissa in range(ones)
    ]
    return [None, *(value if value <= limit else None for value in values[1:])]


INT4 = Type(4, _integers(4), _signed(_abfloat(2, 1, 2, 1 << 15)))
FLINT4 = Type(
    4,
    (*(0, 1, 2, 3, 4, 6, 8, 16), None, *(-1, -2, -3, -4, -6, -8, -16)),
    _signed(_abfloat(2, 1, 3, 1 << 15)),
)
INT8 = Type(8, _integers(8), _signed(_abfloat(4, 3, 4, 1 << 15)))
TYPES = {4: (INT4, FLINT4), 8: (INT8,)}


class OliVe(Quantizer):
    """OliVe on weights; see the module docstring."""

    name = "olive"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: Literal[4, 8] = option(4, "bits of a code")

    config: Config

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        return {
            "codes": (torch.uint8, (n, packed_bytes(m + m % 2, self.config.bits))),
            "scale": (torch.float16, (n,)),
            "kind": (torch.uint8, (1,)),
        }

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        weight_nm = F.pad(weight_nm.float(), (0, weight_nm.shape[1] % 2)).contiguous()
        largest = float(_three_sigma(weight_nm).max())
        check_scale(FACTORS[-1] * largest / min(kind.largest for kind in TYPES[self.config.bits]))
        searched = [search(weight_nm, kind) for kind in TYPES[self.config.bits]]
        errors = [float(error_n.double().sum()) for _, error_n in searched]
        index = errors.index(min(errors))
        kind, scale_n = TYPES[self.config.bits][index], searched[index][0]
        codes_nm = torch.cat(
            [encode(weight_nm[rows], scale_n[rows], kind) for rows in _row_slices(weight_nm)]
        )
        return {
            "codes": pack_bits(codes_nm, self.config.bits),
            "scale": scale_n.half(),
            "kind": torch.tensor([index], dtype=torch.uint8, device=weight_nm.device),
        }

    def build(self, shape: tuple[int, int]) -> OliVeLinear:
        return OliVeLinear(self.layout(shape), shape, self.config)


class OliVeActivations(OliVe):
    """OliVe on weights and inputs; see the module docstring."""

    name = "olive-activations"
    statistics: ClassVar[Statistics] = {"sample": "packed"}
    rounds_inputs = True

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        extra = {"input_scale": (torch.float32, (1,)), "input_kind": (torch.uint8, (1,))}
        return {**super().layout(shape), **extra}

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix; without calibration inputs the input scale is 0, and nothing rounds."""
        fields = super().pack(weight_nm, stats, generator)
        scale, index = 0.0, 0
        if stats is not None and stats.sample is not None:
            sample_Tm = F.pad(stats.sample, (0, stats.sample.shape[1] % 2))
            scale, index = search_inputs(sample_Tm, TYPES[self.config.bits])
        fields["input_scale"] = torch.tensor([scale], device=weight_nm.device)
        fields["input_kind"] = torch.tensor([index], dtype=torch.uint8, device=weight_nm.device)
        return fields

    def build(self, shape: tuple[int, int]) -> OliVeLinear:
        return OliVeActivationsLinear(self.layout(shape), shape, self.config)


def search_inputs(sample_Tm: Tensor, kinds: tuple[Type, ...]) -> tuple[float, int]:
    """Search the scale and the index of the type with the least squared error of the inputs."""
    limit = float(_three_sigma(sample_Tm.flatten()[None]))
    best = (math.inf, 0.0, 0)
    for index, kind in enumerate(kinds):
        for factor in FACTORS if limit > 0 else ():
            scale = factor / kind.largest * limit
            scale_T = torch.full((len(sample_Tm),), scale, device=sample_Tm.device)
            error = float(
                (fake_quantize(sample_Tm, scale_T, kind) - sample_Tm).double().square().sum()
            )
            best = min(best, (error, scale, index))
    return best[1:]


def search(weight_nm: Tensor, kind: Type) -> tuple[Tensor, Tensor]:
    """Search the scale of each row [n], in float16 precision; also return its squared error [n]."""
    scale_n = weight_nm.new_ones(len(weight_nm))
    error_n = torch.full_like(scale_n, torch.inf)
    for rows in _row_slices(weight_nm):
        part_nm, limit_n = weight_nm[rows], _three_sigma(weight_nm[rows])
        for factor in FACTORS:
            tried_n = (factor / kind.largest * limit_n).half().float()
            # Rows of zeros keep a scale of 1.
            tried_n = torch.where(tried_n < SCALE_MIN, 1.0, tried_n)
            found_n = (fake_quantize(part_nm, tried_n, kind) - part_nm).square_().sum(1)
            better_n = found_n < error_n[rows]
            error_n[rows] = torch.where(better_n, found_n, error_n[rows])
            scale_n[rows] = torch.where(better_n, tried_n, scale_n[rows])
    return scale_n, error_n


def _three_sigma(weight_nm: Tensor) -> Tensor:
    """Return max(|mu + 3 sigma|, |mu - 3 sigma|) of each row [n]."""
    mean_n, spread_n = weight_nm.mean(1), 3 * weight_nm.std(1, correction=0)
    return torch.maximum((mean_n + spread_n).abs(), (mean_n - spread_n).abs())


def fake_quantize(weight_nm: Tensor, scale_n: Tensor, kind: Type) -> Tensor:
    """Round weights [n, m] to the values that they are stored as, with scales [n]."""
    number_nm, outlier_nm = _nearest_numbers(weight_nm, scale_n, kind)
    return number_nm.masked_fill(_find_victims(outlier_nm, weight_nm), 0) * scale_n[:, None]


def _nearest_numbers(weight_nm: Tensor, scale_n: Tensor, kind: Type) -> tuple[Tensor, Tensor]:
    """Return the nearest value of the type, the lower one of two, and a mask of outliers."""
    values_K, between_K = _values(kind, weight_nm.device)
    number_nm = values_K[torch.bucketize(weight_nm / scale_n[:, None], between_K)]
    return number_nm, number_nm.abs() > kind.largest


def _find_victims(outlier_nm: Tensor, weight_nm: Tensor) -> Tensor:
    """Return a mask [n, m] of victims: the neighbour of an outlier, or the smaller of two."""
    even_np, odd_np = outlier_nm[:, ::2], outlier_nm[:, 1::2]
    first_np = weight_nm[:, ::2].abs() >= weight_nm[:, 1::2].abs()
    both_np = even_np & odd_np
    even_victim_np = (odd_np & ~even_np) | (both_np & ~first_np)
    odd_victim_np = (even_np & ~odd_np) | (both_np & first_np)
    return torch.stack([even_victim_np, odd_victim_np], -1).flatten(1)


def encode(weight_nm: Tensor, scale_n: Tensor, kind: Type) -> Tensor:
    """Encode weights [n, m], m even, as codes [n, m]."""
    number_nm, outlier_nm = _nearest_numbers(weight_nm, scale_n, kind)
    offset = max(value for value in kind.outlier if value is not None)
    codes = torch.zeros(2 * offset + 1, dtype=torch.uint8, device=weight_nm.device)
    for table in (kind.normal, kind.outlier):
        for code, value in enumerate(table):
            if value is not None:
                codes[value + offset] = code
    codes_nm = codes[number_nm.long() + offset]
    return torch.where(_find_victims(outlier_nm, weight_nm), kind.victim, codes_nm)


def _row_slices(weight_nm: Tensor) -> Iterator[slice]:
    """Yield slices of rows with about `PIECE` weights each."""
    rows = max(1, PIECE // weight_nm.shape[1])
    for start in range(0, len(weight_nm), rows):
        yield slice(start, start + rows)


@functools.cache
def _values(kind: Type, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sorted values of a type with its outliers [K], and their midpoints [K - 1]."""
    values = sorted(value for value in (*kind.normal, *kind.outlier) if value is not None)
    with torch.inference_mode(False):
        values_K = torch.tensor(values, dtype=torch.float32, device=device)
        return values_K, (values_K[1:] + values_K[:-1]) / 2


@functools.cache
def _pairs(kind: Type, device: torch.device) -> Tensor:
    """Return the two values of each pair of codes [C, C, 2]; NaN for pairs that do not occur."""
    with torch.inference_mode(False):
        normal_C, outlier_C = (
            torch.tensor([float("nan") if value is None else value for value in table])
            for table in (kind.normal, kind.outlier)
        )
        count = len(normal_C)
        pairs_CC2 = torch.stack(torch.meshgrid(normal_C, normal_C, indexing="ij"), -1)
        pairs_CC2[:, kind.victim] = torch.stack([outlier_C, torch.zeros(count)], -1)
        pairs_CC2[kind.victim] = torch.stack([torch.zeros(count), outlier_C], -1)
        pairs_CC2[kind.victim, kind.victim] = torch.nan
        return pairs_CC2.to(device)


def decode(codes_nm: Tensor, kind: Type) -> Tensor:
    """Decode codes [n, m], m even, to values [n, m]."""
    pairs_np2 = _pairs(kind, codes_nm.device)[codes_nm[:, ::2].int(), codes_nm[:, 1::2].int()]
    if pairs_np2.isnan().any():
        raise CheckpointError("the codes of an olive matrix are damaged: no such pair")
    return pairs_np2.flatten(1)


class OliVeLinear(PackedLinear):
    """Packed linear of `olive`.

    Fields: codes U8 [n, bit-packed row of an even number of codes], scale F16 [n], kind U8 [1].
    """

    config: OliVe.Config

    def kind(self) -> Type:
        """Return the type of the matrix.

        Raises:
            CheckpointError: its number is that of no type.
        """
        types, index = TYPES[self.config.bits], int(self.q.kind)
        if index >= len(types):
            raise CheckpointError(f"an olive matrix of {self.config.bits} bits has no type {index}")
        return types[index]

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Unpack codes [n, m], those of a pair's other half included."""
        columns = self.in_features + self.in_features % 2
        return unpack_bits(self.q.codes[rows], self.config.bits, columns)

    def rows(self, rows: slice | Tensor) -> Tensor:
        number_nm = decode(self.codes(rows), self.kind()) * self.q.scale[rows, None].float()
        return number_nm[:, : self.in_features]

    def segments(self) -> list[Segment] | None:
        if self.config.bits == 8 or self.in_features % 2:
            return None
        kind, codes_nm = self.kind(), self.codes()
        for rows in self.row_slices():
            # Raises where the codes are damaged.
            decode(codes_nm[rows], kind)
        values = [float(value or 0) for value in (*kind.normal, *kind.outlier)]
        return [
            Segment(
                codes=codes_nm,
                bits=4,
                group_size=self.in_features,
                scale=self.q.scale.float()[:, None],
                levels=torch.tensor([values], device=codes_nm.device),
                paired=True,
            )
        ]


class OliVeActivationsLinear(OliVeLinear):
    """Packed linear of `olive-activations`, with fields input_scale F32 [1], input_kind U8 [1]."""

    @property
    def is_matrix(self) -> bool:
        return False

    def segments(self) -> None:
        # The inputs are rounded before the product, to numbers of which it knows nothing.
        return None

    def forward(self, x: Tensor) -> Tensor:
        scale = self.q.input_scale
        if not scale:
            return super().forward(x)
        rows_Tm = F.pad(x.detach().float().flatten(0, -2), (0, self.in_features % 2))
        kind = TYPES[self.config.bits][int(self.q.input_kind)]
        near_Tm = fake_quantize(rows_Tm, scale.expand(len(rows_Tm)), kind)[:, : self.in_features]
        # Straight-through: gradients pass as if nothing had been rounded.
        return super().forward(x + (near_Tm.view(x.shape).to(x.dtype) - x.detach()))
