"""`vllm-medusa`: Medusa heads as vLLM reads them; no repository publishes this format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode.heads.base import Heads
from spectool.decode.heads.formats.base import (
    UNSERVED,
    Format,
    PretrainedHeads,
    Written,
    dtype_name,
    sort_token_map,
    vllm_command,
)
from spectool.errors import CheckpointError, UnsupportedError


def _write(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
    """Return config and tensors of Medusa heads under vLLM's names."""
    biased = [name for name in tensors if name.endswith("lm_head.bias")]
    biases = [tensors[name] for name in biased]
    if heads.own_lm_head(0) is None and heads.frozen.bias_V is not None:
        biases.append(heads.frozen.bias_V)
    if any(bias.any() for bias in biases):
        raise UnsupportedError(
            "vllm-medusa has no place for biases of lm_heads, which these heads took from "
            "their target",
            hint=UNSERVED,
        )
    # heads.K.blocks.L -> blocks.K.layers.L, and heads.K.lm_head -> lm_heads.K.
    written = {
        re.sub(r"^heads\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.layers.\2.",
               re.sub(r"^heads\.(\d+)\.lm_head\.", r"lm_heads.\1.", name)): tensor
        for name, tensor in tensors.items() if name not in biased
    }  # fmt: skip
    shared = heads.own_lm_head(0) is None
    # A shared lm_head is stored once, as head 0's.
    if shared:
        written["lm_heads.0.weight"] = heads.frozen.weight_VD
    config = model.config.get_text_config(decoder=True)
    options: Any = heads.config
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": len(heads.frozen.weight_VD),
        "num_heads": options.num_heads,
        "num_hidden_layers": options.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": shared,
        "torch_dtype": dtype_name(tensors),
    }, written


def read(
    path: Path, config: dict[str, Any], stored: dict[str, Tensor], target: Any
) -> PretrainedHeads:
    """Convert Medusa heads from vLLM's names to ours; missing biases become zero."""
    stored = {name.removeprefix("medusa_heads."): tensor for name, tensor in stored.items()}
    shared_lm_head = (
        stored.pop("lm_heads.0.weight", None) if config.get("original_lm_head") else None
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        lm_head = re.fullmatch(r"lm_heads\.(\d+)\.weight", name)
        block = re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name)
        if lm_head:
            tensors[f"heads.{lm_head[1]}.lm_head.weight"] = tensor
        elif block:
            linear = f"heads.{block[1]}.blocks.{block[2]}"
            tensors[f"{linear}.{block[3]}"] = tensor
            tensors.setdefault(f"{linear}.bias", tensor.new_zeros(len(tensor)))
        else:
            tensors[name] = tensor
    options = {
        "num_heads": config.get("num_heads"),
        "num_layers": config.get("num_hidden_layers"),
        "shared_head": shared_lm_head is not None,
    }
    token_map = tensors.get("token_map")
    if token_map is not None:
        lm_heads = [name for name in tensors if "lm_head" in name]
        vocab = target.get_text_config(decoder=True).vocab_size
        order = sort_token_map(path, tensors, lm_heads, vocab)
        shared_lm_head = None if shared_lm_head is None else shared_lm_head[order]
    elif config.get("truncated_vocab_size", config.get("vocab_size")) != config.get("vocab_size"):
        raise CheckpointError(
            f"{path}: its heads guess only a part of the tokens, and token_map, which says which, "
            "is absent"
        )
    return PretrainedHeads(
        path=path,
        method="medusa",
        options={**options, "draft_vocab": 0 if token_map is None else len(token_map)},
        tensors=tensors,
        lm_head=shared_lm_head,
    )


def _serve(model: str, out: str, ahead: int) -> list[str]:
    return [vllm_command("medusa", model, out, ahead)]


VLLM_MEDUSA = Format(method="medusa", write=_write, serve=_serve)
