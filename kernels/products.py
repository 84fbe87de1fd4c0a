"""Products with packed matrices on a CPU (`products.c`), and their specification in torch.

Three precisions, in all of which a row's result does not depend on the other rows:

exact: activations in their dtype, sums in float32. int8: activations are rounded to 8 bits, by row
and block of at most 128 columns; levels of codebooks are rounded to 8 bits too. Sums of a block are
integers. int16: the same with activations of two bytes, whose products are computed apart.

Shapes: n outputs, m inputs, N rows, k columns of a segment, g groups, b blocks, c columns of one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.kernels import build, threads
from spectool.kernels.layout import (
    CHUNK,
    STRIP,
    STRIP_OUTPUTS,
    TILE,
    chunk_columns,
    from_lines,
    to_lines,
)
from spectool.kernels.segments import Segment, assemble

Precision = Literal["exact", "int16", "int8"]

# Columns whose activations share a scale in int8 products, and rows of one pass over a matrix: as
# in products.c.
BLOCK, MOST_ROWS = 128, 128
PARAMETERS = "scale", "zero", "offset"
# Unsigned bytes hold levels from -128 on.
_LEVEL_CENTER = 128
# Positions of `enum kind`, `enum type` and `enum precision` in products.c.
_TABLE, _CENTERED, _PLAIN, _OUTLIERS, _COLUMN = range(5)
_FLOAT, _BFLOAT16, _HALF = range(3)
_PRECISIONS = {"exact": 0, "int8": 1, "int16": 2}
# Bytes of an activation, and what the higher of two stands for.
_CODE_BYTES, _BASE = {"int8": 1, "int16": 2}, 255
TYPES = {torch.float32: _FLOAT, torch.bfloat16: _BFLOAT16}


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "offset", "levels")),
        *((name, ctypes.c_void_p) for name in ("byte_levels", "level_scale", "table", "blocks")),
        *((name, ctypes.c_void_p) for name in ("columns", "column_scale")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "chunks", "groups", "bits", "kind")),
        *((name, ctypes.c_int32) for name in ("parameters", "center", "is_whole", "is_grid")),
    ]


class PackedMatrix(ctypes.Structure):
    """`struct product` of product.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("segments", "x", "order", "bias", "y", "scratch")),
        *((name, ctypes.c_ssize_t) for name in ("num_rows", "num_inputs", "num_outputs")),
        *((name, ctypes.c_ssize_t) for name in ("num_tiles", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("num_segments", "precision", "type", "threads")),
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """A segment as products.c reads it: tensors and numbers by their names there.

    `used` [C 32]: which places of the chunks hold a column. `plain`: the segment with nothing in
    place of what is in `tensors`.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    used: Tensor
    plain: Segment


class PackedProduct:
    """The product with one matrix [n, m], whose codes are laid out anew.

    `precision` must be one of `precisions(segments)`.
    """

    def __init__(
        self, segments: Sequence[Segment], shape: tuple[int, int], precision: Precision
    ) -> None:
        assert precision in precisions(segments)
        for segment in segments:
            # products.c reads these inputs.
            columns = segment.columns
            assert columns is None or (columns.min() >= 0 and columns.max() < shape[1])
        self.shape, self.precision = shape, precision
        self._order_P = _order_outputs(segments)
        self._place_n = None if self._order_P is None else _places(self._order_P, shape[0])
        num_places = shape[0] if self._order_P is None else len(self._order_P)
        self._num_tiles = -(-num_places // TILE)
        self._parts = [_lay_out(segment, self._order_P, precision) for segment in segments]
        parts = _CODE_BYTES.get(precision)
        unit, end = (4, 4) if parts is None else (parts, 8 * parts)
        self.row_bytes = sum(
            part.numbers["chunks"] * CHUNK * unit + part.numbers["num_blocks"] * end
            for part in self._parts
        )
        self._segments = (_Segment * len(self._parts))()
        for structure, part in zip(self._segments, self._parts, strict=True):
            for name, tensor in part.tensors.items():
                setattr(structure, name, tensor.data_ptr())
            for name, number in part.numbers.items():
                setattr(structure, name, number)

    def __deepcopy__(self, memo: Any) -> PackedProduct:
        # Nothing changes a product, and C reads it by its addresses.
        return self

    @property
    def nbytes(self) -> int:
        """The bytes of the matrix as it is held."""
        tensors = [each for part in self._parts for each in (part.used, *part.tensors.values())]
        if self._order_P is not None and self._place_n is not None:
            tensors += [self._order_P, self._place_n]
        return sum(tensor.nbytes for tensor in tensors)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x [..., m], float32 or bfloat16, times the matrix transposed, plus bias [n].

        Inference only; the result is in x's dtype.
        """
        n, m = self.shape
        assert x.shape[-1] == m and x.dtype in TYPES and x.device.type == "cpu"
        assert bias is None or (bias.shape == (n,) and bias.device.type == "cpu")
        x_Nm = x.reshape(-1, m).contiguous()
        y_Nn = torch.empty(len(x_Nm), n, dtype=x.dtype)
        scratch = torch.empty(min(len(x_Nm), MOST_ROWS) * self.row_bytes, dtype=torch.uint8)
        bias_n = None if bias is None else bias.detach().to(torch.float32).contiguous()
        given = self.describe(bias_n)
        given.x, given.y, given.scratch = x_Nm.data_ptr(), y_Nn.data_ptr(), scratch.data_ptr()
        given.num_rows, given.type = len(x_Nm), TYPES[x.dtype]
        given.threads = threads.count()
        _load()(ctypes.byref(given), 1)
        return y_Nn.view(*x.shape[:-1], n)

    def describe(self, bias_n: Tensor | None) -> PackedMatrix:
        """Return what C reads of the product with a bias in float32; the caller keeps that."""
        return PackedMatrix(
            segments=ctypes.addressof(self._segments),
            order=None if self._order_P is None else self._order_P.data_ptr(),
            bias=None if bias_n is None else bias_n.data_ptr(),
            num_inputs=self.shape[1],
            num_outputs=self.shape[0],
            num_tiles=self._num_tiles,
            row_bytes=self.row_bytes,
            num_segments=len(self._parts),
            precision=_PRECISIONS[self.precision],
        )

    def reads_like(self, other: PackedProduct) -> bool:
        """Whether both products lay the same activations out alike in C."""
        alike = self.precision == other.precision and len(self._parts) == len(other._parts)
        return alike and all(map(_reads_like, self._parts, other._parts))

    def rows(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Unpack some outputs, a slice or their numbers, in float32 [N, m]."""
        n, m = self.shape
        rows_N = torch.arange(n)[rows] if isinstance(rows, slice) else rows
        place_N = rows_N if self._place_n is None else self._place_n[rows_N]
        return assemble([_unpack(part, place_N) for part in self._parts], (len(rows_N), m))


def _reads_like(part: _Part, other: _Part) -> bool:
    numbers = ("num_blocks", "chunks", "bits", "is_grid")
    if any(part.numbers[name] != other.numbers[name] for name in numbers):
        return False
    if ("offset" in part.tensors) != ("offset" in other.tensors):
        return False
    pairs = [
        [each.tensors.get(name) for each in (part, other)]
        for name in ("blocks", "columns", "column_scale")
    ]
    return all(
        first is second or (first is not None and second is not None and torch.equal(first, second))
        for first, second in pairs
    )


def precisions(segments: Sequence[Segment]) -> tuple[Precision, ...]:
    """Return the precisions that there are products in."""
    # 8 bits do not represent the levels of pairs, nor can bytes look up levels by column.
    has_integers = all(part.column_levels is None and not part.paired for part in segments)
    return ("exact", "int16", "int8") if has_integers else ("exact",)


def _order_outputs(segments: Sequence[Segment]) -> Tensor | None:
    """Order outputs so that a tile has one codebook [64 S], -1 for padding; None: as they are."""
    tables = [segment.table for segment in segments if segment.table is not None]
    if not tables:
        return None
    assert len(tables) == 1, "one segment at most has codebooks by row"
    parts = []
    for table in sorted(set(tables[0].tolist())):
        rows = (tables[0] == table).nonzero()[:, 0]
        parts.append(F.pad(rows, (0, -len(rows) % TILE), value=-1))
    order = torch.cat(parts).int()
    return F.pad(order, (0, -len(order) % STRIP_OUTPUTS), value=-1)


def _places(order_P: Tensor, n: int) -> Tensor:
    """Return the place of each output [n] in the order of tiles."""
    used = (order_P >= 0).nonzero()[:, 0]
    place_n = torch.empty(n, dtype=torch.long)
    place_n[order_P[used].long()] = used
    return place_n


def _in_order(values_n: Tensor, order_P: Tensor | None) -> Tensor:
    """Return the rows of a tensor [n, ...] in the order of tiles, with zeros for padding."""
    if order_P is None:
        padding = values_n.new_zeros(-len(values_n) % STRIP_OUTPUTS, *values_n.shape[1:])
        return torch.cat([values_n, padding]) if len(padding) else values_n
    ordered_P = values_n[order_P.clamp(min=0).long()]
    ordered_P[order_P < 0] = 0
    return ordered_P


def _lay_out(segment: Segment, order_P: Tensor | None, precision: Precision) -> _Part:
    """Lay a segment out as products.c reads it."""
    k = segment.codes.shape[1]
    place = chunk_columns(k, segment.group_size)
    is_padded = bool((place < 0).any())
    codes = _in_order(segment.codes, order_P)
    if is_padded:
        codes = codes[:, place.clamp(min=0)] * (place >= 0)
    tensors = {"codes": to_lines(codes, segment.bits)}
    kind = _add_levels(segment, precision, place, tensors)
    parameters = {
        name: values for name in PARAMETERS if (values := getattr(segment, name)) is not None
    }
    is_half = all(_fits_half(values) for values in parameters.values())
    for name, values_ng in parameters.items():
        ordered_Pg = _in_order(values_ng.half() if is_half else values_ng, order_P)
        by_tile = ordered_Pg.view(-1, STRIP, TILE, ordered_Pg.shape[1]).permute(0, 3, 1, 2)
        tensors[name] = by_tile.contiguous()
    if segment.table is not None:
        tensors["table"] = _in_order(segment.table, order_P).view(-1, TILE).amax(1).int()
    if segment.columns is not None or is_padded:
        columns_k = torch.arange(k) if segment.columns is None else segment.columns
        tensors["columns"] = torch.where(place >= 0, columns_k[place.clamp(min=0)], -1).int()
    if segment.column_scale is not None:
        tensors["column_scale"] = segment.column_scale.float()[place.clamp(min=0)]
    blocks = [(-(-(end - begin) // CHUNK), group) for begin, end, group in _blocks(segment)]
    tensors["blocks"] = torch.tensor(blocks, dtype=torch.int32)
    has_whole_zeros = _has_whole_zeros(segment)
    is_grid = segment.levels is None and segment.column_levels is None
    is_grid &= segment.zero is None or has_whole_zeros
    has_byte_levels = precision != "exact" and segment.levels is not None
    numbers = {
        "num_blocks": len(blocks),
        "chunks": len(place) // CHUNK,
        "groups": segment.scale.shape[1],
        "bits": segment.bits,
        "kind": kind,
        "parameters": _HALF if is_half else _FLOAT,
        "center": _LEVEL_CENTER if has_byte_levels else segment.center,
        "is_whole": int(has_whole_zeros),
        "is_grid": int(is_grid),
    }
    # Tensors of the same shapes that take no memory.
    nothing = {
        name: values.new_zeros(1, 1).expand(values.shape)
        for name in ("codes", *parameters)
        if (values := getattr(segment, name)) is not None
    }
    plain = replace(segment, table=None, column_levels=None, column_scale=None, **nothing)
    tensors = {name: values.contiguous() for name, values in tensors.items()}
    return _Part(tensors, numbers, place >= 0, replace(plain, columns=None))


def _add_levels(
    segment: Segment, precision: Precision, place: Tensor, tensors: dict[str, Tensor]
) -> int:
    """Add the levels of a segment to the tensors; return how codes become values."""
    if precision != "exact":
        if segment.levels is not None:
            levels_tK, scale_t = round_levels(segment.levels)
            codes_tK = (levels_tK + _LEVEL_CENTER).to(torch.uint8)
            # A vector of 64 bytes holds the 16 levels four times.
            tensors["byte_levels"] = F.pad(codes_tK, (0, 16 - codes_tK.shape[1])).repeat(1, 4)
            tensors["level_scale"] = scale_t
        return _PLAIN
    if segment.column_levels is not None:
        levels_kK = segment.column_levels
        tensors["levels"] = F.pad(levels_kK, (0, 16 - levels_kK.shape[1]))[place.clamp(min=0)]
        return _COLUMN
    if segment.levels is not None:
        width = 32 if segment.paired else 16
        tensors["levels"] = F.pad(segment.levels, (0, width - segment.levels.shape[1]))
        return _OUTLIERS if segment.paired else _TABLE
    if segment.bits <= 4:
        tensors["levels"] = torch.arange(16.0) - segment.center
        return _TABLE if segment.zero is None else _CENTERED
    return _PLAIN


def round_levels(levels_tK: Tensor) -> tuple[Tensor, Tensor]:
    """Round levels to integers from -127 to 127 [t, K]; also return the scale [t] of each table."""
    scale_t = levels_tK.abs().amax(1) / 127
    safe_t1 = torch.where(scale_t > 0, scale_t, 1.0)[:, None]
    return (levels_tK / safe_t1).round_(), scale_t


def _has_whole_zeros(segment: Segment) -> bool:
    """Whether there are zeros, all of them integers that codes can have."""
    zero = segment.zero
    if zero is None:
        return False
    return bool(((zero == zero.round()) & (zero >= 0) & (zero < 1 << segment.bits)).all())


def _fits_half(values: Tensor) -> bool:
    return bool((values.half().float() == values).all())


def _blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each block of columns, and its group."""
    k = segment.codes.shape[1]
    for group, begin in enumerate(range(0, k, segment.group_size)):
        end = min(begin + segment.group_size, k)
        for start in range(begin, end, BLOCK):
            yield start, min(start + BLOCK, end), group


def _unpack(part: _Part, place_N: Tensor) -> Segment:
    """Return the outputs at some places of the tiles, as a segment."""
    strip_N, tile_N, lane_N = place_N // STRIP_OUTPUTS, place_N // TILE % STRIP, place_N % TILE
    lines = part.tensors["codes"]
    by_lane = lines.view(*lines.shape[:-1], TILE, -1)[strip_N, :, tile_N, :, lane_N]
    tensors, used = part.tensors, part.used
    found: dict[str, Any] = {
        name: tensors[name][strip_N, :, tile_N, lane_N].float()
        for name in PARAMETERS
        if name in tensors
    }
    if "table" in tensors:
        found["table"] = tensors["table"][place_N // TILE].long()
    if "columns" in tensors:
        found["columns"] = tensors["columns"][used].long()
    if "column_scale" in tensors:
        found["column_scale"] = tensors["column_scale"][used]
    if part.numbers["kind"] == _COLUMN:
        found["column_levels"] = tensors["levels"][used]
    codes = from_lines(by_lane, part.plain.bits)[:, used]
    return replace(part.plain, codes=codes, **found)


def twin(
    x: Tensor,
    segments: Sequence[Segment],
    shape: tuple[int, int],
    precision: Precision,
    bias: Tensor | None,
) -> Tensor:
    """Compute the product in torch: the specification of `PackedProduct`, slow.

    Integer products equal it to the bit, exact ones except for the rounding of sums in float32.
    """
    bias_n = None if bias is None else bias.float()
    if precision == "exact":
        return F.linear(x.float(), assemble(segments, shape), bias_n).to(x.dtype)
    x_Nm = x.reshape(-1, shape[1]).float()
    y_Nn = torch.zeros(len(x_Nm), shape[0])
    for segment in segments:
        _add_integer_product(x_Nm, segment, precision, y_Nn)
    y_Nn = y_Nn if bias_n is None else y_Nn + bias_n
    return y_Nn.to(x.dtype).view(*x.shape[:-1], shape[0])


def _add_integer_product(
    x_Nm: Tensor, segment: Segment, precision: Precision, y_Nn: Tensor
) -> None:
    """Add the integer product with one segment."""
    x_Nk = x_Nm if segment.columns is None else x_Nm[:, segment.columns]
    if segment.column_scale is not None:
        x_Nk = x_Nk * segment.column_scale
    values_nk, scale_ng = segment.codes.double() - segment.center, segment.scale
    if segment.levels is not None:
        levels_tK, scale_t = round_levels(segment.levels)
        table_n = torch.zeros(len(scale_ng)).long() if segment.table is None else segment.table
        values_nk = levels_tK[table_n].gather(1, segment.codes.long()).double()
        scale_ng = scale_ng * scale_t[table_n, None]
    for begin, end, group in _blocks(segment):
        for codes_Nc, step_N1 in _round(x_Nk[:, begin:end], precision):
            total_N1 = codes_Nc.sum(1, keepdim=True)
            # Integers, and exact in double precision.
            sums_Nn = (codes_Nc.double() @ values_nk[:, begin:end].T).float()
            if segment.zero is not None:
                sums_Nn = sums_Nn - total_N1 * segment.zero[:, group]
            sums_Nn = sums_Nn * (scale_ng[:, group] * step_N1)
            if segment.offset is not None:
                sums_Nn = sums_Nn + segment.offset[:, group] * (total_N1 * step_N1)
            y_Nn += sums_Nn


def _round(x_Nc: Tensor, precision: Precision) -> Iterator[tuple[Tensor, Tensor]]:
    """Round a block of activations to bytes; yield them [N, c] with their scale [N, 1].

    `int16` has two bytes h and l for 255 h + l, both from -127 to 127; h comes first.
    """
    parts = _CODE_BYTES[precision]
    limit = 127.0 if parts == 1 else 127.0 * _BASE + 127
    most_N1 = x_Nc.abs().amax(1, keepdim=True)
    # Of two tensors: torch divides a number by multiplying with a reciprocal.
    inverse_N1 = torch.where(most_N1 > limit * 1e-38, torch.full_like(most_N1, limit) / most_N1, 0)
    codes_Nc, step_N1 = (x_Nc * inverse_N1).round_(), most_N1 / limit
    if parts == 2:
        above_Nc = (codes_Nc / _BASE).round_()
        yield above_Nc, step_N1 * _BASE
        codes_Nc = codes_Nc - _BASE * above_Nc
    yield codes_Nc, step_N1


@threads.give_torch(several=False)
def check() -> None:
    """Compare small products with the specification.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for segment in _examples(generator):
        shape = segment.codes.shape[0], segment.codes.shape[1]
        # Tall tiles and wide ones.
        for num_rows, dtype in ((1, torch.float32), (7, torch.float32), (7, torch.bfloat16)):
            x_Nm = torch.randn(num_rows, shape[1], generator=generator).to(dtype)
            for precision in precisions([segment]):
                found_Nn = PackedProduct([segment], shape, precision)(x_Nm, None).float()
                expected_Nn = twin(x_Nm, [segment], shape, precision, None).float()
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                tolerance = tolerance if precision == "exact" else 0.0
                if not (found_Nn - expected_Nn).norm() <= tolerance * expected_Nn.norm():
                    raise RuntimeError(
                        "the kernels compute wrong products on this machine "
                        f"({precision}, {segment.bits} bits); please report it, with the output "
                        "of spectool doctor"
                    )


def _examples(generator: torch.Generator) -> Iterator[Segment]:
    """Yield a small segment for each way in which codes become weights."""
    # Whole tiles and parts of one, whole chunks and parts of one, several blocks of a group.
    n, k = 77, 200

    def segment(bits: int, group_size: int = k) -> Segment:
        codes = torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, -(-k // group_size), generator=generator).half().float()
        return Segment(codes=codes, bits=bits, group_size=group_size, scale=scale)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grouped, whole = segment(4, 64), segment(8)
    yield replace(grouped, zero=(grouped.scale * 15).round())
    yield replace(segment(7), center=64)
    yield replace(whole, offset=normal(n, 1))
    yield replace(segment(2), levels=normal(3, 4), table=torch.arange(n) % 3)
    yield replace(segment(3), column_levels=normal(k, 8))
    yield replace(segment(4), levels=normal(1, 32), paired=True)


@functools.cache
def _load() -> Any:
    """Load the product of the library."""
    library = build.load_library()
    assert not isinstance(library, str), "the registry chooses kernels that can be had"
    run = library.functions.spectool_products
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_int], None
    return run
