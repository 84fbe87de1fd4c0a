"""Search for a model's decoder, the part that computes hidden states of tokens."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def find_decoder(model: PreTrainedModel) -> nn.Module | None:
    """Find the decoder, which contains the embedding and not the lm_head; None without one."""
    # `get_decoder` looks for it by name. For ModernBERT's decoder that gives the lm_head, which is
    # named so, and for Mllama the whole text model.
    named: nn.Module | None = model.get_decoder()  # type: ignore[no-untyped-call]
    if named is None or _is_decoder(named, model):
        return named
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in inner if _is_decoder(part, model)), named)


def _is_decoder(part: nn.Module, model: Any) -> bool:
    """Whether a module contains the model's embedding and not its lm_head."""
    held = {id(module) for module in part.modules()}
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    return id(table) in held and id(output) not in held
