"""Bit packing against a layout written bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits

SHAPES = [(4, 0), (1, 1), (3, 7), (2, 8), (5, 42), (2, 123), (3, 431)]


def reference(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack each row as one Python integer: little-endian, padded to 32-bit words."""
    rows = []
    for row in codes_RC.tolist():
        number = sum(code << (position * bits) for position, code in enumerate(row))
        words = (len(row) * bits + 31) // 32
        rows.append(list(number.to_bytes(4 * words, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_equals_the_layout_and_inverts(shape: tuple[int, int], bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes_RC = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes_RC, bits)
    assert packed.shape == (shape[0], packed_bytes(shape[1], bits))
    assert packed.is_contiguous()
    assert torch.equal(packed, reference(codes_RC, bits))
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes_RC)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_do_not_touch_their_neighbours(bits: int) -> None:
    codes_RC = torch.zeros(1, 42, dtype=torch.uint8)
    codes_RC[0, ::2] = 2**bits - 1
    assert torch.equal(unpack_bits(pack_bits(codes_RC, bits), bits, 42), codes_RC)


def test_padding_is_zero_and_rows_are_whole_words() -> None:
    packed = pack_bits(torch.full((2, 3), 7, dtype=torch.uint8), 3)
    assert packed.tolist() == [[0xFF, 0x01, 0, 0]] * 2


def test_strided_codes_are_packed_as_their_values() -> None:
    codes_RC = torch.arange(16, dtype=torch.uint8).view(4, 4).T
    assert torch.equal(pack_bits(codes_RC, 4), pack_bits(codes_RC.contiguous(), 4))
