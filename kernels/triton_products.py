"""Products with packed matrices on a GPU: their layout, and the operator that computes them.

The kernels are in `triton_kernels.py`, imported on first use; Triton comes with torch for CUDA.
Activations keep their dtype, float32 or bfloat16, and sums are in float32. A row's result does not
depend on the other rows. `assemble` of the segments is the specification.

Tested in Triton's interpreter; not yet run, measured or tuned on a device.

Shapes: n outputs, m inputs, N rows, k columns of a segment, B blocks of columns, g groups, P parts
of activations, S splits of all segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.kernels.segments import Segment, assemble

# Columns of a slice, and slices of a block of columns.
SLICE, SLICES = 32, 8
BLOCK = SLICE * SLICES
# Outputs and rows of a tile, as matrix units take them: 16 rows cost what one does. Of the outputs,
# 128 take 6.4 instructions a weight at 4 bits and 64 take 8 (counted in the program for H200).
WIDE, ROWS = 128, 16
# Sums per program that adds partial products.
SUMS = 1024
# A matrix of fewer tiles is cut along its inputs until so many programs run, which fills a device.
PROGRAMS, MOST_SPLITS = 512, 8
# Rows whose partial products are held at once.
MOST_ROWS = 256
NO_SHIFT, ZERO, OFFSET = range(3)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Tensors of a segment as the kernel reads them; see `Segment`.

    codes U8 [n, B, bits SLICE], scale and shift (zero points or offsets) F16 or F32 [n, g], levels
    F32 [T, K] or [k, K], table I32 [n], columns I64 [k], column_scale F32 [k].
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    levels: Tensor | None
    table: Tensor | None
    columns: Tensor | None
    column_scale: Tensor | None


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers of a segment; `num_columns` is k."""

    num_columns: int
    bits: int
    group_size: int
    center: int
    shift: int
    by_column: int
    paired: int


NUM_TENSORS, NUM_NUMBERS = len(_Tensors.__slots__), len(_Numbers.__slots__)


