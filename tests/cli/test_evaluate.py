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
