"""Conversion of draft heads to the formats that servers read, and back.

- `vllm-medusa`: Medusa heads as vLLM reads them; no repository publishes this format.
- `eagle3`: EAGLE-3 heads as their authors store them, for vLLM and SGLang.
- `speculators`: EAGLE-3 heads as the library speculators stores them, with the target's embedding
  and name; vLLM serves such a directory by itself.

Each is a `config.json` and a `model.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from spectool.checkpoint.artifact import ArtifactWriter, check_target
from spectool.checkpoint.foreign import check_place
from spectool.checkpoint.headers import HEADS, HEADS_FILE, read_json
from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.drafters.eagle3 import Eagle3Heads
from spectool.decode.heads.artifact import (
    check_fit,
    check_map,
    fill,
    read_finite_tensors,
    read_record,
    read_weights,
)
from spectool.decode.heads.base import Heads
from spectool.decode.heads.layer import make_layer_config
from spectool.decode.target import Target
from spectool.errors import CheckpointError, SpectoolError, UnsupportedError, UsageError
from spectool.methods import resolve
from spectool.model.architecture import build_meta
from spectool.model.loading import load_outside, load_tokenizer, own_dtype
from spectool.model.packed import EmbeddingRows

WEIGHTS = "model.safetensors"
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

_UNSERVED = "`spectool generate --draft` runs them as they are"

# `config.json` and the tensors of a directory in one of the formats.
Written = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of one head method.

    `write(heads, tensors, model, target)` returns config and tensors, where `target` is the
    target's name or path. `serve(model, out, num_heads)` returns the servers' command lines.
    """

    method: str
    write: Callable[[Heads, Mapping[str, Tensor], PreTrainedModel, str], Written]
    serve: Callable[[str, str, int], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedHeads:
    """Weights to start training from, under our names.

    `embedding` and `output` are the target's embedding and lm_head if they were stored with the
    heads; `tokenizer` is the digest of its tokenizer.
    """

    place: Path
    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    embedding: Tensor | None = None
    output: Tensor | None = None
    tokenizer: str | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the weights file."""
        name = HEADS_FILE if (self.place / HEADS).exists() else WEIGHTS
        with (self.place / name).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def token_map(self) -> Tensor | None:
        return self.tensors.get("token_map")

    def fill(self, heads: Heads) -> None:
        """Load these weights into new heads.

        Raises:
            CheckpointError: shapes differ, or the heads were made for another embedding or lm_head
                than the target's.
        """
        fill(heads, self.tensors, self.place)
        if self.embedding is not None:
            device, vocab = heads.frozen.weight_VD.device, heads.frozen.output.out_features
            every_V = torch.arange(vocab, device=device)
            self._compare("embedding", self.embedding, heads.frozen.embed(every_V))
        if self.output is not None:
            self._compare("output matrix", self.output, heads.frozen.weight_VD)

    def _compare(self, what: str, stored: Tensor, actual: Tensor) -> None:
        """Check that a stored matrix is the target's, up to rounding of its dtype."""
        rounding = 2 * torch.finfo(stored.dtype).eps
        if stored.shape != actual.shape or not torch.allclose(
            stored.to(actual).float(), actual.float(), rtol=rounding, atol=0
        ):
            raise CheckpointError(f"{self.place}: its {what} is not the target's")


def export(path: Path, checkpoint: Checkpoint, out: Path, name: str) -> list[str]:
    """Convert the heads in `path`, trained for the target `checkpoint`, to a format in `out`.

    Returns command lines that serve them.

    Raises:
        UsageError: the format is unknown, or OUT exists.
        UnsupportedError: the format cannot hold these heads.
        CheckpointError: the heads were not trained for this target.
    """
    if name not in FORMATS:
        raise UsageError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    record = read_record(path)
    if record.method != form.method:
        raise UnsupportedError(
            f"{path}: {name} holds {form.method} heads, these are {record.method}",
            hint=_where_served(record.method),
        )
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="choose another OUT, or remove it")
    check_target(out, overwrite=False)
    dtype = own_dtype(checkpoint.layout)
    target = Target(load_outside(checkpoint, dtype=dtype, device=torch.device("cpu")))
    tokenizer = load_tokenizer(checkpoint)
    check_fit(path, record, target, tokenizer, allow_other_target=False)
    tensors = read_weights(path, record, check=checkpoint.checksums)
    drafter: Any = resolve(record.method, "drafter")
    heads: Heads = drafter.Heads(
        drafter.Heads.Config.from_dict(record.options), target.model, tensors.get("token_map")
    )
    fill(heads, tensors, path / HEADS_FILE)
    config, written = form.write(heads, tensors, target.model, checkpoint.name)
    identity = {"export": name, "heads": record.target, "tensors": sorted(written)}
    with ArtifactWriter(out, identity=identity) as writer:
        metadata = {"method": record.method, "options": record.options, "target": record.target}
        contents = {key: value.contiguous() for key, value in written.items()}
        writer.write_shard(WEIGHTS, contents, metadata, {})
        writer.finish({"config.json": (json.dumps(config, indent=2) + "\n").encode()})
    return form.serve(checkpoint.name, str(out), heads.num_heads)


