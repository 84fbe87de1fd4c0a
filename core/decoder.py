"""Which part of a model is its decoder: what makes hidden states of tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The decoder with the embedding of its tokens; None if transformers names none.

    transformers looks for it by name, and finds the output matrix of ModernBERT's decoder, which is
    called so.
    """
    source: Any = model
    found: nn.Module | None = source.get_decoder()
    if found is None or _holds_embedding(found, model):
        return found
    base: nn.Module = model.base_model
    return base if _holds_embedding(base, model) else found


def _holds_embedding(part: nn.Module, model: Any) -> bool:
    table = model.get_input_embeddings()
    return any(module is table for module in part.modules())
