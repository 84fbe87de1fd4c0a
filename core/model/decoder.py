"""Which part of a model is its decoder: what makes hidden states of tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The decoder, which has the embedding and not the output matrix; None if there is none.

    transformers looks for it by name. That finds the output matrix of ModernBERT's decoder, which
    is called so, and all of Mllama's text model.
    """
    found: nn.Module | None = model.get_decoder()  # type: ignore[no-untyped-call]
    if found is None or _is_decoder(found, model):
        return found
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in inner if _is_decoder(part, model)), found)


def _is_decoder(part: nn.Module, model: Any) -> bool:
    held = {id(module) for module in part.modules()}
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    return id(table) in held and id(output) not in held
