"""Reading tensors one at a time, the fingerprint, and the search for bad values."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import check_finite, open_checkpoint, read_rows, read_tensor
from spectool.errors import CheckpointError

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
     torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (42, 1), (3, 5, 7)])
def test_tensors_equal_those_of_the_library(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "x.safetensors"
    saved = {"first": torch.ones(3).to(dtype), "x": (torch.randn(shape) * 9).to(dtype)}
    save_file(saved, path)
    for entry in read_header(path)[1]:
        found = read_tensor(entry)
        assert found.dtype == dtype and found.shape == saved[entry.name].shape
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (found, saved[entry.name])]
        assert torch.equal(*bits)


def test_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(8)}, path)
    (entry,) = read_header(path)[1]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended inside x"):
        read_tensor(entry)


def test_dtype_that_is_not_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    (entry,) = read_header(tmp_path / "x.safetensors")[1]
    entry = dataclasses.replace(entry, dtype="F8_E8M0")
    for use in (read_tensor, lambda found: write_safetensors(tmp_path / "y", {"x": found}, {})):
        with pytest.raises(CheckpointError, match="x has the unknown dtype F8_E8M0"):
            use(entry)


def test_fingerprint_ignores_sharding_only(checkpoint: Checkpoints, tmp_path: Path) -> None:
    whole = open_checkpoint(checkpoint("llama")).fingerprint()
    shards = checkpoint("llama", max_shard_size="20KB")
    assert len(open_checkpoint(shards).layout.files) > 2
    assert open_checkpoint(shards).fingerprint() == whole
    assert open_checkpoint(checkpoint("llama", seed=1)).fingerprint() != whole
    assert whole.startswith("sha256:") and len(whole) == 7 + 64


def test_fingerprint_sees_one_bit_a_name_a_shape_and_the_configuration(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    seen = {open_checkpoint(source).fingerprint()}
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"

    def variant(changed: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
        path = tmp_path / str(len(seen))
        shutil.copytree(source, path)
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**stored, **config}))
        return open_checkpoint(path).fingerprint()

    flipped = tensors[name].clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    for changed, config in (
        ({**tensors, name: flipped}, {}),
        ({**tensors, name: tensors[name].reshape(-1)}, {}),
        ({**{k: v for k, v in tensors.items() if k != name}, "other": tensors[name]}, {}),
        (tensors, {"rms_norm_eps": 1e-3}),
    ):
        found = variant(changed, config)
        assert found not in seen
        seen.add(found)
    assert variant(tensors, {"transformers_version": "9", "dtype": "bfloat16"}) in seen


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
def test_bad_values_are_found_and_counted(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(42, 123)
    check_finite("w", weight.to(dtype))
    weight[41, 122] = bad
    with pytest.raises(CheckpointError, match=r"^w: 1 of 5166 weights are NaN or infinite$"):
        check_finite("w", weight.to(dtype))


def test_opposite_infinities_and_sums_that_overflow() -> None:
    with pytest.raises(CheckpointError, match="2 of 3"):
        check_finite("w", torch.tensor([float("inf"), 1.0, -float("inf")]))
    check_finite("w", torch.full((9,), 3e38))
    check_finite("w", torch.full((99,), 6e4, dtype=torch.float16))
    check_finite("w", torch.full((9,), 1e308, dtype=torch.float64))
    check_finite("w", torch.tensor([2**40]))


@pytest.mark.parametrize("row", [-1, 3, 1 << 40])
def test_no_row_beyond_a_tensor_is_read(tmp_path: Path, row: int) -> None:
    tensors = {"a": torch.arange(6.0).view(3, 2), "b": torch.full((4, 2), 9.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    entry = next(e for e in read_header(tmp_path / "x.safetensors")[1] if e.name == "a")
    assert torch.equal(read_rows(entry, [2, 0]), tensors["a"][[2, 0]])
    with pytest.raises(CheckpointError, match=f"a has 3 rows, and row {row} was asked for"):
        read_rows(entry, [0, row])
