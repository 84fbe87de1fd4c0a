"""Loading, block-by-block runs and quantization read the same tensors as transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import spectool
from spectool.checkpoint.headers import DENSE_FILE, DENSE_INDEX, TensorEntry
from spectool.checkpoint.tensors import open_checkpoint, read_tensor
from spectool.data.windows import Batch, Windows
from spectool.errors import CheckpointError
from spectool.evaluate.log_probs import BlockwiseLogProbs
from spectool.model.architecture import Architecture
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.int8 import Int8
from spectool.quantize.run import quantize

Checkpoints = Callable[..., Path]
Tensors = dict[str, Tensor]

IDS_BL = (torch.arange(20) * 7 % 61)[None]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _save(path: Path, tensors: Tensors) -> None:
    (path / DENSE_FILE).unlink()
    save_file({k: v.clone() for k, v in tensors.items()}, path / DENSE_FILE, {"format": "pt"})


def _shard(path: Path, tensors: Tensors, scale: float = 1.0) -> dict[str, str]:
    """Write two shards with scaled matrices; returns the file of each tensor."""
    names, where = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({k: (tensors[k] * scale).clone() for k in part}, path / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    return where


def _index(path: Path, where: dict[str, str]) -> None:
    (path / DENSE_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _stale_index(path: Path, tensors: Tensors) -> None:
    _index(path, _shard(path, tensors, 0.5))


def _index_without_shards(path: Path, tensors: Tensors) -> None:
    _index(path, dict.fromkeys(tensors, "model-00001-of-00002.safetensors"))


def _index_says_another_shard(path: Path, tensors: Tensors) -> None:
    where = _shard(path, tensors)
    swapped = dict(zip(where, reversed(list(where.values())), strict=True))
    (path / DENSE_FILE).unlink()
    _index(path, swapped)


def _index_leaves_some_out(path: Path, tensors: Tensors) -> None:
    where = _shard(path, tensors)
    (path / DENSE_FILE).unlink()
    _index(path, dict([*where.items()][:1] + [*where.items()][-1:]))


def _both_stored(path: Path, tensors: Tensors) -> None:
    _save(path, {**tensors, HEAD: tensors[TABLE]})


def _both_stored_and_different(path: Path, tensors: Tensors) -> None:
    _save(path, {**tensors, HEAD: tensors[TABLE].flip(0)})


def _stored_as_head(path: Path, tensors: Tensors) -> None:
    _save(path, {HEAD if key == TABLE else key: value for key, value in tensors.items()})


def _without_prefix(path: Path, tensors: Tensors) -> None:
    _save(path, {key.removeprefix("model."): value for key, value in tensors.items()})


def _head_with_prefix(path: Path, tensors: Tensors) -> None:
    _save(path, {**tensors, f"model.{HEAD}": tensors[TABLE].flip(0)})


def _twice(path: Path, tensors: Tensors) -> None:
    _save(path, {**tensors, **{k.removeprefix("model."): v * 2 for k, v in tensors.items()}})


def _extra(path: Path, tensors: Tensors) -> None:
    _save(path, {**tensors, "model.layers.1.mlp.up_proj.weight": torch.ones(4, 4),
                  "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # fmt: skip


LAYOUTS = [
    _stale_index, _index_without_shards, _index_says_another_shard, _index_leaves_some_out,
    _both_stored, _both_stored_and_different, _stored_as_head, _without_prefix,
    _head_with_prefix, _twice, _extra,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_takes_the_same_tensors(
    checkpoint: Checkpoints, tmp_path: Path, layout: Callable[[Path, Tensors], None]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama", tie_word_embeddings=True, num_hidden_layers=1), path)
    layout(path, load_file(path / DENSE_FILE))
    wanted_BLV = _logits(AutoModelForCausalLM.from_pretrained(path).eval())
    torch.testing.assert_close(_logits(spectool.load(path)), wanted_BLV, rtol=0, atol=0)
    _assert_blockwise(path, wanted_BLV)
    job = QuantizeJob(method="int8", config=Int8.Config())
    quantize(open_checkpoint(path), tmp_path / "packed", job)
    found_BLV = _logits(spectool.load(tmp_path / "packed"))
    assert float((found_BLV - wanted_BLV).norm() / wanted_BLV.norm()) < 0.1
    _assert_blockwise(tmp_path / "packed", found_BLV)


def test_different_matrices_that_are_said_to_be_tied_are_packed_apart(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama", tie_word_embeddings=True), path)
    _both_stored_and_different(path, load_file(path / DENSE_FILE))
    wanted_BLV = _logits(spectool.load(path))

    job = QuantizeJob(method="int8", config=Int8.Config(), embeddings=Int8())
    quantize(open_checkpoint(path), tmp_path / "packed", job)
    packed = tmp_path / "packed"
    assert json.loads((packed / "config.json").read_text())["tie_word_embeddings"] is False
    found_BLV = _logits(spectool.load(packed))
    assert float((found_BLV - wanted_BLV).norm() / wanted_BLV.norm()) < 0.05


def test_matrices_that_are_tied_and_both_stored_are_compared_once(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "model", []
    shutil.copytree(checkpoint("llama", tie_word_embeddings=True), path)
    tensors = load_file(path / DENSE_FILE)
    _both_stored(path, tensors)

    def reading(entry: TensorEntry, **rows: Any) -> torch.Tensor:
        read.append(entry.name)
        return read_tensor(entry, **rows)

    monkeypatch.setattr("spectool.checkpoint.tensors.read_tensor", reading)
    assert not any(Architecture(open_checkpoint(path)).untied for _ in range(2))
    assert sorted(read) == [HEAD, TABLE]
    # Not where another file lies now.
    _both_stored_and_different(path, tensors)
    assert Architecture(open_checkpoint(path)).untied


def test_absent_output_matrix_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama", tie_word_embeddings=False), path)
    tensors = load_file(path / DENSE_FILE)
    del tensors[HEAD]
    _save(path, tensors)
    for refused in (lambda: spectool.load(path), lambda: Architecture(open_checkpoint(path))):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            refused()


@torch.inference_mode()
def _logits(model: torch.nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS_BL, use_cache=False).logits
    return logits


def _assert_blockwise(path: Path, wanted_BLV: Tensor) -> None:
    windows = Windows((IDS_BL,), IDS_BL.shape[1], None)
    log_probs = BlockwiseLogProbs(
        open_checkpoint(path), windows, dtype=torch.float32, device=torch.device("cpu")
    )
    found_BLV = log_probs(Batch(0, slice(0, 1), IDS_BL, IDS_BL.shape[1] - 1))
    wanted_BLV = torch.log_softmax(wanted_BLV[:, :-1].float(), -1)
    torch.testing.assert_close(found_BLV, wanted_BLV, rtol=0, atol=1e-4)
