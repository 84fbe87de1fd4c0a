"""Round to nearest against loops written from its equations."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectool.errors import UnsupportedError, UsageError
from spectool.quantize.methods.rtn import RTN

GRIDS = [
    {"bits": bits, "group_size": group, "symmetric": symmetric}
    for bits, group in ((2, 128), (3, 0), (4, 42), (5, 16), (6, 1), (7, 1000), (8, 7))
    for symmetric in (False, True)
]


def reference(weight_nm: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Compute W' by the equations of the module's docstring, group by group."""
    weight = weight_nm.float().numpy()
    n, m = weight.shape
    top = 2**bits - 1
    restored = np.empty_like(weight)
    for row in range(n):
        for start in range(0, m, group_size or m):
            group = weight[row, start : start + (group_size or m)]
            if symmetric:
                scale = np.float32(np.abs(group).max()) * np.float32(2 / top)
                zero = np.float32(2 ** (bits - 1))
            else:
                low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
                scale = (high - low) / np.float32(top)
            # The smallest scale that float16 holds; a group of zeros has 1.
            scale = np.float32(np.float16(max(scale, 2.0**-24))) if scale else np.float32(1)
            if not symmetric:
                zero = np.clip(np.rint(-low / scale), 0, top)
            codes = np.clip(np.rint(group / scale) + zero, 0, top)
            restored[row, start : start + len(group)] = scale * (codes - zero)
    return torch.from_numpy(restored)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(42, 123), (5, 431)])
