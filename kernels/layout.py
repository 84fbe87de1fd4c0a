"""The layout in which `products.c` reads the codes of a segment, to and from plain codes.

Outputs are in tiles of 16 and strips of 4 tiles, inputs in chunks of 32; a group of columns is
padded to whole chunks. A chunk of a tile has a line of 64 bytes for each bit of a code: four bytes
for each output, for four neighbouring inputs. Widths other than 1, 2, 4 and 8 are split into planes
of such widths.

Shapes: n outputs, k columns, S strips, C chunks, B bits, N outputs one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE, STRIP, CHUNK, SLICES, QUAD = 16, 4, 32, 8, 4
STRIP_OUTPUTS = STRIP * TILE


def planes(bits: int) -> list[tuple[int, int]]:
    """Return the planes of a width, lowest bits first: shift and width of each."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((shift, width))
            shift += width
    return found


def chunk_columns(num_columns: int, group_size: int) -> Tensor:
    """Return which column each place of the padded chunks holds [C 32]; -1 for padding."""
    padded = -(-group_size // CHUNK) * CHUNK
    groups = -(-num_columns // group_size)
    last = num_columns - (groups - 1) * group_size
    place = torch.arange((groups - 1) * padded + -(-last // CHUNK) * CHUNK)
    column = place // padded * group_size + place % padded
    return torch.where((place % padded < group_size) & (column < num_columns), column, -1)


def to_lines(codes_nk: Tensor, bits: int) -> Tensor:
    """Lay codes [64 S, 32 C] out as lines U8 [S, C, 4, B, 64]."""
    n, k = codes_nk.shape
    strips, chunks = n // STRIP_OUTPUTS, k // CHUNK
    slices = codes_nk.view(strips, STRIP, TILE, chunks, SLICES, QUAD).permute(0, 3, 1, 4, 2, 5)
    slices = slices.reshape(strips, chunks, STRIP, SLICES, TILE * QUAD)
    lines = []
    for shift, width in planes(bits):
        # A line holds as many slices as codes fit into a byte.
        part = slices >> shift & (1 << width) - 1
        part = part.view(strips, chunks, STRIP, width, 8 // width, TILE * QUAD)
        line = part[..., 0, :].clone()
        for index in range(1, 8 // width):
            line |= part[..., index, :] << index * width
        lines.append(line)
    return torch.cat(lines, 3)


def from_lines(lines: Tensor, bits: int) -> Tensor:
    """Read codes U8 [N, 32 C] from lines [N, C, B, 4] of single outputs."""
    codes = lines.new_zeros(len(lines), lines.shape[1], SLICES, QUAD)
    first = 0
    for shift, width in planes(bits):
        part = lines[:, :, first : first + width]
        for index in range(8 // width):
            codes[:, :, index :: 8 // width] |= (part >> index * width & (1 << width) - 1) << shift
        first += width
    return codes.flatten(1)
