"""HQQ against loops of its equations, and against round to nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectool.errors import UnsupportedError, UsageError
from spectool.quantize.methods.hqq import HQQ


def reference(weight_nm: Tensor, bits: int, group_size: int) -> Tensor:
    """Optimise zero points group by group in double precision."""
    n, m = weight_nm.shape
    top, columns = 2**bits - 1, group_size or m
    restored = np.zeros((n, m))
    for row in range(n):
        for start in range(0, m, columns):
            w = weight_nm[row, start : start + columns].double().numpy()
            full = np.concatenate([w, np.repeat(w[-1], columns - len(w))])
            scale = float(np.float16((full.max() - full.min()) / top))
            z, beta, best = -full.min() / scale, 10.0, (np.inf, 0.0)
            for _ in range(20):
                z = float(np.float16(z))
                q = np.clip(np.rint(full / scale + z), 0, top)
                e = full / scale + z - q
                norm = (np.abs(e) ** 0.7).sum()
                if norm < best[0] * (1 - 1e-6):
                    best = norm, z
                with np.errstate(divide="ignore"):
                    cut = np.where(e == 0, 0, np.abs(e) ** -0.3) / beta
                apart = np.sign(e) * np.maximum(0, np.abs(e) - cut)
                z, beta = (q - full / scale + apart).mean(), beta * 1.01
            q = np.clip(np.rint(w / scale + best[1]), 0, top)
            restored[row, start : start + columns] = scale * (q - best[1])
    return torch.from_numpy(restored)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 0), (4, 50), (8, 16)])
def test_equals_the_equations(pack: Callable[..., Any], bits: int, group_size: int) -> None:
    weight_nm = torch.randn((12, 123), generator=torch.Generator().manual_seed(1)) * 0.03
    packed = pack("hqq", weight_nm, bits=bits, group_size=group_size)
    wanted = reference(weight_nm, bits, group_size)
    # Rounds of equal norm may differ in the last bit only.
    apart_nm = (packed.module.dequantize() - wanted).abs() > 1e-6
    assert float(apart_nm.double().mean()) < 0.1
    found = (packed.module.dequantize() - weight_nm).abs().pow(0.7).sum()
    assert float(found) == pytest.approx(float((wanted - weight_nm).abs().pow(0.7).sum()), rel=1e-3)


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3, "group_size": 0}])
def test_contract(check_contract: Callable[..., None], options: dict[str, Any]) -> None:
    check_contract("hqq", torch.randn(42, 123) * 0.05, **options)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_rounding_on_heavy_tails(pack: Callable[..., Any], bits: int) -> None:
    """HQQ wins by its norm, and at 2 bits by squares too, with half a byte more per group."""
    weight_nm = torch.distributions.StudentT(4.0).sample((64, 512))
    hqq, rtn = (pack(name, weight_nm, bits=bits, group_size=64) for name in ("hqq", "rtn"))
    norms = [float((p.module.dequantize() - weight_nm).abs().pow(0.7).sum()) for p in (hqq, rtn)]
    assert norms[0] < norms[1]
    assert hqq.error < rtn.error


def test_equal_weights_and_zeros_are_kept(pack: Callable[..., Any]) -> None:
    weight_nm = torch.tensor([[0.0] * 40, [0.25] * 40, [-0.5] * 40])
    found_nm = pack("hqq", weight_nm, bits=2).module.dequantize()
    assert not found_nm[0].any()
    torch.testing.assert_close(found_nm, weight_nm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("spread", [1e-6, 4e-5, 1e-3])
def test_groups_far_from_zero_stay_there(
    pack: Callable[..., Any], bits: int, spread: float
) -> None:
    """With steps as small as their spread, their zero points would exceed float16."""
    weight_nm = 0.02 + spread * torch.rand(3, 66, generator=torch.Generator().manual_seed(0))
    found_nm = pack("hqq", weight_nm, bits=bits).module.dequantize()
    torch.testing.assert_close(found_nm, weight_nm, rtol=2e-3, atol=spread)


def test_a_scale_beyond_float16_is_refused(pack: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="float16"):
        pack("hqq", torch.randn(4, 64) * 1e9)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HQQ.Config(**options)
