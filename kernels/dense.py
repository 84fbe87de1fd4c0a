"""Dense matrices in the dtype of the activations (`dense.c`). Fields: weight [n, m].

With up to about four rows torch reads a float32 matrix once per row, and it is slow in bfloat16 on
processors without bfloat16 instructions.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from spectool.kernels import build, cpu, threads
from spectool.kernels.base import Fields, Kernel, Operands

# `dense.c` reads rows in steps of up to 32 elements; rows of its scratch are padded to that.
PADDED = 32


class _Dense(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y", "scratch")),
        *((name, ctypes.c_ssize_t) for name in ("num_rows", "num_inputs", "num_outputs")),
        *((name, ctypes.c_int32) for name in ("is_bfloat16", "threads")),
    ]


class Dense(Kernel):
    """Products with dense matrices."""

    source = "dense"
    smallest = 1 << 15

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.most_rows = sys.maxsize
        if dtype == torch.bfloat16 and cpu.has_bfloat16():
            # With 64 rows torch is about as fast (one Zen 4 core, 318 M weights: kernel 215 ms,
            # torch 224); not measured since dense.c has panels in spans. With tiles torch is faster
            # from 8 rows on (two Xeon cores with AMX: 32 against 40 ms for 4 rows, 55 against 49
            # for 8, 133 against 46 for 32).
            self.most_rows = 4 if cpu.has_bfloat16_tiles() else 64

    def prepare(self, fields: Fields) -> Operands:
        return fields["weight"], None

    def linear(self, x: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
        weight, _ = operands
        n, m = weight.shape
        assert x.dtype == weight.dtype == self.dtype
        x_Nm = x.reshape(-1, m).contiguous()
        y_Nn = torch.empty(len(x_Nm), n, dtype=x.dtype)
        scratch = torch.empty(len(x_Nm) * -(-m // PADDED) * PADDED, dtype=torch.float32)
        bias_n = None if bias is None else bias.to(torch.float32).contiguous()
        given = _Dense(
            x=x_Nm.data_ptr(),
            w=weight.data_ptr(),
            bias=None if bias_n is None else bias_n.data_ptr(),
            y=y_Nn.data_ptr(),
            scratch=scratch.data_ptr(),
            num_rows=len(x_Nm),
            num_inputs=m,
            num_outputs=n,
            is_bfloat16=int(x.dtype == torch.bfloat16),
            threads=threads.count(),
        )
        _load()(ctypes.byref(given))
        return y_Nn.view(*x.shape[:-1], n)

    def matrix(self, fields: Fields) -> Tensor:
        return fields["weight"].float()

    def example(self, n: int, m: int, generator: torch.Generator) -> Fields:
        return {"weight": torch.randn(n, m, generator=generator).to(self.dtype)}


@functools.cache
def _load() -> Any:
    """Load the function of the library."""
    library = build.load_library()
    assert not isinstance(library, str), "the registry chooses kernels that can be built"
    run = library.functions.spectool_dense
    run.argtypes, run.restype = [ctypes.c_void_p], None
    return run