def test_equals_the_equations(
    pack: Callable[..., Any], grid: dict[str, Any], shape: tuple[int, int]
) -> None:
    weight_nm = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.03 + 0.01
    packed = pack("rtn", weight_nm, **grid)
    assert torch.equal(packed.module.dequantize(), reference(weight_nm, **grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS[::3], ids=str)
def test_contract(
    check_contract: Callable[..., None], grid: dict[str, Any], dtype: torch.dtype
) -> None:
    check_contract("rtn", (torch.randn(42, 123) * 0.05).to(dtype), **grid)


def test_rows_packed_in_pieces_are_the_same(
    pack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_nm = torch.randn(43, 123)
    whole = pack("rtn", weight_nm).fields
    monkeypatch.setattr("spectool.quantize.methods.rtn.PIECE", 500)
    pieces = pack("rtn", weight_nm).fields
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_a_group_wider_than_a_row_is_the_row(pack: Callable[..., Any], method: str) -> None:
    """Memory for such a group is never allocated."""
    weight_nm = torch.randn(6, 24)
    row, wider = (pack(method, weight_nm, group_size=size).fields for size in (0, 10**12))
    assert all(torch.equal(row[name], wider[name]) for name in row)


@pytest.mark.parametrize("symmetric", [False, True])
def test_unpacked_in_pieces_is_the_same(
    pack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    module = pack("rtn", torch.randn(43, 123), bits=3, symmetric=symmetric).module
    monkeypatch.setattr("spectool.model.packed.PIECE", 500)
    pieces = list(module.pieces())
    assert len(pieces) == 11 and torch.equal(torch.cat(pieces), module.dequantize())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no way to reset the peak")
@pytest.mark.slow
def test_packing_and_measuring_hold_pieces_only(tmp_path: Path) -> None:
    code = r"""
import re
from pathlib import Path

import torch

from spectool.model.packed import relative_error
from spectool.quantize.methods.rtn import RTN


def resident(key):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(key + r":\s+(\d+)", status)[1])


def run(weight_nm):
    fields = RTN(config).pack(weight_nm, None, torch.Generator())
    module = RTN(config).build(tuple(weight_nm.shape))
    module.q.load_state_dict(fields)
    relative_error(weight_nm, module)


config = RTN.Config()
weight_nm = torch.zeros(4096, 4096, dtype=torch.bfloat16) + 0.5
run(weight_nm[:256])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run(weight_nm)
print(resident("VmHWM") - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    # The fields are 8.5 MB, held twice; all codes unpacked and the matrix in float32 are 84 more.
    assert int(run.stdout) < 85e6


def test_gaussian_yardsticks(pack: Callable[..., Any]) -> None:
    weight_nm = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    errors = [pack("rtn", weight_nm, bits=bits).error for bits in range(2, 9)]
    # Relative squared error of a min-max grid in groups of 128 of a normal distribution.
    for found, known in zip(errors, (0.25, 0.046, 0.010), strict=False):
        assert found == pytest.approx(known, rel=0.08)
    assert all(after < before / 3 for before, after in itertools.pairwise(errors))
    grouped = [pack("rtn", weight_nm, group_size=size).error for size in (32, 128, 0)]
    assert grouped == sorted(grouped)


@pytest.mark.parametrize("symmetric", [False, True])
def test_matrix_on_the_grid_is_kept_exactly(pack: Callable[..., Any], symmetric: bool) -> None:
    first = pack("rtn", torch.randn(42, 123), bits=3, group_size=16, symmetric=symmetric)
    on_grid_nm = first.module.dequantize()
    if symmetric:
        # The extreme -2^(b-1) would define a wider grid: its mirror image is not in this one.
        on_grid_nm = on_grid_nm[:, :16].clone()
        step = first.fields["scale"][:, :1].float()
        on_grid_nm = (on_grid_nm / step).clamp(-3, 3) * step
        on_grid_nm[:, 0] = 3.5 * step[:, 0]
        again = pack("rtn", on_grid_nm, bits=3, group_size=16, symmetric=True).module.dequantize()
        torch.testing.assert_close(again[:, 1:], on_grid_nm[:, 1:], rtol=0, atol=0)
        return
    again = pack("rtn", on_grid_nm, bits=3, group_size=16).module.dequantize()
    torch.testing.assert_close(again, on_grid_nm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_and_constant_rows(pack: Callable[..., Any], grid: dict[str, Any]) -> None:
    weight_nm = torch.zeros(4, 42)
    weight_nm[1], weight_nm[2], weight_nm[3, 5] = 0.25, -3.0, 1e-20
    restored_nm = pack("rtn", weight_nm, **grid).module.dequantize()
    assert torch.equal(restored_nm[0], weight_nm[0])
    if not grid["symmetric"]:
        torch.testing.assert_close(restored_nm[1:3], weight_nm[1:3], rtol=1e-3, atol=0)
    assert float((restored_nm - weight_nm).abs()[3].max()) < 1e-7


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1e9, 1e-8, 1e-30])
def test_matrix_beyond_the_stored_scale_is_refused(
    pack: Callable[..., Any], size: float, symmetric: bool
) -> None:
    weight_nm = torch.randn(4, 123, generator=torch.Generator().manual_seed(0)) * size
    with pytest.raises(UnsupportedError, match="its weights need a scale of") as caught:
        pack("rtn", weight_nm, bits=8, symmetric=symmetric)
    assert "\n" not in str(caught.value) and "--skip" in str(caught.value.hint)


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_groups_beside_larger_ones_are_near_zero(
    pack: Callable[..., Any], symmetric: bool
) -> None:
    weight_nm = torch.cat([torch.full((1, 8), 1.0), torch.full((1, 8), -1e-30)])
    packed = pack("rtn", weight_nm, bits=8, symmetric=symmetric)
    assert float((packed.module.dequantize() - weight_nm).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("options", "shape", "bits"),
    [
        # 4-bit codes and 16 + 8 bits a group of 128.
        ({}, (64, 256), 4 + 24 / 128),
        ({"symmetric": True}, (64, 256), 4 + 16 / 128),
        # 3 * 123 = 369 bits fill 12 words; one group a row.
        ({"bits": 3, "group_size": 0}, (42, 123), (12 * 32 + 24) / 123),
        # 431 columns are 27 groups of 16, the last of 15.
        ({"bits": 2, "group_size": 16}, (5, 431), (27 * 32 + 27 * 24) / 431),
    ],
)
def test_stored_bits(
    pack: Callable[..., Any], options: dict[str, Any], shape: tuple[int, int], bits: float
) -> None:
    assert pack("rtn", torch.randn(shape), **options).bits == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": -1}, {"bits": 4.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RTN.Config(**options)
