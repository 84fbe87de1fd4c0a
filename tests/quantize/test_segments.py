"""The segments of every format make up the matrix that it unpacks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spectool.errors import CheckpointError
from spectool.kernels.pack import pack_bits
from spectool.kernels.segments import assemble

SHAPES = [(42, 128), (43, 432), (5, 64), (1, 2)]


def weights(n: int, m: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + m)
    # A far row, and a column of outliers.
    weight_nm = torch.randn(n, m, generator=generator) * 0.1
    weight_nm[0] += 0.5
    weight_nm[:, 0] *= 9
    return weight_nm


@pytest.mark.parametrize("shape", [*SHAPES, (7, 123)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"bits": 3}),
        ("rtn", {"bits": 8, "group_size": 0}),
        ("rtn", {"bits": 4, "group_size": 100, "symmetric": True}),
        ("gptq", {"bits": 2}),
        ("hqq", {"bits": 5}),
        ("int8", {}),
        ("jlcm", {"bits": 1}),
        ("jlcm", {"bits": 4, "groups": 3}),
        ("scalar", {}),
        ("scalar", {"bits": 1.0}),
    ],
)
def test_they_make_up_the_matrix(
    pack: Callable[..., Any], shape: tuple[int, int], method: str, options: dict[str, Any]
) -> None:
    linear = pack(method, weights(*shape), **options).module
    assert torch.equal(assemble(linear.segments(), shape), linear.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_with_outliers(pack: Callable[..., Any], shape: tuple[int, int]) -> None:
    linear = pack("olive", weights(*shape)).module
    assert torch.equal(assemble(linear.segments(), shape), linear.dequantize())


def test_pairs_that_are_damaged_or_of_no_kind_that_products_read(pack: Callable[..., Any]) -> None:
    assert pack("olive", weights(5, 63)).module.segments() is None
    assert pack("olive", weights(5, 64), bits=8).module.segments() is None
    assert pack("olive-activations", weights(5, 64)).module.segments() is None
    linear = pack("olive", weights(5, 64)).module
    linear.q.codes.copy_(pack_bits(torch.full((5, 64), 8, dtype=torch.uint8), 4))
    with pytest.raises(CheckpointError, match="no such pair"):
        linear.segments()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
def test_blocks_of_normal_quantiles(
    pack: Callable[..., Any], block_size: int, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"block_size": block_size, "double_quant": double_quant}
    linear = pack("nf4", weights(42, 384), **options).module
    assert torch.equal(assemble(linear.segments(), (42, 384)), linear.dequantize())
    # A block that begins in one row ends in the next.
    for n in (42, 43):
        linear = pack("nf4", weights(n, 96), **options).module
        assert torch.equal(assemble(linear.segments(), (n, 96)), linear.dequantize())
    # Groups would be narrower than what products read together.
    assert pack("nf4", weights(42, 80), **options).module.segments() is None


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (7, 123)])
def test_signs_and_salient_columns(
    pack: Callable[..., Any], shape: tuple[int, int], ratio: float
) -> None:
    linear = pack("ptq161", weights(*shape), ratio=ratio).module
    linear.q.col_r.copy_(torch.rand(linear.q.col_r.shape) + 0.5)
    found_nm, expected_nm = assemble(linear.segments(), shape), linear.dequantize()
    # 2 a + (b - a) rounds other than a + b.
    size = float(expected_nm.abs().max())
    torch.testing.assert_close(found_nm, expected_nm, rtol=0, atol=1e-6 * size)
    high, _ = linear.columns()
    assert torch.equal(found_nm[:, high], expected_nm[:, high])


def test_groups_that_are_damaged(pack: Callable[..., Any]) -> None:
    linear = pack("jlcm", weights(42, 64)).module
    linear.q.group.fill_(200)
    with pytest.raises(CheckpointError, match="no such codebook"):
        linear.segments()
