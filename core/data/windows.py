"""Windows of a text.

Windows do not overlap. Without a BOS token (the common protocol, used by published tables) each
window holds L tokens of the text, of which L - 1 are scored; the text's rest is dropped. With a BOS
token each window starts with it and holds L - 1 tokens of the text, all of which are scored; the
last window may be shorter.

Shapes: S windows, B of a batch, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.errors import TextError

# Logits of one batch take at most about this much.
LOGITS_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one length: the index of their group, their rows in it, and their ids [B, L]."""

    group: int
    rows: slice
    ids_BL: Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text, grouped by length (one group, or two with a shorter last window)."""

    groups: tuple[Tensor, ...]
    length: int
    bos: int | None

    @property
    def num_tokens(self) -> int:
        """Count the scored tokens."""
        return sum(len(ids_SL) * (ids_SL.shape[1] - 1) for ids_SL in self.groups)

    def batches(self, vocabulary: int, *, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield all windows in order, by default in batches with logits of up to LOGITS_BYTES."""
        for group, ids_SL in enumerate(self.groups):
            size = batch_size or max(1, LOGITS_BYTES // (4 * vocabulary * ids_SL.shape[1]))
            for start in range(0, len(ids_SL), size):
                rows = slice(start, min(start + size, len(ids_SL)))
                yield Batch(group, rows, ids_SL[rows])


def cut(ids: list[int], *, length: int, bos: int | None) -> Windows:
    """Cut a text into windows of `length` tokens; `bos` is the BOS token's id, None without one.

    Raises:
        TextError: the text does not fill one window.
    """
    inside = length - (bos is not None)
    if len(ids) < inside or inside < 1:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}",
            hint="give a longer text, or a smaller --window",
        )
    whole = len(ids) // inside
    rows_SL = torch.tensor(ids[: whole * inside]).view(whole, inside)
    if bos is None:
        return Windows((rows_SL,), length, None)
    groups = [torch.cat([torch.full((whole, 1), bos), rows_SL], 1)]
    if len(ids) % inside:
        groups.append(torch.tensor([[bos, *ids[whole * inside :]]]))
    return Windows(tuple(groups), length, bos)
