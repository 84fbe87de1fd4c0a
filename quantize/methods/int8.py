"""8-bit rows (`int8`): the weights of LLM.int8(), with one scale per row.

s = max|w| of the row, q = round(127 w / s), w' = s q / 127, stored as bitsandbytes does. Codes are
not computed by bitsandbytes, which takes float16 only (0.50.2): weights beyond 65504 would silently
become zeros, and small ones would lose digits.

Activations are not rounded: LLM.int8() chooses outlier columns over the whole batch, so a row's
result would depend on the other rows, and drafting could not guarantee the output of plain
decoding.

Source: Dettmers et al., LLM.int8(), 2022 (arXiv:2208.07339), section 2.
Shapes: n outputs, m inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.quantize.base import PackedFields, Quantizer
from spectool.quantize.statistics import LinearStats


class Int8(Quantizer):
    """The weights of LLM.int8(); see the module docstring."""

    name = "int8"

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        return {"codes": (torch.int8, (n, m)), "scale": (torch.float32, (n,))}

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        scale_n = weight_nm.abs().amax(-1).float()
        # A row of zeros may have any positive divisor.
        steps_n = 127 / torch.where(scale_n == 0, 1.0, scale_n)
        codes_nm = (weight_nm * steps_n[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes_nm, "scale": scale_n}

    def build(self, shape: tuple[int, int]) -> Int8Linear:
        return Int8Linear(self.layout(shape), shape)


class Int8Linear(PackedLinear):
    """Packed linear of `int8`. Fields: codes I8 [n, m], scale F32 [n]."""

    def rows(self, rows: slice | Tensor) -> Tensor:
        return self.q.codes[rows].float().mul_((self.q.scale[rows] / 127)[:, None])

    def segments(self) -> list[Segment]:
        return [
            Segment(
                # A byte without its sign bit turned is 128 more.
                codes=self.q.codes.view(torch.uint8) ^ 128,
                bits=8,
                group_size=self.in_features,
                scale=(self.q.scale / 127)[:, None],
                center=128,
            )
        ]
