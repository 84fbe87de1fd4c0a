"""Sub-byte packing, the torch twin: unsigned codes of 1-8 bits to bytes and back.

Layout: little-endian within a row, the first code in the lowest bits, codes crossing byte borders
where they do not divide 8; every row is padded to whole 32-bit words, and the padding is zero.
Shapes: R rows, C codes of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WORD_BYTES = 4


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes, padding included."""
    return -(-columns * bits // (8 * WORD_BYTES)) * WORD_BYTES


def pack_bits(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] below 2**bits -> uint8 bytes [R, packed_bytes(C, bits)]."""
    assert 1 <= bits <= 8 and codes_RC.dtype == torch.uint8
    rows, columns = codes_RC.shape
    # Eight codes fill exactly `bits` bytes, so that the places of all codes repeat in such units.
    units = -(-columns // 8)
    codes = torch.nn.functional.pad(codes_RC, (0, units * 8 - columns)).view(rows, units, 8)
    packed = torch.zeros(rows, units, bits, dtype=torch.uint8, device=codes_RC.device)
    for place, (byte, shift) in enumerate(_places(bits)):
        packed[:, :, byte] |= codes[:, :, place] << shift
        if shift + bits > 8:
            packed[:, :, byte + 1] |= codes[:, :, place] >> (8 - shift)
    width = packed_bytes(columns, bits)
    flat_RC = packed.view(rows, units * bits)
    if flat_RC.shape[1] >= width:
        return flat_RC[:, :width].contiguous()
    return torch.nn.functional.pad(flat_RC, (0, width - flat_RC.shape[1]))


def unpack_bits(
    bytes_RC: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """The inverse of `pack_bits`: codes [R, columns] as numbers of this dtype."""
    rows, width = bytes_RC.shape
    if 8 % bits == 0:
        # Codes that lie within a byte are looked up: three operations instead of dozens.
        table = _codes_of_bytes(bits, dtype, bytes_RC.device)
        found = table.index_select(0, bytes_RC.reshape(-1).int())
        return found.view(rows, width * (8 // bits))[:, :columns]
    units = -(-columns // 8)
    if width < units * bits:
        bytes_RC = torch.nn.functional.pad(bytes_RC, (0, units * bits - width))
    packed = bytes_RC[:, : units * bits].reshape(rows, units, bits)
    codes = torch.empty(rows, units, 8, dtype=torch.uint8, device=bytes_RC.device)
    for place, (byte, shift) in enumerate(_places(bits)):
        code = packed[:, :, byte] >> shift
        if shift + bits > 8:
            code |= packed[:, :, byte + 1] << (8 - shift)
        codes[:, :, place] = code & (2**bits - 1)
    return codes.view(rows, units * 8)[:, :columns].to(dtype)


@functools.cache
def _codes_of_bytes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The codes in each of the 256 bytes, lowest first: [256, 8 / bits]."""
    # Made once, perhaps inside inference mode, and used outside it too.
    with torch.inference_mode(False):
        shifts = torch.arange(0, 8, bits, device=device)
        codes = torch.arange(256, device=device)[:, None] >> shifts
        table: Tensor = (codes & (2**bits - 1)).to(dtype)
        return table


def _places(bits: int) -> list[tuple[int, int]]:
    """For each of eight codes: the byte of its lowest bit, and the bit within that byte."""
    return [divmod(place * bits, 8) for place in range(8)]
