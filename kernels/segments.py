"""Segments: what a packed matrix is made of, in the one form that all products read.

A matrix [n, m] is a list of segments. A segment has the codes of some of the inputs, all of one
width, and what turns them into weights. With v the value of a code, the code itself or its level,
s, z and o those of the row and of the group of columns, and c = `column_scale`, a weight is one of

    s (v - z) c,   s (v - center) c,   (s v + o) c.

Shapes: n outputs, m inputs of the matrix; k columns, g groups, K levels, T codebooks of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# In pairs of columns, the code beside which the other one is an outlier; itself a zero. Levels of
# outliers follow the levels of the other codes.
VICTIM = 8
OUTLIERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Codes of some columns of a matrix, and how they become weights.

    `codes` U8 [n, k], one code of `bits` bits a byte. `scale`, `zero`, `offset` F32 [n, g], a group
    `group_size` columns wide, the last one maybe narrower. Levels of the codes: `levels` F32
    [T, K], where `table` I64 [n] chooses a row's codebook; or `column_levels` F32 [k, K], each
    column's own. `paired`: two columns share their codes (`VICTIM`), and `levels` has 32.
    `columns` I64 [k]: the inputs that the columns are multiplied with, all in order if None.
    `column_scale` F32 [k].
    """

    codes: Tensor
    bits: int
    group_size: int
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    center: int = 0
    levels: Tensor | None = None
    table: Tensor | None = None
    column_levels: Tensor | None = None
    paired: bool = False
    columns: Tensor | None = None
    column_scale: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        groups = -(-k // self.group_size)
        assert self.codes.dtype == torch.uint8 and 1 <= self.bits <= 8
        for each in (self.scale, self.zero, self.offset):
            assert each is None or (each.shape == (n, groups) and each.dtype == torch.float32)
        assert self.zero is None or (self.offset is None and not self.center)
        assert self.levels is None or self.column_levels is None
        if self.levels is not None or self.column_levels is not None:
            assert self.bits <= 4 and self.zero is None and not self.center
        if self.paired:
            assert self.levels is not None and k % 2 == 0
            assert self.group_size % 2 == 0 or groups == 1
        if self.table is not None:
            assert self.levels is not None and int(self.table.max()) < len(self.levels)
        for each in (self.columns, self.column_scale, self.column_levels):
            assert each is None or len(each) == k

    def values(self) -> Tensor:
        """Return the values [n, k] of the codes in float32."""
        codes_nk = self.codes.long()
        if self.column_levels is not None:
            return self.column_levels.T.gather(0, codes_nk)
        if self.levels is None:
            return self.codes.float()
        if self.paired:
            beside_nk = codes_nk.view(len(codes_nk), -1, 2).flip(-1).flatten(1)
            codes_nk = codes_nk + OUTLIERS * (beside_nk == VICTIM)
        if self.table is None:
            return self.levels[0][codes_nk]
        return self.levels[self.table].gather(1, codes_nk)

    def weights(self) -> Tensor:
        """Return the weights [n, k] in float32."""
        values_nk, k = self.values(), self.codes.shape[1]
        groups = self.scale.shape[1]
        padded_nk = F.pad(values_nk, (0, groups * self.group_size - k))
        values_ngc = padded_nk.view(-1, groups, self.group_size)
        if self.zero is not None:
            values_ngc = values_ngc - self.zero[..., None]
        elif self.center:
            values_ngc = values_ngc - self.center
        weights_ngc = values_ngc * self.scale[..., None]
        if self.offset is not None:
            weights_ngc = weights_ngc + self.offset[..., None]
        weights_nk = weights_ngc.flatten(1)[:, :k]
        return weights_nk if self.column_scale is None else weights_nk * self.column_scale


def assemble(segments: Sequence[Segment], shape: tuple[int, int]) -> Tensor:
    """Return the matrix [n, m] that segments make up, in float32."""
    if len(segments) == 1 and segments[0].columns is None:
        return segments[0].weights()
    matrix_nm = torch.zeros(shape, device=segments[0].codes.device)
    for segment in segments:
        assert segment.columns is not None, "one of several segments names its columns"
        matrix_nm[:, segment.columns] = segment.weights()
    return matrix_nm
