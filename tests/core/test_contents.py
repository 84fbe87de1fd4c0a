"""Files compared with what the configuration describes, before anything is allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.errors import CheckpointError, InputError, UnsupportedError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model, load_tokenizer
from spectool.model.meta import build_meta, read_config

Checkpoint = Callable[..., Path]


def edited(source: Path, path: Path, **changes: Any) -> Path:
    """Copy a checkpoint and change its configuration."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


SIZES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"vocab_size": 321}, r"is \[320, 32\], but the configuration says \[321, 32\]"),
    ("llama", {"vocab_size": 10**12}, r"but the configuration says \[1000000000000, 32\]"),
    ("llama", {"intermediate_size": 64}, r"is \[.*56.*\], but the configuration says \[.*64.*\]"),
    ("llama", {"num_key_value_heads": 4}, r"_proj.weight is \[16, 32\], .* says \[32, 32\]"),
    ("llama", {"num_hidden_layers": 3}, "tensors of LlamaForCausalLM are in no file"),
    ("llama", {"num_hidden_layers": 99_000}, "describes more than .* parameters, but the files"),
    ("llama", {"hidden_size": 0}, "config.json"),
    ("gpt2", {"n_positions": 10**9}, r"is \[256, 32\], but the configuration says"),
    ("qwen3_moe", {"num_local_experts": 3}, r"is \[4, .*\], but the configuration says \[3, "),
]


@pytest.mark.parametrize(("family", "changes", "message"), SIZES, ids=lambda part: str(part)[:30])
def test_sizes_that_differ(
    checkpoint: Checkpoint, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    path = edited(checkpoint(family), tmp_path / "m", **changes)
    for open_one in (spectool.load, lambda path: Architecture(open_checkpoint(path))):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_one(path)
        assert "\n" not in str(caught.value)


def test_tables_that_no_weight_bounds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = edited(checkpoint("llama"), tmp_path / "m", head_dim=8)
    spectool.load(path)
    with pytest.raises(CheckpointError):
        Architecture(open_checkpoint(edited(path, tmp_path / "n", head_dim=10**12)))


def test_a_classifier_is_called_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = edited(
        checkpoint("llama"), tmp_path / "m", architectures=["LlamaForSequenceClassification"]
    )
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file({**tensors, "score.weight": head[:2].clone()}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight") as caught:
        spectool.load(path)
    assert "LlamaForSequenceClassification" in (caught.value.hint or "")


@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_encoders_are_refused_by_name(tmp_path: Path, family: str) -> None:
    options = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16,
               "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    for is_decoder in (True, False):
        config = getattr(transformers, f"{family}Config")(**options, is_decoder=is_decoder)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        if is_decoder:
            spectool.load(tmp_path)
    for opened in (
        lambda: spectool.load(tmp_path),
        lambda: Architecture(open_checkpoint(tmp_path)),
    ):
        with pytest.raises(UnsupportedError, match=r"no causal model: .* is_decoder false"):
            opened()


def test_an_encoder_decoder_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}))
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="bart is an encoder-decoder"):
        build_meta(read_config(open_checkpoint(tmp_path)))


def test_odd_dtype_names_open_everywhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = edited(checkpoint("llama"), tmp_path / "m", dtype="torch.bfloat16")
    assert spectool.load(path).dtype == torch.bfloat16
    assert spectool.load(path).config._name_or_path == str(path)
    assert load_tokenizer(open_checkpoint(path)).vocab_size
    assert Architecture(open_checkpoint(path)).config.dtype == torch.bfloat16
    wrong = edited(checkpoint("llama"), tmp_path / "w", dtype="int3")
    for open_one in (load_model, load_tokenizer, Architecture):
        with pytest.raises(CheckpointError, match=r'config.json is not valid: dtype is "int3"'):
            open_one(open_checkpoint(wrong))


@pytest.mark.parametrize("end_ids", [1.5, "x", [None], {"a": 1}])
def test_end_ids_that_are_none(checkpoint: Checkpoint, tmp_path: Path, end_ids: Any) -> None:
    path = edited(checkpoint("llama"), tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))
    with pytest.raises(InputError) as caught:
        Runner(spectool.load(path), tokenizer=load_tokenizer(open_checkpoint(path))).end_ids()
    assert "\n" not in str(caught.value)
