"""EAGLE-3 heads, in two formats that hold the same tensors.

- `eagle3`: as their authors store them, for vLLM and SGLang.
- `speculators`: as the library speculators stores them, with the target's embedding and name; vLLM
  serves such a directory by itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from spectool.decode.drafters.eagle3 import Eagle3Heads
from spectool.decode.heads.artifact import check_map
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
from spectool.decode.heads.layer import make_layer_config
from spectool.errors import CheckpointError, UnsupportedError
from spectool.model.meta import build_meta
from spectool.model.packed import EmbeddingRows

# Settings that decide what the draft layer computes.
_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters")  # fmt: skip
# Settings that our layer does not implement, EAGLE-3.1's norms of features and feedback among them.
_NOT_OURS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias",
             "mlp_bias")  # fmt: skip
# Longest chain that servers are configured to draft, as in their own examples.
_CHAIN = 3
# The version of speculators whose config format is written.
_SPECULATORS = "0.9.0"


def _eagle3_tensors(heads: Heads, tensors: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    """Return the tensors under the EAGLE-3 authors' names; guess i has the id i + `d2t[i]`."""
    written = {name: tensor for name, tensor in tensors.items() if name != "token_map"}
    if heads.own_lm_head(0) is None:
        if heads.frozen.bias_V is not None and heads.frozen.bias_V.any():
            raise UnsupportedError(
                "eagle3 has no place for the bias of the target's lm_head, which these heads share",
                hint=f"train them without --shared-head; {UNSERVED}",
            )
        written["lm_head.weight"] = heads.frozen.weight_VD
    size = len(written["lm_head.weight"])
    if "token_map" in tensors:
        ids = tensors["token_map"]
        written["d2t"] = ids - torch.arange(size)
        written["t2d"] = torch.isin(torch.arange(vocab), ids)
    return written