class TritonProduct:
    """The product with one matrix [n, m], laid out anew on the device of its codes."""

    def __init__(self, segments: Sequence[Segment], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._parts = [_lay_out(segment) for segment in segments]
        self._tensors = [each for tensors, _ in self._parts for each in _values(tensors)]
        self._numbers = [each for _, numbers in self._parts for each in astuple(numbers)]

    @property
    def nbytes(self) -> int:
        """The bytes of the matrix as it is held."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x [..., m], float32 or bfloat16, times the matrix transposed, plus bias [n]."""
        n, m = self.shape
        out_Nn: Tensor = packed_product(x.reshape(-1, m), bias, self._tensors, self._numbers)
        return out_Nn.view(*x.shape[:-1], n)

    def rows(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Unpack some outputs, a slice or their numbers, in float32 [N, m]."""
        segments = [_unpack(tensors, numbers, rows) for tensors, numbers in self._parts]
        return assemble(segments, (len(segments[0].codes), self.shape[1]))


def _values(tensors: _Tensors) -> list[Tensor | None]:
    # Not `astuple`, which would copy them.
    return [getattr(tensors, name) for name in _Tensors.__slots__]


def _lay_out(segment: Segment) -> tuple[_Tensors, _Numbers]:
    """Lay a segment out as the kernel reads it."""
    shift = segment.zero if segment.zero is not None else segment.offset
    levels = segment.levels if segment.column_levels is None else segment.column_levels
    table = segment.table
    if levels is not None and segment.column_levels is None and table is None:
        table = torch.zeros(len(segment.codes), device=segment.codes.device)
    center = segment.center
    if segment.zero is not None and levels is None:
        # Codes around zero are smaller, and lose less when the zero point's part is subtracted.
        center = 1 << segment.bits - 1
    tensors = _Tensors(
        pack_planes(segment.codes, segment.bits),
        _narrow(segment.scale),
        None if shift is None else _narrow(shift),
        None if levels is None else levels.contiguous(),
        None if table is None else table.int(),
        segment.columns,
        segment.column_scale,
    )
    numbers = _Numbers(
        num_columns=segment.codes.shape[1],
        bits=segment.bits,
        group_size=segment.group_size,
        center=center,
        shift=NO_SHIFT if shift is None else OFFSET if segment.zero is None else ZERO,
        by_column=int(segment.column_levels is not None),
        paired=int(segment.paired),
    )
    return tensors, numbers


def _unpack(tensors: _Tensors, numbers: _Numbers, rows: slice | Tensor) -> Segment:
    """Return some outputs of a segment."""
    shift = None if tensors.shift is None else tensors.shift[rows].float()
    return Segment(
        codes=unpack_planes(tensors.codes[rows], numbers.bits)[:, : numbers.num_columns],
        bits=numbers.bits,
        group_size=numbers.group_size,
        scale=tensors.scale[rows].float(),
        zero=shift if numbers.shift == ZERO else None,
        offset=shift if numbers.shift == OFFSET else None,
        center=0 if numbers.shift == ZERO else numbers.center,
        levels=None if numbers.by_column else tensors.levels,
        table=None if tensors.table is None else tensors.table[rows].long(),
        column_levels=tensors.levels if numbers.by_column else None,
        paired=bool(numbers.paired),
        columns=tensors.columns,
        column_scale=tensors.column_scale,
    )


def _narrow(values: Tensor) -> Tensor:
    """Convert to float16 where that loses nothing."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values


def pack_planes(codes_nk: Tensor, bits: int) -> Tensor:
    """Pack codes [n, k] into bytes [n, B, bits SLICE].

    Column c of every slice of a block is in word c of a plane, the first slice in the lowest bits.
    Words of 1, 2 and 4 bits have 1, 2 and 4 bytes; 8 bits take two rows of words of 4 bytes.
    """
    n, k = codes_nk.shape
    padded = F.pad(codes_nk, (0, -k % BLOCK)).view(n, -1, SLICES, SLICE)
    packed = padded.new_zeros(n, padded.shape[1], bits * SLICE)
    for start, width, bytes_ in _planes(packed, bits):
        for index in range(SLICES):
            byte, place = divmod(index * width, 8)
            bytes_[byte] |= (padded[:, :, index] >> start & (1 << width) - 1) << place
    return packed


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """Unpack bytes of `pack_planes` into codes [n, BLOCK B]."""
    codes = packed.new_zeros(*packed.shape[:2], SLICES, SLICE)
    for start, width, bytes_ in _planes(packed, bits):
        for index in range(SLICES):
            byte, place = divmod(index * width, 8)
            codes[:, :, index] |= (bytes_[byte] >> place & (1 << width) - 1) << start
    return codes.flatten(1)


def _planes(packed: Tensor, bits: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Yield the planes of packed codes, whose widths are the binary digits of `bits`.

    A plane is its lowest bit, its width, and views [n, B, SLICE] of the bytes of its words.
    """
    for width in (8, 4, 2, 1):
        if bits & width:
            start = bits & -2 * width
            plane = packed[:, :, start * SLICE : (start + width) * SLICE]
            words = plane.view(*plane.shape[:2], -1, SLICE, min(width, 4))
            yield start, width, [word for row in words.unbind(2) for word in row.unbind(3)]


@torch.library.custom_op("spectool::packed_product", mutates_args=())
def packed_product(
    x: Tensor, bias: Tensor | None, tensors: list[Tensor | None], numbers: list[int]
) -> Tensor:
    """Multiply x [N, m] with the segments of a matrix: their `_Tensors` and `_Numbers` in a row."""
    segments = [
        (_Tensors(*each), _Numbers(*numbers[i * NUM_NUMBERS : (i + 1) * NUM_NUMBERS]))
        for i, each in enumerate(zip(*[iter(tensors)] * NUM_TENSORS, strict=True))
    ]
    out_Nn = x.new_empty(len(x), len(segments[0][0].codes))
    # Triton launches on the current device.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        for rows in range(0, len(x), MOST_ROWS):
            _multiply(x[rows : rows + MOST_ROWS], bias, segments, out_Nn[rows : rows + MOST_ROWS])
    return out_Nn


@packed_product.register_fake
def _(x: Tensor, bias: Tensor | None, tensors: list[Tensor | None], numbers: list[int]) -> Tensor:
    codes = tensors[0]
    assert codes is not None
    return x.new_empty(len(x), len(codes))


def _multiply(
    x_Nm: Tensor,
    bias_n: Tensor | None,
    segments: Sequence[tuple[_Tensors, _Numbers]],
    out_Nn: Tensor,
) -> None:
    """Multiply some rows, into `out_Nn`."""
    from spectool.kernels import triton_kernels

    num_rows, n = out_Nn.shape
    splits = [count_splits(n, tensors.codes.shape[1]) for tensors, _ in segments]
    partials_SNn = torch.empty(
        sum(count for count, _ in splits), num_rows, n, dtype=torch.float32, device=x_Nm.device
    )
    done = 0
    for (tensors, numbers), (count, each) in zip(segments, splits, strict=True):
        x_PNk = _gather(x_Nm, tensors)
        _multiply_segment(x_PNk, tensors, numbers, each, partials_SNn[done : done + count])
        done += count
    triton_kernels.sum_partials[(-(-out_Nn.numel() // SUMS),)](
        partials_SNn,
        partials_SNn if bias_n is None else bias_n,
        out_Nn,
        done,
        num_rows,
        n,
        BIAS=bias_n is not None,
        ROUND=out_Nn.dtype == torch.bfloat16,
        enable_fp_fusion=True,
    )


def _multiply_segment(
    x_PNk: Tensor, tensors: _Tensors, numbers: _Numbers, blocks_per_split: int, out_SNn: Tensor
) -> None:
    """Multiply some rows with one segment."""
    from spectool.kernels import triton_kernels as kernels

    num_splits, num_rows, n = out_SNn.shape
    blocks, groups = tensors.codes.shape[1], tensors.scale.shape[1]
    group_size = BLOCK * blocks if groups == 1 else numbers.group_size
    turn = 0 if group_size % SLICE else math.gcd(group_size, BLOCK) // SLICE
    is_half = x_PNk.dtype == torch.bfloat16
    is_interpreted = x_PNk.device.type == "cpu"
    absent = tensors.scale
    grid = (-(-num_rows // ROWS), -(-n // WIDE), num_splits)
    kernels.multiply_segment[grid](
        x_PNk,
        tensors.codes,
        tensors.scale,
        absent if tensors.shift is None else tensors.shift,
        absent if tensors.levels is None else tensors.levels,
        absent if tensors.table is None else tensors.table,
        out_SNn,
        num_rows,
        n,
        x_PNk.shape[2],
        groups,
        blocks,
        blocks_per_split,
        BITS=numbers.bits,
        CENTER=numbers.center,
        GROUP=group_size,
        TURN=turn,
        SHIFT=numbers.shift,
        LEVELS=0 if tensors.levels is None else tensors.levels.shape[1],
        BY_COLUMN=bool(numbers.by_column),
        PAIRED=bool(numbers.paired),
        PARTS=len(x_PNk),
        # Integers are bfloat16 numbers, levels and scaled weights are not.
        SPLIT=is_half and (tensors.levels is not None or not turn),
        # The interpreter computes products of float32 only.
        DOT=kernels.BFLOAT16 if is_half and not is_interpreted else kernels.FLOAT32,
        enable_fp_fusion=True,
    )


def count_splits(n: int, blocks: int) -> tuple[int, int]:
    """Return into how many splits a segment is cut, and the blocks of each, by its shape alone."""
    tiles = -(-n // WIDE)
    wanted = min(MOST_SPLITS, max(1, PROGRAMS // tiles), max(1, blocks // 4))
    each = -(-blocks // wanted)
    return -(-blocks // each), each


def _gather(x_Nm: Tensor, tensors: _Tensors) -> Tensor:
    """Return the inputs of a segment [P, N, k]: scaled ones in bfloat16 take two parts."""
    x_Nk = x_Nm if tensors.columns is None else x_Nm.index_select(1, tensors.columns)
    if tensors.column_scale is None:
        return x_Nk[None].contiguous()
    scaled_Nk = x_Nk.float() * tensors.column_scale
    if x_Nm.dtype == torch.float32:
        return scaled_Nk[None]
    high_Nk = scaled_Nk.to(x_Nm.dtype)
    return torch.stack([high_Nk, (scaled_Nk - high_Nk.float()).to(x_Nm.dtype)])
