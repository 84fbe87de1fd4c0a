"""Heads in the formats that servers read, and from these into ours.

- `vllm-medusa`: Medusa heads as vLLM reads them (it has no official repository of its own).
- `eagle3`: EAGLE-3 heads as their authors store them; vLLM and SGLang read them.
- `speculators`: the same heads as the library of that name stores them, with the target's
  embedding and name; vLLM serves such a directory by itself.

All are a `config.json` and a `model.safetensors`. Servers count the states that EAGLE-3 fuses in
two ways: at the top of the configuration (vLLM, speculators) state i is what layer i reads, as in
our options; under `eagle_config` (SGLang) i is the layer whose output it is, one less.
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
from spectool.checkpoint.tensors import open_checkpoint
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
from spectool.decode.heads.layer import layer_config
from spectool.decode.target import Target
from spectool.errors import CheckpointError, SpectoolError, UnsupportedError, UsageError
from spectool.methods import resolve
from spectool.model.architecture import build_meta
from spectool.model.loading import load_outside, load_tokenizer, own_dtype
from spectool.model.packed import EmbeddingRows

WEIGHTS = "model.safetensors"
# Of the draft layer's configuration, what decides its function.
_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters")  # fmt: skip
# EAGLE-3.1's normed features and feedback, and what else our layer does not compute.
_NOT_OURS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias",
             "mlp_bias")  # fmt: skip
# Tokens that servers are told to draft in a row, as their own examples have it.
_CHAIN = 3
# The version of speculators whose configuration is written.
_SPECULATORS = "0.9.0"

_UNSERVED = "`spectool generate --draft` runs them as they are"

Written = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """`write(heads, tensors, model, target)` gives configuration and tensors; `target` is the name
    that the model is known by. `serve(model, out, num_heads)` are the servers' command lines."""

    method: str
    write: Callable[[Heads, Mapping[str, Tensor], PreTrainedModel, str], Written]
    serve: Callable[[str, str, int], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedHeads:
    """Weights to begin with, in our names. `embedding` and `output` are the target's as they were
    stored with them, where they were, `tokenizer` its tokenizer's digest."""

    place: Path
    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    embedding: Tensor | None = None
    output: Tensor | None = None
    tokenizer: str | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of the file of weights."""
        name = HEADS_FILE if (self.place / HEADS).exists() else WEIGHTS
        with (self.place / name).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def token_map(self) -> Tensor | None:
        return self.tensors.get("token_map")

    def fill(self, heads: Heads) -> None:
        """Give these weights to fresh heads.

        Raises:
            CheckpointError: they have other shapes, or were made for another embedding or output
                matrix than the target's.
        """
        fill(heads, self.tensors, self.place)
        if self.embedding is not None:
            device, vocab = heads.frozen.weight_VD.device, heads.frozen.output.out_features
            every_V = torch.arange(vocab, device=device)
            self._compare("embedding", self.embedding, heads.frozen.embed(every_V))
        if self.output is not None:
            self._compare("output matrix", self.output, heads.frozen.weight_VD)

    def _compare(self, what: str, said: Tensor, have: Tensor) -> None:
        # What was stored in one dtype and is computed in another differs by its last bits.
        rounding = 2 * torch.finfo(said.dtype).eps
        if said.shape != have.shape or not torch.allclose(
            said.to(have).float(), have.float(), rtol=rounding, atol=0
        ):
            raise CheckpointError(f"{self.place}: its {what} is not the target's")


def export(
    path: Path,
    model: str,
    out: Path,
    name: str,
    *,
    trust_remote_code: bool = False,
    checksums: bool = True,
) -> list[str]:
    """Write the heads in `path` for the target `model` to the directory `out`.

    Returns command lines that serve them.

    Raises:
        UsageError: no such format, or OUT exists.
        UnsupportedError: the format cannot hold these heads.
        CheckpointError: the heads are not the target's.
    """
    if name not in FORMATS:
        raise UsageError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    record = read_record(path)
    if record.method != form.method:
        raise UnsupportedError(
            f"{path}: {name} holds {form.method} heads, these are {record.method}",
            hint=_way(record.method),
        )
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="choose another OUT, or remove it")
    check_target(out, overwrite=False)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code, checksums=checksums)
    dtype = own_dtype(checkpoint.layout)
    target = Target(
        load_outside(
            checkpoint,
            dtype=dtype,
            device=torch.device("cpu"),
            trust_remote_code=trust_remote_code,
        )
    )
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    check_fit(path, record, target, tokenizer, allow_other_target=False)
    tensors = read_weights(path, record, check=checksums)
    drafter: Any = resolve(record.method, "drafter")
    heads: Heads = drafter.Heads(
        drafter.Heads.Config.from_dict(record.options), target.model, tensors.get("token_map")
    )
    fill(heads, tensors, path / HEADS_FILE)
    said, written = form.write(heads, tensors, target.model, model)
    identity = {"export": name, "heads": record.target, "tensors": sorted(written)}
    with ArtifactWriter(out, identity=identity) as writer:
        metadata = {"method": record.method, "options": record.options, "target": record.target}
        contents = {key: value.contiguous() for key, value in written.items()}
        writer.write_shard(WEIGHTS, contents, metadata, {})
        writer.finish({"config.json": (json.dumps(said, indent=2) + "\n").encode()})
    return form.serve(model, str(out), heads.num_heads)


def _way(method: str) -> str:
    """What there is for heads that a format does not hold."""
    own = [name for name, form in FORMATS.items() if form.method == method]
    if own:
        return f"--format {' or '.join(own)}"
    served = ", ".join(dict.fromkeys(form.method for form in FORMATS.values()))
    return (
        f"no server reads {method} heads: `spectool generate --draft` does; servers read {served}"
    )


def read(place: Path, target: Any, *, checksums: bool = True) -> PretrainedHeads:
    """What lies in `place`, a directory of ours or in one of the formats, for a target's config.

    With `checksums`, weights in a directory of ours are compared with theirs.

    Raises:
        CheckpointError: it is none of them, or damaged.
        UnsupportedError: heads that no method here computes.
    """
    if (place / HEADS).exists():
        record = read_record(place)
        return PretrainedHeads(
            place=place,
            method=record.method,
            options=record.options,
            tensors=read_weights(place, record, check=checksums),
            tokenizer=record.target.get("tokenizer"),
        )
    check_place(place)
    said = read_json(place / "config.json")
    if not (place / WEIGHTS).exists() and list(place.glob("*.bin")):
        raise UnsupportedError(
            f"{place}: its weights are pickled, which are never read",
            hint=f"save them as {WEIGHTS} with safetensors first",
        )
    try:
        return _read(place, said, target)
    except SpectoolError:
        raise
    except Exception as error:
        # Files of others may contradict themselves in any way.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{place}: its files do not fit together: {reason}") from error


def _read(place: Path, said: dict[str, Any], target: Any) -> PretrainedHeads:
    """Heads in one of the formats, told by their configuration."""
    kind = said.get("speculators_model_type") or said.get("model_type")
    architectures = " ".join(map(str, said.get("architectures") or ()))
    tensors = read_finite_tensors(place / WEIGHTS)
    if kind == "medusa":
        return _read_medusa(place, said, tensors, target)
    if kind == "eagle3" or ("speculators_model_type" not in said and "agle3" in architectures):
        return _read_eagle3(place, said, tensors, target)
    raise UnsupportedError(
        f"{place}: holds {kind or architectures or 'something else'}, no heads that are read here",
        hint=f"read are heads of `train-heads` and {', '.join(FORMATS)}",
    )


def _write_medusa(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
    biased = [name for name in tensors if name.endswith("lm_head.bias")]
    biases = [tensors[name] for name in biased]
    if heads.own_output(0) is None and heads.frozen.bias_V is not None:
        biases.append(heads.frozen.bias_V)
    if any(bias.any() for bias in biases):
        raise UnsupportedError(
            "vllm-medusa has no place for biases of output matrices, which these heads have of "
            "their target's",
            hint=_UNSERVED,
        )
    written = {
        re.sub(r"^heads\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.layers.\2.",
               re.sub(r"^heads\.(\d+)\.lm_head\.", r"lm_heads.\1.", name)): tensor
        for name, tensor in tensors.items() if name not in biased
    }  # fmt: skip
    shared = heads.own_output(0) is None
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
    place: Path, said: dict[str, Any], stored: dict[str, Tensor], target: Any
) -> PretrainedHeads:
    """Heads without biases get such of zero."""
    stored = {name.removeprefix("medusa_heads."): tensor for name, tensor in stored.items()}
    output = stored.pop("lm_heads.0.weight", None) if said.get("original_lm_head") else None
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        head = re.fullmatch(r"lm_heads\.(\d+)\.weight", name)
        block = re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name)
        if head:
            tensors[f"heads.{head[1]}.lm_head.weight"] = tensor
        elif block:
            own = f"heads.{block[1]}.blocks.{block[2]}"
            tensors[f"{own}.{block[3]}"] = tensor
            tensors.setdefault(f"{own}.bias", tensor.new_zeros(len(tensor)))
        else:
            tensors[name] = tensor
    options = {
        "num_heads": said.get("num_heads"),
        "num_layers": said.get("num_hidden_layers"),
        "shared_head": output is not None,
    }
    token_map = tensors.get("token_map")
    if token_map is not None:
        rows = [name for name in tensors if "lm_head" in name]
        vocab = target.get_text_config(decoder=True).vocab_size
        order = _sort_map(place, tensors, rows, vocab)
        output = None if output is None else output[order]
    elif said.get("truncated_vocab_size", said.get("vocab_size")) != said.get("vocab_size"):
        raise CheckpointError(f"{place}: guesses a part of the tokens, but says not which")
    return PretrainedHeads(
        place=place,
        method="medusa",
        options={**options, "draft_vocab": 0 if token_map is None else len(token_map)},
        tensors=tensors,
        output=output,
    )


def _eagle3_tensors(heads: Heads, tensors: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    """The authors' names; `d2t` is what is to be added to a guess's place to make it an id."""
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
    embedding = model.get_input_embeddings()
    if isinstance(embedding, EmbeddingRows):
        embedding = embedding.embedding
    if type(embedding) is not nn.Embedding:
        raise UnsupportedError(
            "eagle3 takes the target's embedding as it is stored, and this target scales it",
            hint="--format speculators has a place for the scaled one",
        )
    layer = layer_config(model)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    written = _eagle3_tensors(heads, tensors, vocab)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layer(layer, vocab),
        "draft_vocab_size": len(written["lm_head.weight"]),
        **_fused(heads),
        "norm_before_residual": False,
        "torch_dtype": _dtype(tensors),
    }, written


def _write_speculators(
    heads: Heads, tensors: Mapping[str, Tensor], model: PreTrainedModel, target: str
) -> Written:
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
        "transformer_layer_config": _layer(layer_config(model), config.vocab_size),
        "draft_vocab_size": len(written["lm_head.weight"]),
        "eagle_aux_hidden_state_layer_ids": _fused(heads)["eagle_aux_hidden_state_layer_ids"],
        **{name: False for name in _NOT_OURS if "norm" in name},
        "torch_dtype": _dtype(tensors),
    }, written


def _layer(layer: LlamaConfig, vocab: int) -> dict[str, Any]:
    """The draft layer's configuration, with rotary positions as older readers want them too."""
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


def _fused(heads: Heads) -> dict[str, Any]:
    """Raises: UnsupportedError: not three states."""
    layers = heads.needs.layers
    if len(layers) != 3:
        raise UnsupportedError(
            f"servers fuse three of the target's states, these heads {len(layers)}",
            hint="train them with --layers LOW-MIDDLE-HIGH",
        )
    return {
        "eagle_aux_hidden_state_layer_ids": [index + 1 for index in layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(layers),
            "use_aux_hidden_state": True,
        },
    }


def _read_eagle3(
    place: Path, said: dict[str, Any], stored: dict[str, Tensor], target: Any
) -> PretrainedHeads:
    config = target.get_text_config(decoder=True)
    layer = said.get("transformer_layer_config", said)
    for name in _NOT_OURS:
        if said.get(name) or layer.get(name):
            raise UnsupportedError(f"{place}: its layer has {name}, which eagle3 here has not")
    if layer.get("num_hidden_layers", 1) != 1:
        raise UnsupportedError(f"{place}: has {layer['num_hidden_layers']} layers, eagle3 here one")
    _check_layer(place, layer, target)
    # Where the configuration does not say, what servers fuse.
    layers = config.num_hidden_layers
    nested = (said.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    states = said.get("eagle_aux_hidden_state_layer_ids") or (
        [index + 1 for index in nested] if nested else [2, layers // 2, layers - 3]
    )
    if sorted(set(states)) != list(states):
        raise UnsupportedError(f"{place}: fuses states {states}; read are different ones in order")
    tensors = {
        name.replace("layers.0.", "midlayer."): tensor
        for name, tensor in stored.items()
        if name not in ("d2t", "t2d", "embed_tokens.weight")
    }
    if "lm_head.weight" not in tensors:
        raise CheckpointError(f"{place}: lm_head.weight is absent")
    size = len(tensors["lm_head.weight"])
    tensors["token_map"] = _guessed(place, stored, size, config.vocab_size)
    _sort_map(place, tensors, ["lm_head.weight"], config.vocab_size)
    whole = size == config.vocab_size
    # Of a large vocabulary a part is guessed unless all of it is asked for.
    if whole and not Eagle3Heads.num_guessed(Eagle3Heads.Config(), size):
        del tensors["token_map"]
    return PretrainedHeads(
        place=place,
        method="eagle3",
        options={
            "layers": "-".join(map(str, states)),
            "draft_vocab": size if "token_map" in tensors else 0,
        },
        tensors=tensors,
        embedding=stored.get("embed_tokens.weight"),
    )


def _guessed(place: Path, stored: Mapping[str, Tensor], size: int, vocab: int) -> Tensor:
    """The target's ids of an output matrix's rows: each one's place and what `d2t` adds to it.

    Raises:
        CheckpointError: `d2t` is absent, but there are not as many rows as tokens; or it has
            another length, or says something else than `t2d`.
    """
    added = stored.get("d2t")
    if added is None:
        if size != vocab:
            raise CheckpointError(
                f"{place}: d2t is absent, but the output matrix has {size} rows and the target "
                f"{vocab} tokens: nothing says which of them are guessed",
                hint="the trainer that wrote the heads knows its d2t; heads of a reduced "
                "vocabulary are useless without",
            )
        return torch.arange(size)
    if added.shape != (size,) or added.is_floating_point():
        raise CheckpointError(
            f"{place}: d2t is {list(added.shape)} {str(added.dtype).removeprefix('torch.')}, "
            f"expected {size} whole numbers, one a row of the output matrix"
        )
    ids, marks = torch.arange(size) + added, stored.get("t2d")
    check_map(place, ids, vocab)
    if marks is not None and (
        marks.shape != (vocab,) or not torch.equal(marks.nonzero()[:, 0], ids.sort().values)
    ):
        raise CheckpointError(f"{place}: d2t and t2d do not name the same tokens")
    return ids


def _check_layer(place: Path, said: dict[str, Any], target: Any) -> None:
    """Raises: UnsupportedError: the draft layer has another shape than the target's own."""
    wanted = layer_config(build_meta(target))
    known = {name: value for name, value in said.items() if value is not None}
    have = LlamaConfig.from_dict(known)
    for name in _LAYER:
        if getattr(have, name) != getattr(wanted, name):
            raise UnsupportedError(
                f"{place}: its layer has {name} {getattr(have, name)}, the target "
                f"{getattr(wanted, name)}; layers in the target's own shape are read"
            )


def _sort_map(place: Path, tensors: dict[str, Tensor], rows: list[str], vocab: int) -> Tensor:
    """Bring the guessed ids, and these tensors' rows with them, into ascending order.

    Raises:
        CheckpointError: they are not distinct ids of the target's vocabulary, one a row.
    """
    ids = tensors["token_map"]
    check_map(place, ids, vocab)
    for name in rows:
        if len(tensors[name]) != len(ids):
            raise CheckpointError(
                f"{place}: {name} has {len(tensors[name])} rows, and {len(ids)} tokens are guessed"
            )
    tensors["token_map"], order = ids.sort()
    for name in rows:
        tensors[name] = tensors[name][order]
    return order


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    dtypes = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return dtypes.pop().removeprefix("torch.")


def _vllm(method: str, model: str, out: str, ahead: int) -> str:
    said = {"method": method, "model": out, "num_speculative_tokens": ahead}
    return shlex.join(["vllm", "serve", model, "--speculative-config", json.dumps(said)])


def _serve_medusa(model: str, out: str, ahead: int) -> list[str]:
    return [_vllm("medusa", model, out, ahead)]


def _serve_eagle3(model: str, out: str, ahead: int) -> list[str]:
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", model]
    sglang += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", out]
    return [_vllm("eagle3", model, out, min(_CHAIN, ahead)), shlex.join(sglang)]


def _serve_speculators(model: str, out: str, ahead: int) -> list[str]:
    return [shlex.join(["vllm", "serve", out])]


FORMATS: dict[str, Format] = {
    "vllm-medusa": Format(method="medusa", write=_write_medusa, serve=_serve_medusa),
    "eagle3": Format(method="eagle3", write=_write_eagle3, serve=_serve_eagle3),
    "speculators": Format(method="eagle3", write=_write_speculators, serve=_serve_speculators),
}
