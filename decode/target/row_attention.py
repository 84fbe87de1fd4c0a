"""Attention of models with packed products: a node's result does not depend on the other nodes.

Registered with transformers under a name of its own. Passes of few rows on a CPU run
`kernels/attention.c`; other ones, and options that it does not know, `sdpa`.

Shapes: B batch, H heads of queries, G of keys and values, N rows, S keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spectool.kernels import attention

NAME = "spectool_rows"


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention [B, N, H, D] as transformers calls it."""
    # `sdpa` takes no notice of other options.
    plain = all(options.get(name) is None for name in ("softcap", "position_bias", "cache"))
    if plain and attention.supports(query, key, value, attention_mask):
        assert attention_mask is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention.attend(query, key, value, attention_mask, scale), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return found


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
