"""Gates of `eval` that a layer or an earlier result decides, through the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Checkpoints = Callable[..., Path]
Spectool = Callable[..., Any]


def test_a_scrambled_layer_is_named_and_fails_its_gate(
    spectool: Spectool, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint("llama-deep"), tmp_path / "scrambled"
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))
    tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    text.write_text(text.read_text()[:1500])
    words = ["--reference", source, "--text", text, "--window", 32, "--dtype", "float32"]
    gates = ["--gate", "worst_layer.error.upper<=0.2", "--gate", "worst_layer.error<=0.2"]
    failed = spectool("eval", out, *words, *gates)
    assert failed.code == 3, failed.err
    assert "worst layer: model.layers.2 adds an error of " in failed.out
    assert failed.out.count("does not hold") == 2
    held = spectool("eval", source, *words, *gates, "--json")
    assert held.code == 0 and held.json["worst_layer"]["error"]["value"] == 0


def test_an_earlier_result_is_the_baseline(
    spectool: Spectool, checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    source, other, last = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "last.json"
    text.write_text(text.read_text()[:1500])
    words = ["eval", source, "--measure", "perplexity", "--text", text, "--window", 32]
    last.write_text(spectool(*words, "--json").out)
    words += ["--baseline", last]
    gates = ["--gate", "perplexity/baseline<=1", "--gate", "perplexity-baseline==0"]
    same = spectool(*words, *gates, "--json")
    assert same.code == 0, same.err
    assert same.json["changes"]["perplexity.value"]["ratio"] == 1
    shown = spectool("eval", other, *words[2:], *gates)
    assert shown.code == 3 and "perplexity: " in shown.out and ", baseline " in shown.out
    refused = spectool(*words, "--bos")
    assert refused.code == 2 and "they cannot be compared" in refused.err
    shorter = spectool(*words, "--limit", 1000)
    assert shorter.code == 2 and "its text is sha256:" in shorter.err
    wide = spectool("eval", checkpoint("llama-deep"), *words[2:])
    assert wide.code == 2 and "its num_hidden_layers is 2, and this run's is 5" in wide.err
    absent = ["--measure", "divergence", "--reference", source, "--gate", "kl/baseline<=1"]
    missing = spectool(*words, *absent)
    assert missing.code == 2 and "last.json has no kl.value" in missing.err


def test_the_lines_of_a_transcoder_say_which_features_are_left(
    spectool: Spectool, checkpoint: Checkpoints
) -> None:
    source = checkpoint("llama")
    words = ["--measure", "transcoder", "--reference", source, "--limit", 16_000, "--window", 64]
    words += ["--transcoder-width", 2, "--transcoder-tokens", 4096, "--dtype", "bfloat16"]
    gates = ["--gate", "transcoder.overlap.lower>=1", "--gate", "transcoder.model.active<=0"]
    shown = spectool("eval", source, *words, *gates)
    assert shown.code == 3, shown.err
    assert "transcoder of model.layers.1: 64 features (" in shown.out
    assert "overlap 100.00% [100.00%, 100.00%]" in shown.out
    assert "change of the output by features: 0.00% [0.00%, 0.00%]" in shown.out
    assert shown.out.count("does not hold") == 1
