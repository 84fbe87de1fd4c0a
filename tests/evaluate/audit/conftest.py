"""Suites and checkpoints for the audits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Write = Callable[..., Path]


@pytest.fixture
def write_suite(tmp_path: Path) -> Write:
    """Return `write_suite(items)`, which writes a file of items."""

    def write(items: list[dict[str, Any]], name: str = "suite.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write


@pytest.fixture(scope="session")
def shuffled(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `llama` with the rows of its lm_head in another order."""
    path = tmp_path_factory.mktemp("shuffled") / "model"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    rows = torch.randperm(
        len(tensors["lm_head.weight"]), generator=torch.Generator().manual_seed(1)
    )
    tensors["lm_head.weight"] = tensors["lm_head.weight"][rows].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def overflowing(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `llama` with weights of its last layer that are finite, and too large."""
    path = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
