"""Llamas with random weights, for `step.py`: for transformers, packed, and as GGUF of llama.cpp.

The time of a step does not depend on the weights, so that matrices of a GGUF repeat a strip of
random rows: to quantize all of them takes minutes.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY, CONTEXT, STRIP = 4096, 512, 256


@dataclass(frozen=True)
class Shape:
    """The shape of a model; four heads of queries share one of keys and values."""

    layers: int
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32


SHAPES = {"400M": Shape(8), "1.1B": Shape(22)}
NARROW = {f"narrow-{layers}": Shape(layers, 256, 768, 4) for layers in (8, 24)}
# By bits of a weight: how ours is packed (None: dense), the formats of llama.cpp, and the dtype in
# which transformers and ours compute.
FITTED = ("--epochs", "0", "--no-compensate", "--samples", "4", "--seq-len", "128")
PACKED: dict[str, tuple[str, ...] | None] = {
    "32": None,
    "16": None,
    "8": ("rtn", "--bits", "8"),
    "4": ("rtn", "--bits", "4"),
    "2": ("rtn", "--bits", "2"),
    "1.6": ("ptq161", *FITTED),
}
FORMATS = {
    "32": ("F32",), "16": ("F16", "BF16"), "8": ("Q8_0",), "4": ("Q4_0",), "2": ("TQ2_0",),
    "1.6": ("TQ1_0",),
}  # fmt: skip


def write_models(work: Path, name: str, shape: Shape, bits: Sequence[str]) -> None:
    """Write what is not there yet of a model: dense, packed, and as GGUF."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    source = work / name / "dense"
    if not source.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 4, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, dtype="bfloat16",
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        write_tokenizer(PreTrainedTokenizerFast, source)
    for each in bits:
        options, out = PACKED[each], work / name / each
        if options is not None and not out.exists():
            words = [sys.executable, "-m", "spectool", "quantize", options[0], source, out]
            subprocess.run([*map(str, words), *options[1:]], check=True)
        for format in FORMATS[each]:
            if not (gguf := work / name / f"{format}.gguf").exists():
                write_gguf(gguf, shape, format)


def write_tokenizer(kind: Any, out: Path) -> None:
    """Write a tokenizer with a word for each id, which packing asks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kind(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(out)


def write_gguf(path: Path, shape: Shape, format: str) -> None:
    """Write a Llama whose matrices repeat a strip of random rows; norms are float32."""
    import numpy

    gguf: Any = importlib.import_module("gguf")
    kind = getattr(gguf.GGMLQuantizationType, format)
    head = kind if format in ("F32", "F16", "BF16") else gguf.GGMLQuantizationType.F16
    writer, random = gguf.GGUFWriter(path, "llama"), numpy.random.default_rng(0)
    width, keys = shape.hidden, shape.hidden // 4
    writer.add_block_count(shape.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads // 4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // shape.heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, columns: int, type: Any) -> None:
        strip = random.normal(0, 0.02, (STRIP, columns)).astype("float32")
        data = numpy.tile(gguf.quants.quantize(strip, type), (-(-rows // STRIP), 1))[:rows]
        writer.add_tensor(name, data, raw_dtype=type)

    add("token_embd.weight", VOCABULARY, width, head)
    ones = numpy.ones(width, dtype="float32")
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", keys, width), ("attn_v", keys, width),
            ("attn_output", width, width), ("ffn_gate", shape.intermediate, width),
            ("ffn_up", shape.intermediate, width), ("ffn_down", width, shape.intermediate),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", rows, columns, kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
