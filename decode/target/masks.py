"""Attention masks of trees, and of several texts in one row.

Masks are 4-D, additive and in the model's dtype: boolean ones are silently added as 0/1 by eager
attention. Suffixes: B batch, N nodes, S columns of the cache (committed and tail), T nodes in the
tail, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def tree_mask(
    lengths: Sequence[int],
    positions_BS: Tensor,
    visible_BNT: Tensor,
    dtype: torch.dtype,
    *,
    seen: Sequence[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """Return the additive mask [B, 1, N, S]: a node sees its row's committed tokens and its path.

    `positions_BS` are the positions of all columns, on the host. Of the `lengths` committed
    columns, a row sees the first `seen`, all by default; in layers with a window, only keys less
    than `window` positions back.
    """
    (batch, num_nodes, num_tail), width = visible_BNT.shape, positions_BS.shape[1]
    hidden, device = torch.finfo(dtype).min, visible_BNT.device
    seen = seen or lengths
    mask_B1NS = torch.full((batch, 1, num_nodes, width), hidden, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        mask_B1NS[row, :, :, : seen[row]] = 0
        tail_1NT = mask_B1NS[row, :, :, length : length + num_tail]
        tail_1NT.masked_fill_(visible_BNT[row], 0)
    if window is not None and int(positions_BS.max()) >= window:
        for row, length in enumerate(lengths):
            key_S, end = positions_BS[row].to(device), length + num_tail
            behind_NS = key_S[end - num_nodes : end, None] - key_S
            mask_B1NS[row, 0].masked_fill_(behind_NS >= window, hidden)
    return mask_B1NS


def isolate_texts(segments_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and visibility [B, L, L] for rows of several texts (sequence packing).

    Positions [B, L] start at 0 with every text; a token sees its own text up to itself.
    """
    length = segments_BL.shape[1]
    column_L = torch.arange(length, device=segments_BL.device)
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    starts_BL = torch.where(begins_BL, column_L, 0).cummax(-1).values
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None]
    return column_L - starts_BL, same_BLL.tril()


def list_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return kinds of attention layers and their windows, as transformers infers them."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
