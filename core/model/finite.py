"""Search for the first module of a forward whose output is NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import all_finite
from spectool.errors import NotFinite, UnsupportedError
from spectool.model.decoder import find_blocks

HINT = "try --dtype float32; if it is so there too, the checkpoint is broken"


def not_finite(whose: str, what: str, where: str) -> NotFinite:
    """Make the error of a model (`whose`) whose result (`what`) is not finite from `where` on."""
    return NotFinite(
        f"{whose}: {what}: {where} is the first whose output is NaN or infinite", hint=HINT
    )


@torch.no_grad()
def first_not_finite(
    model: PreTrainedModel, ids_BL: Tensor, decoder_ids_BL: Tensor | None = None
) -> str | None:
    """Find the embedding, block or lm_head whose output is first not finite; None if all are.

    Runs a forward of these tokens, and of those of an encoder-decoder's decoder.
    """
    try:
        blocks = find_blocks(model)[1]
    except UnsupportedError:
        blocks = []
    modules = {name: model.get_submodule(name) for name in blocks}
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[no-untyped-call]
        modules |= {name: module for name, module in model.named_modules() if module is part}
    first: list[str] = []

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not first and isinstance(state, Tensor) and not all_finite(state):
                first.append(name)

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    try:
        forward: Any = model
        inputs = {"input_ids": ids_BL.to(model.device)}
        if decoder_ids_BL is not None:
            inputs["decoder_input_ids"] = decoder_ids_BL.to(model.device)
        forward(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None