def _where_served(method: str) -> str:
    """Return the hint that says in which format, if any, heads of this method can be served."""
    suitable = [name for name, form in FORMATS.items() if form.method == method]
    if suitable:
        return f"--format {' or '.join(suitable)}"
    served = ", ".join(dict.fromkeys(form.method for form in FORMATS.values()))
    return (
        f"no server reads {method} heads: `spectool generate --draft` does; servers read {served}"
    )


def read(path: Path, target: Any, *, checksums: bool = True) -> PretrainedHeads:
    """Read heads from a directory of spectool's or in one of the formats.

    `target` is the target's config. With `checksums`, weights in a directory of spectool's are
    compared with their checksums.

    Raises:
        CheckpointError: the directory is in no known format, or damaged.
        UnsupportedError: no method here computes these heads.
    """
    if (path / HEADS).exists():
        record = read_record(path)
        return PretrainedHeads(
            place=path,
            method=record.method,
            options=record.options,
            tensors=read_weights(path, record, check=checksums),
            tokenizer=record.target.get("tokenizer"),
        )
    check_place(path)
    config = read_json(path / "config.json")
    if not (path / WEIGHTS).exists() and list(path.glob("*.bin")):
        raise UnsupportedError(
            f"{path}: its weights are pickled, and pickles are never read",
            hint=f"save them as {WEIGHTS} with safetensors first",
        )
    try:
        return _read_converted(path, config, target)
    except SpectoolError:
        raise
    except Exception as error:
        # Other programs' files may contradict themselves in any way.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: its files do not fit together: {reason}") from error


def _read_converted(path: Path, config: dict[str, Any], target: Any) -> PretrainedHeads:
    """Read heads in one of the formats, recognised by their config."""
    kind = config.get("speculators_model_type") or config.get("model_type")
    architectures = " ".join(map(str, config.get("architectures") or ()))
    tensors = read_finite_tensors(path / WEIGHTS)
    if kind == "medusa":
        return _read_medusa(path, config, tensors, target)
    if kind == "eagle3" or ("speculators_model_type" not in config and "agle3" in architectures):
        return _read_eagle3(path, config, tensors, target)
    raise UnsupportedError(
        f"{path}: holds {kind or architectures or 'something else'}, no heads that are read here",
        hint=f"expected heads of `train-heads`, or in a format of {', '.join(FORMATS)}",
    )


def _write_medusa(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
    """Return config and tensors of Medusa heads under vLLM's names.

    Raises:
        UnsupportedError: an lm_head has a bias.
    """
    biased = [name for name in tensors if name.endswith("lm_head.bias")]
    biases = [tensors[name] for name in biased]
    if heads.own_output(0) is None and heads.frozen.bias_V is not None:
        biases.append(heads.frozen.bias_V)
    if any(bias.any() for bias in biases):
        raise UnsupportedError(
            "vllm-medusa has no place for biases of output matrices, which these heads took from "
            "their target",
            hint=_UNSERVED,
        )
    # heads.K.blocks.L -> blocks.K.layers.L, and heads.K.lm_head -> lm_heads.K.
    written = {
        re.sub(r"^heads\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.layers.\2.",
               re.sub(r"^heads\.(\d+)\.lm_head\.", r"lm_heads.\1.", name)): tensor
        for name, tensor in tensors.items() if name not in biased
    }  # fmt: skip
    shared = heads.own_output(0) is None
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
        "torch_dtype": _dtype(tensors),
    }, written


def _read_medusa(
    path: Path, config: dict[str, Any], stored: dict[str, Tensor], target: Any
) -> PretrainedHeads:
    """Convert Medusa heads from vLLM's names to ours; missing biases become zero."""
    stored = {name.removeprefix("medusa_heads."): tensor for name, tensor in stored.items()}
    output = stored.pop("lm_heads.0.weight", None) if config.get("original_lm_head") else None
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
        "shared_head": output is not None,
    }
    token_map = tensors.get("token_map")
    if token_map is not None:
        lm_heads = [name for name in tensors if "lm_head" in name]
        vocab = target.get_text_config(decoder=True).vocab_size
        order = _sort_map(path, tensors, lm_heads, vocab)
        output = None if output is None else output[order]
    elif config.get("truncated_vocab_size", config.get("vocab_size")) != config.get("vocab_size"):
        raise CheckpointError(
            f"{path}: its heads guess only a part of the tokens, and token_map, which says which, "
            "is absent"
        )
    return PretrainedHeads(
        place=path,
        method="medusa",
        options={**options, "draft_vocab": 0 if token_map is None else len(token_map)},
        tensors=tensors,
        output=output,
    )


