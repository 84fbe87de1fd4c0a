"""Up to how many rows the kernel of dense matrices is used, and its rows at any number."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from spectool.kernels.dense import Dense
from spectool.kernels.registry import choose


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flags", "dtype", "rows"),
    [
        ("fma avx2", torch.float32, sys.maxsize),
        ("fma avx2", torch.bfloat16, sys.maxsize),
        ("avx2 avx512_bf16", torch.bfloat16, 64),
        ("avx512_bf16 amx_bf16 amx_tile", torch.bfloat16, 4),
        ("avx512_bf16 amx_bf16 amx_tile", torch.float32, sys.maxsize),
    ],
)
def test_the_kernel_yields_to_torch_where_torch_is_faster(
    monkeypatch: pytest.MonkeyPatch, flags: str, dtype: torch.dtype, rows: int
) -> None:
    monkeypatch.setattr("spectool.kernels.cpu.flags", lambda: frozenset(flags.split()))
    assert Dense(dtype).most_rows == rows


# Rows of outputs that fill tiles and do not; inputs of one span and of several, with a rest.
@pytest.mark.parametrize(("n", "m"), [(50, 70), (61, 1031), (7, 4500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_is_the_same_at_every_width(dtype: torch.dtype, n: int, m: int) -> None:
    if choose("dense", "cpu", dtype).kernel is None:
        pytest.skip("no kernel here")
    kernel, generator = Dense(dtype), torch.Generator().manual_seed(n)
    operands = kernel.prepare(kernel.example(n, m, generator))
    x = torch.randn(512, m, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    alone = torch.cat([kernel.linear(row, operands, bias) for row in x.split(1)])
    exact = x.double() @ operands[0].double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (alone.double() - exact).norm() <= tolerance * exact.norm()
    for width in (*range(2, 71), 128, 200, 512):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = kernel.linear(x[-width:], operands, bias)
            assert torch.equal(found, alone[-width:]), width