def _write_eagle3(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
    """Return config and tensors as the authors of EAGLE-3 store them."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, EmbeddingRows):
        embedding = embedding.embedding
    if type(embedding) is not nn.Embedding:
        raise UnsupportedError(
            "eagle3 takes the target's embedding as it is stored, and this target scales it",
            hint="--format speculators has a place for the scaled one",
        )
    layer = make_layer_config(model)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    written = _eagle3_tensors(heads, tensors, vocab)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layer_entries(layer, vocab),
        "draft_vocab_size": len(written["lm_head.weight"]),
        **_fused_layer_ids(heads),
        "norm_before_residual": False,
        "torch_dtype": dtype_name(tensors),
    }, written


def _write_speculators(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
    """Return config and tensors as the library speculators stores them."""
    config = model.config.get_text_config(decoder=True)
    written = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in _eagle3_tensors(heads, tensors, config.vocab_size).items()
    }
    every_V = torch.arange(config.vocab_size)
    written["embed_tokens.weight"] = heads.frozen.embed(every_V).to(tensors["fc.weight"])
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": min(_CHAIN, heads.num_heads),
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": target,
                "architectures": model.config.architectures or [type(model).__name__],
            },
        },
        "transformer_layer_config": _layer_entries(make_layer_config(model), config.vocab_size),
        "draft_vocab_size": len(written["lm_head.weight"]),
        "eagle_aux_hidden_state_layer_ids": _fused_layer_ids(heads)[
            "eagle_aux_hidden_state_layer_ids"
        ],
        **{name: False for name in _NOT_OURS if "norm" in name},
        "torch_dtype": dtype_name(tensors),
    }, written


def _layer_entries(layer: LlamaConfig, vocab: int) -> dict[str, Any]:
    """Return the draft layer's config entries, rotary ones also as older readers want them."""
    rope: dict[str, Any] = dict(layer.rope_parameters or {})
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "model_type": "llama",
        **{name: getattr(layer, name) for name in _LAYER},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaled,
        "max_position_embeddings": layer.max_position_embeddings,
        "num_hidden_layers": 1,
        "vocab_size": vocab,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _fused_layer_ids(heads: Heads) -> dict[str, Any]:
    """Return the config entries for the target states that the heads fuse."""
    layers = heads.needs.layers
    if len(layers) != 3:
        raise UnsupportedError(
            f"servers fuse three of the target's states, these heads {len(layers)}",
            hint="train them with --layers LOW-MIDDLE-HIGH",
        )
    # Servers count in two ways. At the top of the config (vLLM, speculators) state i is the input
    # of layer i, as in our options; under eagle_config (SGLang) it is the output of layer i.
    return {
        "eagle_aux_hidden_state_layer_ids": [index + 1 for index in layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "use_aux_hidden_state": True,
        },
    }


def read(
    path: Path, config: dict[str, Any], stored: dict[str, Tensor], target: Any
) -> PretrainedHeads:
    """Convert EAGLE-3 heads, in the authors' format or speculators', to our names.

    Raises:
        UnsupportedError: our layer does not compute what theirs does.
        CheckpointError: lm_head is absent, or its rows cannot be assigned to tokens.
    """
    text_config = target.get_text_config(decoder=True)
    layer = config.get("transformer_layer_config", config)
    for name in _NOT_OURS:
        if config.get(name) or layer.get(name):
            raise UnsupportedError(f"{path}: its layer has {name}, which eagle3 here does not")
    if layer.get("num_hidden_layers", 1) != 1:
        raise UnsupportedError(
            f"{path}: has {layer['num_hidden_layers']} layers, eagle3 here has one"
        )
    _check_layer(path, layer, target)
    layers = text_config.num_hidden_layers
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    # With neither entry, the states that servers fuse by default.
    states = config.get("eagle_aux_hidden_state_layer_ids") or (
        [index + 1 for index in nested] if nested else [2, layers // 2, layers - 3]
    )
    if sorted(set(states)) != list(states):
        raise UnsupportedError(
            f"{path}: fuses states {states}; expected distinct ones in ascending order"
        )
    tensors = {
        name.replace("layers.0.", "midlayer."): tensor
        for name, tensor in stored.items()
        if name not in ("d2t", "t2d", "embed_tokens.weight")
    }
    if "lm_head.weight" not in tensors:
        raise CheckpointError(f"{path}: lm_head.weight is absent")
    size = len(tensors["lm_head.weight"])
    tensors["token_map"] = _read_token_ids(path, stored, size, text_config.vocab_size)
    sort_token_map(path, tensors, ["lm_head.weight"], text_config.vocab_size)
    whole = size == text_config.vocab_size
    # No token_map where draft_vocab 0 means the whole vocabulary; for a large vocabulary it means
    # a part, so the map has to stay.
    if whole and not Eagle3Heads.draft_vocab_size(Eagle3Heads.Config(), size):
        del tensors["token_map"]
    return PretrainedHeads(
        path=path,
        method="eagle3",
        options={
            "layers": "-".join(map(str, states)),
            "draft_vocab": size if "token_map" in tensors else 0,
        },
        tensors=tensors,
        embedding=stored.get("embed_tokens.weight"),
    )


def _read_token_ids(path: Path, stored: Mapping[str, Tensor], size: int, vocab: int) -> Tensor:
    """Return the target's ids of lm_head's rows: row i is token i + `d2t[i]`."""
    offsets = stored.get("d2t")
    if offsets is None:
        if size != vocab:
            raise CheckpointError(
                f"{path}: d2t is absent, but lm_head has {size} rows and the target "
                f"{vocab} tokens: nothing says which of them are guessed",
                hint="ask the trainer that wrote the heads for its d2t; heads of a reduced "
                "vocabulary are useless without it",
            )
        return torch.arange(size)
    if offsets.shape != (size,) or offsets.is_floating_point():
        raise CheckpointError(
            f"{path}: d2t is {list(offsets.shape)} {str(offsets.dtype).removeprefix('torch.')}, "
            f"expected {size} whole numbers, one per row of lm_head"
        )
    ids, marks = torch.arange(size) + offsets, stored.get("t2d")
    check_map(path, ids, vocab)
    if marks is not None and (
        marks.shape != (vocab,) or not torch.equal(marks.nonzero()[:, 0], ids.sort().values)
    ):
        raise CheckpointError(f"{path}: d2t and t2d do not name the same tokens")
    return ids


def _check_layer(path: Path, entries: dict[str, Any], target: Any) -> None:
    """Check that the draft layer has the shape that ours would have for this target."""
    wanted = make_layer_config(build_meta(target))
    known = {name: value for name, value in entries.items() if value is not None}
    found = LlamaConfig.from_dict(known)
    for name in _LAYER:
        if getattr(found, name) != getattr(wanted, name):
            raise UnsupportedError(
                f"{path}: its layer has {name} {getattr(found, name)}, the target "
                f"{getattr(wanted, name)}; layers in the target's own shape are read"
            )


def _serve_eagle3(model: str, out: str, ahead: int) -> list[str]:
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", model]
    sglang += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", out]
    return [vllm_command("eagle3", model, out, min(_CHAIN, ahead)), shlex.join(sglang)]


def _serve_speculators(model: str, out: str, ahead: int) -> list[str]:
    return [shlex.join(["vllm", "serve", out])]


EAGLE3 = Format(method="eagle3", write=_write_eagle3, serve=_serve_eagle3)
SPECULATORS = Format(method="eagle3", write=_write_speculators, serve=_serve_speculators)
