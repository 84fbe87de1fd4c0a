"""Write a widened copy of a Llama checkpoint: the same function at the cost of a larger model.

    python benchmarks/widened.py SOURCE OUT [--hidden N] [--intermediate N] [--heads N] [--dtype T]

Small checkpoints that generate real text cost so little that a decoding method's speed on them says
nothing about large models. Here every dimension is padded with zeros, which keeps the text and
raises the cost. Padded channels, units and attention heads stay exactly zero; vocabulary, layers,
head size, query heads per key-value head, tokenizer and generation settings are unchanged.

An RMSNorm of the copy averages over D channels, of which d are not zero. With S their sum of
squares,

    S / D + eps * d / D = (d / D) * (S / d + eps),

so the normalized values grow by sqrt(D / d), and norm weights times sqrt(d / D) undo it. In float32
only rounding differs; in float16 and bfloat16 the norm weights are rounded once more, unless
sqrt(d / D) is a power of two, and close choices between tokens may change.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def widen(
    source: Path, out: Path, *, hidden: int, intermediate: int, heads: int, dtype: str
) -> int:
    """Write the widened copy of `source` into the new or empty `out`; return its parameters."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    config = _read_config(source)
    wide_config = _widen_config(config, hidden, intermediate, heads, dtype)
    # Refused, so that OUT is not SOURCE and holds no shards of an earlier copy.
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder")

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(wide_config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    norm_scale = math.sqrt(config.hidden_size / hidden)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # Other names are a second copy of a tied lm_head, or RoPE tables of old files.
            for name in shapes.keys() & set(file.keys()):
                tensor = file.get_tensor(name).float()
                if name.endswith("norm.weight"):
                    tensor *= norm_scale
                # Attention heads are contiguous rows of one size, and query head i uses key-value
                # head i // group, so the upper left corner keeps each with its partner.
                tensors[name] = torch.zeros(shapes[name], dtype=DTYPES[dtype])
                tensors[name][tuple(slice(size) for size in tensor.shape)] = tensor
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"{source} has no tensor {min(missing)} in its safetensors files")

    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        # Copy the tokenizer's files and the generation settings, whatever their names.
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model")
        if is_text and path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    wide_config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _read_config(source: Path) -> LlamaConfig:
    values = json.loads((source / "config.json").read_text())
    if values.get("model_type") != "llama":
        raise ValueError(f"{source} has model_type {values.get('model_type')}, expected llama")
    if "quantization_config" in values:
        raise ValueError(f"{source} is quantized, expected plain weights")
    return LlamaConfig.from_dict(values)


def _widen_config(
    config: LlamaConfig, hidden: int, intermediate: int, heads: int, dtype: str
) -> LlamaConfig:
    wanted = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
    }
    for name, value in wanted.items():
        if value < getattr(config, name):
            raise ValueError(f"{name} {value} is smaller than the source's {getattr(config, name)}")
    assert config.num_key_value_heads is not None  # LlamaConfig fills it in, and head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    if heads % group:
        raise ValueError(
            f"{heads} heads are not a multiple of {group}, the heads per key-value head"
        )
    # LlamaConfig requires it even when head_dim is given.
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of {heads} heads")
    return LlamaConfig.from_dict(
        {
            **config.to_dict(),
            **wanted,
            "num_key_value_heads": heads // group,
            "rms_norm_eps": config.rms_norm_eps * config.hidden_size / hidden,
            "dtype": dtype,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    # For 8 layers, head size 32 and a vocabulary of 4096 the defaults give 399 M parameters.
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5888)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = vars(parser.parse_args())
    try:
        num_parameters = widen(**options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{options['out']}: {num_parameters:,} parameters, {options['dtype']}")


if __name__ == "__main__":
    main()
