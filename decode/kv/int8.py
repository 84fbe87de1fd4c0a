"""KV store of 8-bit codes: keys in groups of channels, values as one group a token.

For a group x of one token's channels in one attention head, with whole numbers q:

    s = bfloat16(max |x| / 127)        q = round(x / s)        x' = s q

`keys` are rounded in groups, since the channels of keys differ in size; a value is one group.
|x - x'| <= s / 2, before x' is rounded to the model's dtype. Scales are bfloat16 for its range: in
float16 a scale would be 0 where all |x| < 4e-6. That the scale is rounded costs no more: q is
computed with the rounded one, and |x / s| <= 127.25.

A token is rounded when a pass writes it, in the tree's tail as well, so all queries see the same
keys and values of it, whether it was drafted or not. Keys are rounded after their rotation: without
channels that are shared by tokens nothing is gained before it (KVQuant, Hooper et al. 2024,
arXiv:2401.18079). Suffixes: g groups, c channels of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool import options
from spectool.decode.kv.base import KVStore
from spectool.options import option


class Int8Store(KVStore):
    """Codes in int8, scales in bfloat16; a view computes keys and values in the model's dtype."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `int8`."""

        group: int = option(
            32,
            "most channels of a key with one scale; the number divides the head's width",
            minimum=1,
        )

    config: Config

    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        self._dtype = keys_BHND.dtype
        return *_round(keys_BHND, self.config.group), *_round(values_BHND, values_BHND.shape[-1])

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, key_scales, values, value_scales = fields
        return (
            _restore(keys, key_scales).to(self._dtype),
            _restore(values, value_scales).to(self._dtype),
        )


def _round(x_BHND: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return codes [B, H, N, D] and scales [B, H, N, g] of groups of at most `group` channels."""
    width = x_BHND.shape[-1]
    size = max(size for size in range(1, min(group, width) + 1) if width % size == 0)
    x_BHNgc = x_BHND.float().reshape(*x_BHND.shape[:-1], -1, size)
    scales_BHNg = (x_BHNgc.abs().amax(-1) / 127).bfloat16()
    # A group of zeros has the codes 0.
    divisor_BHNg1 = scales_BHNg.float().masked_fill(scales_BHNg == 0, 1)[..., None]
    codes_BHNgc = (x_BHNgc / divisor_BHNg1).round().clamp(-127, 127)
    return codes_BHNgc.to(torch.int8).flatten(-2), scales_BHNg


def _restore(codes_BHSD: Tensor, scales_BHSg: Tensor) -> Tensor:
    """Return s q in float32."""
    groups_BHSgc = codes_BHSD.reshape(*scales_BHSg.shape, -1)
    return (groups_BHSgc * scales_BHSg.float()[..., None]).flatten(-2)
