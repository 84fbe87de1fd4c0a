"""Where values of a forward first are NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import all_finite
from spectool.errors import NotFinite, UnsupportedError
from spectool.model.architecture import find_blocks

HINT = "try --dtype float32; if it is so there too, the checkpoint is broken"


def not_finite(whose: str, what: str, where: str) -> NotFinite:
    """The error of a run whose figures are no numbers: whose, which figure, and where it begins."""
    return NotFinite(
        f"{whose}: {what}: {where} is the first whose output is NaN or infinite", hint=HINT
    )


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, ids_BL: Tensor) -> str | None:
    """The first module whose output is not finite in a forward of these tokens; None if all are.

    The embedding, a block, or the output matrix. Runs the model once more.
    """
    try:
        blocks = find_blocks(model)[1]
    except UnsupportedError:
        blocks = []
    modules = {name: model.get_submodule(name) for name in blocks}
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[no-untyped-call]
        modules |= {name: module for name, module in model.named_modules() if module is part}
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(state, Tensor) and not all_finite(state):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        called: Any = model
        called(input_ids=ids_BL.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
