"""Measure peak memory and speed of quantization, block by block, on a billion parameters.

Makes a random bf16 Llama on disk, quantizes it with `rtn` in its own process, and compares the peak
resident memory with a bound, 1.5 x (largest block in float32 + activation buffers) + 0.6 GB: once
on weights alone, and once with calibration text, which runs every block. The time to copy the
source on disk is reported as the floor for the time.

    python benchmarks/quantize_memory.py [--layers 14] [--out benchmarks/results/...json]

With `--trained`, two of its blocks are quantized by `gptq` and by the methods that train: 8
sequences of 2048 tokens, one epoch. The time for all 14 blocks is extrapolated from that of one;
with `--layers 14` it is measured.

    python benchmarks/quantize_memory.py --trained [METHOD ...] [--layers 2] [--device cuda]
        [--dtype bfloat16] [--out benchmarks/results/...json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spectool.checkpoint.artifact import write_safetensors
from spectool.machine import describe

WIDTH, INNER, VOCABULARY = 2048, 8192, 32000
SAMPLES, LENGTH = 8, 256
BLOCKS = 14
TRAINED = {
    "gptq": ["--bits", "3"],
    "ptq161": ["--epochs", "1"],
    "jlcm": ["--bits", "2", "--epochs", "1"],
    "scalar": ["--bits", "2", "--epochs", "1"],
}
TRAINED_LENGTH = 2048


def write_checkpoint(path: Path, layers: int) -> tuple[int, int]:
    """Write a random Llama, one shard per block; return its parameters and those of a block."""
    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH),
        "self_attn.v_proj": (WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }  # fmt: skip
    weight_map: dict[str, str] = {}
    total = 0

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> int:
        write_safetensors(path / name, tensors, {})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(tensor.numel() for tensor in tensors.values())

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    total += shard(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": random((VOCABULARY, WIDTH)),
            "model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16),
        },
    )
    block = 0
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": random(shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        block = shard(f"model-{layer:03d}.safetensors", tensors)
        total += block
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, block


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer with one token per byte, since calibration needs a tokenizer."""
    bytes_only = Tokenizer(models.BPE())
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    bytes_only.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(path)


def measure(out: Path, command: list[str]) -> dict[str, Any]:
    """Run a spectool command in its own process; return its JSON result and the seconds."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "spectool", *command, "--json"],
        capture_output=True, text=True, check=True, cwd=out.parent,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    return {**json.loads(done.stdout), "process_seconds": seconds}


def copy_seconds(model: Path, out: Path) -> float:
    """Return the seconds to copy the source, which writes more than quantization."""
    scratch = out.with_name("copy")
    began = time.perf_counter()
    shutil.copytree(model, scratch)
    seconds = time.perf_counter() - began
    shutil.rmtree(scratch)
    return seconds


def write_text(scratch: Path, model: Path) -> Path:
    """Write calibration text, and a tokenizer for the model."""
    text = scratch / "text.txt"
    text.write_text("the calibration text of a model whose weights are random " * 2000)
    write_tokenizer(model)
    return text


def measure_trained(
    methods: list[str], layers: int, device: str, dtype: str
) -> Iterator[dict[str, Any]]:
    """Measure each method on some blocks and extrapolate to all; yield the result so far."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        _, block = write_checkpoint(model, layers)
        text = write_text(Path(scratch), model)
        tokens = ["--samples", str(SAMPLES), "--seq-len", str(TRAINED_LENGTH)]
        tokens += ["--batch-size", "1", "--device", device, "--dtype", dtype]
        for method in methods or TRAINED:
            command = ["quantize", method, str(model), str(out), *TRAINED[method]]
            result = measure(out, [*command, "--calibration", str(text), *tokens])
            # Buffers for the input and output of a block, and twice as many for a method that
            # fits the block's outputs to the original's.
            buffers = (2 if method == "gptq" else 4) * 4 * SAMPLES * TRAINED_LENGTH * WIDTH
            bound = 1.5 * (4 * block + buffers) + 0.6e9
            rows[method] = {
                "options": TRAINED[method],
                "seconds": result["process_seconds"],
                "extrapolated_hours_of_all": result["process_seconds"] / layers * BLOCKS / 3600,
                "peak_rss_bytes": result["peak_rss_bytes"],
                "peak_over_bound": result["peak_rss_bytes"] / bound,
                "peak_device_bytes": result["peak_device_bytes"],
                "bits_linears": result["bits_per_weight"]["linears"],
            }
            print(json.dumps({method: rows[method]}), flush=True)
            yield {
                "benchmark": "quantize_trained",
                "machine": describe(),
                "device": device,
                "dtype": dtype,
                "blocks": layers,
                "block_parameters": block,
                "tokens": SAMPLES * TRAINED_LENGTH,
                "methods": rows,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trained", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    if arguments.trained is not None:
        layers = arguments.layers or 2
        for result in measure_trained(arguments.trained, layers, arguments.device, arguments.dtype):
            if arguments.out:
                record.write(arguments.out, result)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        parameters, block = write_checkpoint(model, arguments.layers or BLOCKS)
        command = ["quantize", "rtn", str(model), str(out), "--bits", "4"]
        command += ["--device", arguments.device]
        data_free = measure(out, command)
        bound = 1.5 * 4 * block + 0.6e9
        buffers = 2 * 4 * SAMPLES * LENGTH * WIDTH
        text = write_text(Path(scratch), model)
        options = ["--calibration", str(text), "--samples", str(SAMPLES), "--seq-len", str(LENGTH)]
        calibrated = measure(out, [*command, *options])
        calibrated_bound = 1.5 * (4 * block + buffers) + 0.6e9
        result = {
            "benchmark": "quantize_memory",
            "command": "spectool quantize rtn MODEL OUT --bits 4",
            "machine": describe(),
            "parameters": parameters,
            "block_parameters": block,
            "peak_rss_bytes": data_free["peak_rss_bytes"],
            "bound_bytes": bound,
            "peak_over_bound": data_free["peak_rss_bytes"] / bound,
            "seconds": data_free["process_seconds"],
            "parameters_per_second": parameters / data_free["process_seconds"],
            "copy_seconds": copy_seconds(model, out),
            "calibrated": {
                "command": f"… --calibration TEXT --samples {SAMPLES} --seq-len {LENGTH}",
                "peak_rss_bytes": calibrated["peak_rss_bytes"],
                "bound_bytes": calibrated_bound,
                "peak_over_bound": calibrated["peak_rss_bytes"] / calibrated_bound,
                "seconds": calibrated["process_seconds"],
            },
        }
    text = record.to_text(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
