"""Search for a model's decoder, the part that computes hidden states, and for its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectool.errors import UnsupportedError
from spectool.model.matrices import find_matrices


def find_decoder(model: PreTrainedModel) -> nn.Module | None:
    """Find the decoder, which contains the embedding and not the lm_head; None without one."""
    # `get_decoder` looks for it by name. For ModernBERT's decoder that gives the lm_head, which is
    # named so, and for Mllama the whole text model. That of an encoder-decoder has a copy of the
    # embedding.
    named: nn.Module | None = model.get_decoder()  # type: ignore[no-untyped-call]
    if named is None or model.config.is_encoder_decoder or _is_decoder(named, model):
        return named
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return next((part for part in inner if _is_decoder(part, model)), named)


def _is_decoder(part: nn.Module, model: Any) -> bool:
    """Whether a module contains the model's embedding and not its lm_head."""
    held = {id(module) for module in part.modules()}
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    return id(table) in held and id(output) not in held


def find_blocks(model: PreTrainedModel) -> tuple[str, list[str]]:
    """Return the decoder's name in the model and the names of its blocks, in order.

    Raises:
        UnsupportedError: the decoder has no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = find_decoder(model)
    if decoder is None or id(decoder) not in names:
        raise UnsupportedError(f"{type(model).__name__} has no decoder that spectool can find")
    lists = _block_lists(decoder, names)
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    best = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return names[id(decoder)], [names[id(block)] for block in best]


def _block_lists(decoder: nn.Module, names: Mapping[int, str]) -> list[nn.ModuleList]:
    """Find the decoder's lists of modules with matrices, without those of vision towers in it."""
    text = type(getattr(decoder, "config", None))
    towers = tuple(
        f"{names[id(part)]}."
        for part in decoder.modules()
        if isinstance(part, PreTrainedModel) and type(part.config) is not text
    )
    return [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(find_matrices(module[0], ""))
        and all(id(child) in names for child in module)
        and not names[id(module)].startswith(towers)
    ]
