"""Dense matrices in the dtype of the activations (`dense.c`). Fields: weight [n, m].

With up to about four rows torch reads a float32 matrix once per row, and it is slow in bfloat16 on
processors without bfloat16 instructions.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from spectool.kernels import cpu
from spectool.kernels.base import Fields, Kernel, Operands


class Dense(Kernel):
    """Products with dense matrices."""

    source = "dense"
    smallest = 1 << 15

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        # With 64 rows torch is about as fast (one Zen 4 core, 318 M weights, kernel against torch:
        # float32 56 against 173 ms for 8 rows and 453 against 577 for 64; bfloat16 39 against 68
        # and 215 against 224).
        self.most_rows = 64
        if dtype == torch.bfloat16 and not cpu.has_bfloat16():
            # torch is very slow there.
            self.most_rows = sys.maxsize
        elif dtype == torch.bfloat16 and cpu.has_bfloat16_tiles():
            # torch uses the tiles (two Xeon cores with AMX, same weights, kernel against torch: 32
            # against 40 ms for 4 rows, 55 against 49 for 8, 133 against 46 for 32).
            self.most_rows = 4

    def prepare(self, fields: Fields) -> Operands:
        return fields["weight"], None

    def matrix(self, fields: Fields) -> Tensor:
        return fields["weight"].float()

    def example(self, n: int, m: int, generator: torch.Generator) -> Fields:
        return {"weight": torch.randn(n, m, generator=generator).to(self.dtype)}