def _eagle3_tensors(heads: Heads, tensors: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    """Return the tensors under the EAGLE-3 authors' names; guess i has the id i + `d2t[i]`.

    Raises:
        UnsupportedError: the heads share an lm_head that has a bias.
    """
    written = {name: tensor for name, tensor in tensors.items() if name != "token_map"}
    if heads.own_output(0) is None:
        if heads.frozen.bias_V is not None and heads.frozen.bias_V.any():
            raise UnsupportedError(
                "eagle3 has no place for the bias of the target's output matrix, which these heads "
                "share",
                hint=f"train them without --shared-head; {_UNSERVED}",
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
    """Return config and tensors as the authors of EAGLE-3 store them.

    Raises:
        UnsupportedError: the target scales its embedding.
    """
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
        "torch_dtype": _dtype(tensors),
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
        "torch_dtype": _dtype(tensors),
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
    """Return the config entries for the target states that the heads fuse.

    Raises:
        UnsupportedError: they are not three.
    """
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


def _read_eagle3(
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
    _sort_map(path, tensors, ["lm_head.weight"], text_config.vocab_size)
    whole = size == text_config.vocab_size
    # No token_map where draft_vocab 0 means the whole vocabulary; for a large vocabulary it means
    # a part, so the map has to stay.
    if whole and not Eagle3Heads.num_guessed(Eagle3Heads.Config(), size):
        del tensors["token_map"]
    return PretrainedHeads(
        place=path,
        method="eagle3",
        options={
            "layers": "-".join(map(str, states)),
            "draft_vocab": size if "token_map" in tensors else 0,
        },
        tensors=tensors,
        embedding=stored.get("embed_tokens.weight"),
    )


def _read_token_ids(path: Path, stored: Mapping[str, Tensor], size: int, vocab: int) -> Tensor:
    """Return the target's ids of lm_head's rows: row i is token i + `d2t[i]`.

    Raises:
        CheckpointError: `d2t` is absent although rows and tokens differ in number, has another
            length, or contradicts `t2d`.
    """
    offsets = stored.get("d2t")
    if offsets is None:
        if size != vocab:
            raise CheckpointError(
                f"{path}: d2t is absent, but the output matrix has {size} rows and the target "
                f"{vocab} tokens: nothing says which of them are guessed",
                hint="ask the trainer that wrote the heads for its d2t; heads of a reduced "
                "vocabulary are useless without it",
            )
        return torch.arange(size)
    if offsets.shape != (size,) or offsets.is_floating_point():
        raise CheckpointError(
            f"{path}: d2t is {list(offsets.shape)} {str(offsets.dtype).removeprefix('torch.')}, "
            f"expected {size} whole numbers, one per row of the output matrix"
        )
    ids, marks = torch.arange(size) + offsets, stored.get("t2d")
    check_map(path, ids, vocab)
    if marks is not None and (
        marks.shape != (vocab,) or not torch.equal(marks.nonzero()[:, 0], ids.sort().values)
    ):
        raise CheckpointError(f"{path}: d2t and t2d do not name the same tokens")
    return ids


def _check_layer(path: Path, entries: dict[str, Any], target: Any) -> None:
    """Check that the draft layer has the shape that ours would have for this target.

    Raises:
        UnsupportedError: it has another.
    """
    wanted = make_layer_config(build_meta(target))
    known = {name: value for name, value in entries.items() if value is not None}
    found = LlamaConfig.from_dict(known)
    for name in _LAYER:
        if getattr(found, name) != getattr(wanted, name):
            raise UnsupportedError(
                f"{path}: its layer has {name} {getattr(found, name)}, the target "
                f"{getattr(wanted, name)}; layers in the target's own shape are read"
            )


def _sort_map(path: Path, tensors: dict[str, Tensor], lm_heads: list[str], vocab: int) -> Tensor:
    """Sort `token_map`, and the rows of these lm_heads with it, by token id; return the order.

    Raises:
        CheckpointError: it does not hold distinct ids of the target's vocabulary, one per row.
    """
    ids = tensors["token_map"]
    check_map(path, ids, vocab)
    for name in lm_heads:
        if len(tensors[name]) != len(ids):
            raise CheckpointError(
                f"{path}: {name} has {len(tensors[name])} rows, and {len(ids)} tokens are guessed"
            )
    tensors["token_map"], order = ids.sort()
    for name in lm_heads:
        tensors[name] = tensors[name][order]
    return order


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the floating-point tensors' one dtype."""
    dtypes = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return dtypes.pop().removeprefix("torch.")


def _vllm_command(method: str, model: str, out: str, ahead: int) -> str:
    config = {"method": method, "model": out, "num_speculative_tokens": ahead}
    return shlex.join(["vllm", "serve", model, "--speculative-config", json.dumps(config)])


def _serve_medusa(model: str, out: str, ahead: int) -> list[str]:
    return [_vllm_command("medusa", model, out, ahead)]


def _serve_eagle3(model: str, out: str, ahead: int) -> list[str]:
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", model]
    sglang += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", out]
    return [_vllm_command("eagle3", model, out, min(_CHAIN, ahead)), shlex.join(sglang)]


def _serve_speculators(model: str, out: str, ahead: int) -> list[str]:
    return [shlex.join(["vllm", "serve", out])]


FORMATS: dict[str, Format] = {
    "vllm-medusa": Format(method="medusa", write=_write_medusa, serve=_serve_medusa),
    "eagle3": Format(method="eagle3", write=_write_eagle3, serve=_serve_eagle3),
    "speculators": Format(method="eagle3", write=_write_speculators, serve=_serve_speculators),
}
