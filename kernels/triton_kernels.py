# mypy: ignore-errors
# The functions are in Triton's own language, which type checkers do not know.
"""GPU kernels of packed products, in Triton: partial products of one segment, and their sum.

A tile of `WIDE` outputs by `ROWS` rows of activations is summed over blocks of inputs in order,
eight slices of `SLICE` inputs a block. Tiles have one size whatever the number of rows, and a
matrix is cut into splits by its own shape only, so a row's sums have one order at every width.

Products of two bfloat16 numbers are exact in float32, and integers up to 256 are bfloat16 numbers.
Other values are cut into two bfloat16 parts, together within 2^-17 of the value.

`triton_products.py` lays out the operands. Shapes: n outputs, k inputs of the segment, N rows of
activations in P parts, g groups, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectool.kernels.triton_products import ROWS, SLICE, SLICES, SUMS, WIDE

_SLICE, _SLICES, _WIDE, _ROWS, _SUMS = map(tl.constexpr, (SLICE, SLICES, WIDE, ROWS, SUMS))
FLOAT32, BFLOAT16 = tl.float32, tl.bfloat16


@triton.jit
def _round(value):
    """Round float32 to the nearest bfloat16, ties to even, kept in float32.

    In integers: Triton's interpreter truncates where devices round.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _read_plane(codes, lane, exists, slice: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Read one plane of the codes of a slice, in its place within the codes."""
    # Planes of more bits come first, and hold the lower bits of a code.
    start: tl.constexpr = BITS & -(2 * WIDTH)
    WORD: tl.constexpr = tl.int32 if WIDTH >= 4 else tl.int16 if WIDTH == 2 else tl.int8
    words = (codes + start * _SLICE).to(tl.pointer_type(WORD), bitcast=True)
    # The same for all slices of a word, so that the compiler loads it once.
    word = tl.load(words + slice * WIDTH // 32 * _SLICE + lane, mask=exists, other=0)
    return ((word.to(tl.int32) >> (slice * WIDTH % 32)) & ((1 << WIDTH) - 1)) << start


@triton.jit
def _read_codes(codes, lane, exists, slice: tl.constexpr, BITS: tl.constexpr):
    """Read the codes of a slice from planes of 8, 4, 2 and 1 bits, the binary digits of BITS."""
    code = tl.zeros((_WIDE, _SLICE), tl.int32)
    if BITS & 8:
        code += _read_plane(codes, lane, exists, slice, BITS, 8)
    if BITS & 4:
        code += _read_plane(codes, lane, exists, slice, BITS, 4)
    if BITS & 2:
        code += _read_plane(codes, lane, exists, slice, BITS, 2)
    if BITS & 1:
        code += _read_plane(codes, lane, exists, slice, BITS, 1)
    return code


@triton.jit
def _add_products(total, value, x, SPLIT: tl.constexpr, DOT: tl.constexpr):
    """Add value [WIDE, SLICE] times x [SLICE, ROWS] with operands of type DOT."""
    if SPLIT:
        high = _round(value)
        total = tl.dot(high.to(DOT), x, total, input_precision="ieee")
        value = _round(value - high)
    return tl.dot(value.to(DOT), x, total, input_precision="ieee")


@triton.jit
def _read_values(
    codes, levels, column, inside,
    slice: tl.constexpr, BITS: tl.constexpr, CENTER: tl.constexpr, LEVELS: tl.constexpr,
    BY_COLUMN: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Read the codes of a slice minus CENTER, or their levels, in float32."""
    lane = tl.arange(0, _SLICE)[None, :]
    exists, is_column = inside
    code = _read_codes(codes, lane, exists, slice, BITS)
    if LEVELS:
        if PAIRED:
            beside = _read_codes(codes, lane ^ 1, exists, slice, BITS)
            code += tl.where(beside == 8, 16, 0)
        if BY_COLUMN:
            code += column * LEVELS
        return tl.load(levels + code, mask=exists & is_column, other=0.0)
    # The last digits of 2^23 + code: fewer instructions than a conversion.
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + CENTER)


@triton.jit
def _to_weights(value, scale, shift, inside, CENTER: tl.constexpr, SHIFT: tl.constexpr):
    """Turn the values of a slice into weights, with the scale of each column."""
    exists, is_column = inside
    factor = tl.load(scale, mask=exists & is_column, other=0.0).to(tl.float32)
    if SHIFT == 0:
        return factor * value
    moved = tl.load(shift, mask=exists & is_column, other=0.0).to(tl.float32)
    if SHIFT == 1:
        return factor * ((value + CENTER) - moved)
    return factor * value + moved


@triton.jit
def _scale_sums(total, sums, scale, shift, exists, CENTER: tl.constexpr, SHIFT: tl.constexpr):
    """Turn sums of values times x into sums of weights times x; `sums` [ROWS] are those of x."""
    factor = tl.load(scale, mask=exists, other=0.0).to(tl.float32)
    if SHIFT == 0:
        return factor * total
    moved = tl.load(shift, mask=exists, other=0.0).to(tl.float32)
    if SHIFT == 1:
        moved = factor * (CENTER - moved)
    return factor * total + moved * sums[None, :]


# Specialised for a number of rows, programs could differ between widths.
@triton.jit(do_not_specialize=["N"])
def multiply_segment(
    x,  # [P, N, k]
    codes,  # U8 [n, blocks, BITS SLICE]
    scale, shift,  # [n, groups]; shift: zero points or offsets
    levels, table,  # F32 [., LEVELS], I32 [n]
    out,  # F32 [S, N, n]
    N, n, k, groups, blocks, blocks_per_split,
    BITS: tl.constexpr,
    CENTER: tl.constexpr,  # subtracted from codes
    GROUP: tl.constexpr,  # columns of a group
    TURN: tl.constexpr,  # slices between two scalings of the sums; 0: weights are scaled
    SHIFT: tl.constexpr,  # 0 none, 1 zero points, 2 offsets
    LEVELS: tl.constexpr,  # levels of a table; 0: codes are values
    BY_COLUMN: tl.constexpr,  # each column has a table, otherwise each output
    PAIRED: tl.constexpr,  # a code beside the code 8 stands for a level 16 higher
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,  # values are cut into two parts
    DOT: tl.constexpr,  # type of the operands of matrix units
):  # fmt: skip
    """Multiply a tile of rows with a split of a segment: weight = scale value + shift."""
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    output = tl.program_id(1) * _WIDE + tl.arange(0, _WIDE)[:, None]
    exists = output < n
    codes += output.to(tl.int64) * (blocks * BITS * _SLICE)
    scale += output.to(tl.int64) * groups
    shift += output.to(tl.int64) * groups
    if LEVELS and not BY_COLUMN:
        levels += tl.load(table + output, mask=exists, other=0) * LEVELS
    acc = tl.zeros((_WIDE, _ROWS), tl.float32)
    first = tl.program_id(2) * blocks_per_split
    EACH: tl.constexpr = TURN if TURN else _SLICES
    for block in range(first, tl.minimum(first + blocks_per_split, blocks)):
        here = codes + block * (BITS * _SLICE)
        for start in tl.static_range(0, _SLICES, EACH):
            total = tl.zeros((_WIDE, _ROWS), tl.float32)
            sums = tl.zeros((_ROWS,), tl.float32)
            for step in tl.static_range(EACH):
                column = (block * _SLICES + start + step) * _SLICE + tl.arange(0, _SLICE)[None, :]
                inside = (exists, column < k)
                value = _read_values(
                    here, levels, column, inside,
                    start + step, BITS, CENTER, LEVELS, BY_COLUMN, PAIRED,
                )  # fmt: skip
                if not TURN:
                    group = column // GROUP
                    value = _to_weights(value, scale + group, shift + group, inside, CENTER, SHIFT)
                for part in tl.static_range(PARTS):
                    place = (part * N + row[:, None]).to(tl.int64) * k + column
                    some = (row < N)[:, None] & (column < k)
                    x_rows = tl.load(x + place, mask=some, other=0.0).to(DOT)
                    total = _add_products(total, value, tl.trans(x_rows), SPLIT, DOT)
                    if TURN and SHIFT:
                        sums += tl.sum(x_rows.to(tl.float32), axis=1)
            if TURN:
                # Padding of a block may lie behind the last group.
                group = tl.minimum((block * _SLICES + start) * _SLICE // GROUP, groups - 1)
                total = _scale_sums(
                    total, sums, scale + group, shift + group, exists, CENTER, SHIFT
                )
            acc += total
    place = (tl.program_id(2) * N + row[None, :]).to(tl.int64) * n + output
    tl.store(out + place, acc, mask=exists & (row < N)[None, :])


@triton.jit(do_not_specialize=["N", "count"])
def sum_partials(partials, bias, out, count, N, n, BIAS: tl.constexpr, ROUND: tl.constexpr):
    """Add partial products [S, N, n] in order and a bias [n], into out [N, n]."""
    place = tl.program_id(0).to(tl.int64) * _SUMS + tl.arange(0, _SUMS)
    size = N.to(tl.int64) * n
    inside = place < size
    total = tl.load(partials + place, mask=inside, other=0.0)
    for split in range(1, count):
        total += tl.load(partials + split * size + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + place % n, mask=inside, other=0.0).to(tl.float32)
    if ROUND:
        total = _round(total)
    tl.store(out + place, total, mask=inside)
