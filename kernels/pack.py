"""Bit packing: unsigned codes of 1 to 8 bits to bytes and back, in torch.

Layout: little-endian within a row, the first code in the lowest bits; a code may cross a byte
border. Every row is padded with zeros to whole 32-bit words.
Shapes: R rows, C codes or bytes of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WORD_BYTES = 4


def packed_bytes(columns: int, bits: int) -> int:
    """Return the bytes of one bit-packed row of `columns` codes, padding included."""
    return -(-columns * bits // (8 * WORD_BYTES)) * WORD_BYTES


def pack_bits(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [R, C] below 2**bits into uint8 bytes [R, packed_bytes(C, bits)]."""
    assert 1 <= bits <= 8 and codes_RC.dtype == torch.uint8
    rows, columns = codes_RC.shape
    # Eight codes fill exactly `bits` bytes, so bit positions repeat in such units.
    units = -(-columns // 8)
    codes = torch.nn.functional.pad(codes_RC, (0, units * 8 - columns)).view(rows, units, 8)
    packed = torch.zeros(rows, units, bits, dtype=torch.uint8, device=codes_RC.device)
    for position, (byte, shift) in enumerate(_code_positions(bits)):
        packed[:, :, byte] |= codes[:, :, position] << shift
        if shift + bits > 8:
            packed[:, :, byte + 1] |= codes[:, :, position] >> (8 - shift)
    width = packed_bytes(columns, bits)
    flat_RC = packed.view(rows, units * bits)
    if flat_RC.shape[1] >= width:
        return flat_RC[:, :width].contiguous()
    return torch.nn.functional.pad(flat_RC, (0, width - flat_RC.shape[1]))


def unpack_bits(
    bytes_RC: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Unpack bytes [R, C] of `pack_bits` into codes [R, columns] of type `dtype`."""
    rows, width = bytes_RC.shape
    if 8 % bits == 0:
        # No code crosses a byte: a table lookup takes three operations instead of dozens.
        table = _byte_table(bits, dtype, bytes_RC.device)
        codes = table.index_select(0, bytes_RC.reshape(-1).int())
        return codes.view(rows, width * (8 // bits))[:, :columns]
    units = -(-columns // 8)
    if width < units * bits:
        bytes_RC = torch.nn.functional.pad(bytes_RC, (0, units * bits - width))
    packed = bytes_RC[:, : units * bits].reshape(rows, units, bits)
    codes = torch.empty(rows, units, 8, dtype=torch.uint8, device=bytes_RC.device)
    for position, (byte, shift) in enumerate(_code_positions(bits)):
        code = packed[:, :, byte] >> shift
        if shift + bits > 8:
            code |= packed[:, :, byte + 1] << (8 - shift)
        codes[:, :, position] = code & (2**bits - 1)
    return codes.view(rows, units * 8)[:, :columns].to(dtype)


@functools.cache
def _byte_table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the codes [256, 8 / bits] within each of the 256 byte values, lowest first."""
    # The cached table may be created inside inference mode and is used outside it too.
    with torch.inference_mode(False):
        shifts = torch.arange(0, 8, bits, device=device)
        codes = torch.arange(256, device=device)[:, None] >> shifts
        table: Tensor = (codes & (2**bits - 1)).to(dtype)
        return table


def _code_positions(bits: int) -> list[tuple[int, int]]:
    """Return for each of eight codes the byte of its lowest bit and the bit within that byte."""
    return [divmod(position * bits, 8) for position in range(8)]
