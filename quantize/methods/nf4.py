"""NF4 (`nf4`): 4-bit codes for quantiles of a normal distribution, in blocks of the flat matrix.

bitsandbytes packs and multiplies; its in-memory format is stored. The tables (16 levels, and 256
for the nested scales) are constants of bitsandbytes and are not stored. With `double_quant` the
blocks' scales are 8-bit codes themselves, in blocks of 256.

Source: Dettmers et al., QLoRA, 2023 (arXiv:2305.14314), section 3. Shapes: n outputs, m inputs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from spectool import options
from spectool.errors import require
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.base import PackedFields, Quantizer
from spectool.quantize.statistics import LinearStats

# Block size of the nested scales, the only one that bitsandbytes' products support.
NESTED_BLOCK = 256
# Inputs that a product reads together; narrower groups would be padded to as many.
SMALLEST_GROUP = 32


@functools.cache
def bitsandbytes() -> ModuleType:
    """Import bitsandbytes, which takes five seconds and is done on first use only."""
    return require("bitsandbytes", extra="bnb", reason="this format")


class NF4(Quantizer):
    """NF4; see the module docstring."""

    name = "nf4"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        block_size: Literal[64, 128, 256, 512, 1024] = option(64, "weights that share a scale")
        double_quant: bool = option(True, "store the scales as 8-bit codes too")

    config: Config

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        size = shape[0] * shape[1]
        blocks = -(-size // self.config.block_size)
        codes = {"codes": (torch.uint8, (-(-size // 2),))}
        if not self.config.double_quant:
            return {**codes, "scale": (torch.float32, (blocks,))}
        return {
            **codes,
            "scale": (torch.uint8, (blocks,)),
            "scale_scale": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
            "scale_offset": (torch.float32, (1,)),
        }

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        codes, state = bitsandbytes().functional.quantize_4bit(
            weight_nm.float().contiguous(),
            blocksize=self.config.block_size,
            compress_statistics=self.config.double_quant,
            quant_type="nf4",
        )
        fields = {"codes": codes.view(-1), "scale": state.absmax}
        if self.config.double_quant:
            fields["scale_scale"] = state.state2.absmax
            fields["scale_offset"] = state.offset.reshape(1)
        return fields

    def build(self, shape: tuple[int, int]) -> NF4Linear:
        return NF4Linear(self.layout(shape), shape, self.config)


class NF4Linear(PackedLinear):
    """Packed linear of `nf4`.

    Fields: codes U8 [n m / 2], scale F32 [blocks]; with `double_quant` scale U8 [blocks],
    scale_scale F32 [blocks / 256], scale_offset F32 [1].
    """

    config: NF4.Config

    def _quant_state(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """Create bitsandbytes' QuantState for a weight of this shape and dtype."""
        functional = bitsandbytes().functional
        level_K, nested_K = _tables(str(self.q.codes.device))
        nested = {}
        if self.config.double_quant:
            nested = {
                "offset": self.q.scale_offset[0],
                "state2": functional.QuantState(
                    absmax=self.q.scale_scale,
                    code=nested_K,
                    blocksize=NESTED_BLOCK,
                    dtype=torch.float32,
                ),
            }
        return functional.QuantState(
            absmax=self.q.scale,
            shape=torch.Size(shape),
            code=level_K,
            blocksize=self.config.block_size,
            quant_type="nf4",
            dtype=dtype,
            **nested,
        )

    def dequantize(self) -> Tensor:
        # Unpacked as one row: bitsandbytes 0.50.2 on a CPU starts a new block at every row, which
        # is wrong where a block crosses rows (relative error 0.06 instead of 0.008).
        flat = self._quant_state((self.out_features * self.in_features,), torch.float32)
        weight: Tensor = bitsandbytes().functional.dequantize_4bit(self.q.codes.view(-1, 1), flat)
        return weight.view(self.out_features, self.in_features)

    def segments(self) -> list[Segment] | None:
        n, m = self.out_features, self.in_features
        # Blocks are of the flat matrix; a block that crosses rows is several groups.
        group = math.gcd(m, self.config.block_size)
        if group < SMALLEST_GROUP:
            return None
        scale = self.q.scale
        if self.config.double_quant:
            state = self._quant_state((n, m), torch.float32)
            unpack = bitsandbytes().functional.dequantize_blockwise
            scale = unpack(scale, state.state2) + self.q.scale_offset
        # The first code of a byte is in its high bits.
        codes = torch.stack([self.q.codes >> 4, self.q.codes & 15], -1)
        return [
            Segment(
                codes=codes.view(n, m),
                bits=4,
                group_size=group,
                scale=scale.repeat_interleave(self.config.block_size // group)[
                    : n * m // group
                ].view(n, -1),
                levels=_tables(str(codes.device))[0][None],
            )
        ]

    @property
    def is_differentiable(self) -> bool:
        # bitsandbytes unpacks without a gradient.
        return False

    def has_kernel(self) -> bool:
        # On a CPU bitsandbytes' product unpacks the whole matrix at every call.
        return self.q.codes.is_cuda and self.in_features % self.config.block_size == 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_kernel():
            return super().forward(x)
        out: Tensor = bitsandbytes().matmul_4bit(
            x,
            self.q.codes.view(-1, 1),
            self._quant_state((self.out_features, self.in_features), x.dtype),
            bias=self.bias,
        )
        return out


@functools.cache
def _tables(device: str) -> tuple[Tensor, Tensor]:
    """Return the 16 levels of NF4, and the 256 levels of the nested scales."""
    functional = bitsandbytes().functional
    level_K: Tensor = functional.get_4bit_type("nf4", device=device)
    nested_K: Tensor = functional.create_dynamic_map().to(device)
    return level_K, nested_K
