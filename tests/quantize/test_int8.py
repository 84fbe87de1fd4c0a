"""8-bit rows against loops, and against bitsandbytes where its float16 suffices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("shape", [(42, 123), (5, 431), (1, 1)])
def test_equals_the_equations(pack: Callable[..., Any], shape: tuple[int, int]) -> None:
    weight_nm = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.1
    packed = pack("int8", weight_nm)
    for row, values in enumerate(weight_nm.tolist()):
        scale = max(abs(value) for value in values)
        assert float(packed.fields["scale"][row]) == pytest.approx(scale, rel=1e-7)
        for column, value in enumerate(values):
            code = int(packed.fields["codes"][row, column])
            assert abs(code - 127 * value / scale) <= 0.5 + 1e-4
    restored_nm = packed.module.dequantize()
    assert (
        float((restored_nm - weight_nm).abs().max()) <= float(weight_nm.abs().max()) / 254 * 1.001
    )


def test_equals_bitsandbytes(pack: Callable[..., Any]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight_nm = (torch.randn(42, 431) * 0.1).half()
    codes, scale, _ = functional.int8_vectorwise_quant(weight_nm)
    packed = pack("int8", weight_nm)
    assert torch.equal(packed.fields["codes"], codes)
    assert torch.equal(packed.fields["scale"], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(42, 123), (43, 431)])
def test_contract(
    check_contract: Callable[..., None], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_contract("int8", (torch.randn(shape) * 0.05).to(dtype))


def test_rows_far_outside_float16(pack: Callable[..., Any]) -> None:
    weight_nm = torch.randn(3, 64) * torch.tensor([[1e6], [1e-9], [1e-38]])
    packed = pack("int8", weight_nm)
    rows = (packed.module.dequantize() - weight_nm).square().sum(1) / weight_nm.square().sum(1)
    assert float(rows[:2].max()) < 1e-4


def test_float16_products_do_not_overflow(pack: Callable[..., Any]) -> None:
    weight_nm = torch.full((2, 1024), 0.05)
    module = pack("int8", weight_nm).module.half()
    x = torch.full((1, 1024), 8.0, dtype=torch.float16)
    torch.testing.assert_close(module(x).float(), torch.full((1, 2), 409.6), rtol=1e-3, atol=0)


def test_zero_constant_and_grid_rows(pack: Callable[..., Any]) -> None:
    weight_nm = torch.zeros(3, 127)
    weight_nm[1], weight_nm[2] = -0.7, torch.arange(1.0, 128.0) * 0.25
    restored_nm = pack("int8", weight_nm).module.dequantize()
    assert torch.equal(restored_nm[0], weight_nm[0])
    torch.testing.assert_close(restored_nm, weight_nm, rtol=1e-6, atol=0)


def test_yardstick_and_stored_bits(pack: Callable[..., Any]) -> None:
    packed = pack("int8", torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    # A uniform grid of 254 steps over about +-3.1 sigma: (6.2 / 254)^2 / 12.
    assert packed.error == pytest.approx(5e-5, rel=0.2)
    assert packed.bits == 8 + 32 / 512
