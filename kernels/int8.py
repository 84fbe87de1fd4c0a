"""8-bit codes with one scale per row (`int8.c`). Fields: codes I8 [n, m], scale F32 [n].

W = scale codes / 127, as `quantize/methods/int8.py` stores it. Activations are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectool.kernels.base import Fields, Kernel, Operands


class Int8(Kernel):
    """Products with 8-bit codes."""

    source = "int8"
    # Beyond, unpacking once a pass is as fast in bfloat16 (one Zen 4 core, 104 M weights, kernel
    # against unpacking: 2.0 against 2.6 s for 256 rows, 3.8 against 3.0 for 512).
    most_rows = 256

    def prepare(self, fields: Fields) -> Operands:
        return fields["codes"], fields["scale"] / 127

    def matrix(self, fields: Fields) -> Tensor:
        return fields["codes"].float() * (fields["scale"] / 127)[:, None]

    def example(self, n: int, m: int, generator: torch.Generator) -> Fields:
        codes_nm = torch.randint(-127, 128, (n, m), generator=generator, dtype=torch.int8)
        return {"codes": codes_nm, "scale": torch.rand(n, generator=generator)}
