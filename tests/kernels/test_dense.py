"""Up to how many rows the kernel of dense matrices is the faster one, by processor."""

from __future__ import annotations

import sys

import pytest
import torch

from spectool.kernels.dense import Dense


@pytest.mark.parametrize(
    ("flags", "dtype", "rows"),
    [
        ("fma avx2", torch.float32, 64),
        ("fma avx2", torch.bfloat16, sys.maxsize),
        ("avx2 avx512_bf16", torch.bfloat16, 64),
        ("avx512_bf16 amx_bf16 amx_tile", torch.bfloat16, 4),
        ("avx512_bf16 amx_bf16 amx_tile", torch.float32, 64),
    ],
)
def test_the_kernel_yields_to_torch_where_torch_is_faster(
    monkeypatch: pytest.MonkeyPatch, flags: str, dtype: torch.dtype, rows: int
) -> None:
    monkeypatch.setattr("spectool.kernels.cpu.flags", lambda: frozenset(flags.split()))
    assert Dense(dtype).most_rows == rows
