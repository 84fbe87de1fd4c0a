"""Other files than a checkpoint are refused by name, with what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spectool.checkpoint.foreign import check_config, check_directory, is_speculator
from spectool.checkpoint.headers import read_layout
from spectool.errors import InputError

Files = Mapping[str, Any]

DIRECTORIES: list[tuple[Files, str, str]] = [
    ({}, "no checkpoint", ""),
    (
        {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/base"}},
        "is a LoRA adapter of org/base",
        "merge_and_unload",
    ),
    ({"adapter_config.json": {"peft_type": "IA3"}}, "is a IA3 adapter,", "merge"),
    ({"adapter_config.json": b"{"}, "adapter", "merge"),
    (
        {"adapter_config.json": {"peft_type": "LORA"}, "config.json": {}, "model.safetensors": b""},
        "next to a checkpoint",
        "move adapter_config.json away",
    ),
    (
        {"model_index.json": {"_class_name": "FluxPipeline"}},
        "diffusion pipeline (FluxPipeline)",
        "",
    ),
    ({"model.Q4_K_M.gguf": b"GGUF"}, "is GGUF", "safetensors checkpoint"),
    ({"config.json": {}, "a.gguf": b"GGUF"}, "is GGUF", "converted from"),
    ({"config.json": {}, "pytorch_model.bin": b"PK"}, "only the pickle pytorch_model.bin", "first"),
    ({"config.json": {}, "model.pth": b"PK"}, "only the pickle model.pth", "never read"),
    ({"consolidated.00.pth": b"PK", "params.json": {}}, "consolidated.00.pth", "safetensors"),
    (
        {"consolidated.safetensors": b"", "params.json": {}},
        "the publisher's own format",
        "transformers' format",
    ),
    ({"config.json": {}, "model.onnx": b""}, "an ONNX model", ""),
    ({"config.json": {}, "tf_model.h5": b""}, "TensorFlow weights", ""),
    ({"tokenizer.json": {}, "tokenizer_config.json": {}}, "holds a tokenizer, but no model", ""),
    ({"model.safetensors": b""}, "holds weights, but no config.json", "configuration"),
    ({"config.json": {}}, "no safetensors weights", ""),
    ({"config.json": {}, "a-00001.safetensors": b""}, "only a-00001.safetensors", "index"),
    ({"spectool_heads.json": {}, "heads.safetensors": b""}, "draft heads", "--draft"),
    ({"checkpoint-90/config.json": {}, "checkpoint-100/config.json": {}}, "below it", "-100 and 1"),
    ({"snapshots/abc/config.json": {}, "refs/main": b"abc"}, "below it", "snapshots/abc"),
    (
        {"config.json": {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}},
        "is a drafter (LlamaForCausalLMEagle3)",
        "train-heads",
    ),
    (
        {
            "config.json": {
                "speculators_model_type": "eagle3",
                "speculators_config": {"verifier": {"name_or_path": "org/big"}},
            }
        },
        "for org/big",
        "--init-from",
    ),
    ({"config.json": {"medusa_num_heads": 3}}, "is a drafter", "--init-from"),
    (
        {"config.json": {"model_type": "t5", "is_encoder_decoder": True}},
        "t5 is an encoder-decoder",
        "",
    ),
    ({"config.json": {"text_config": {"num_layers": 10**9}}}, "num_layers is 1000000000", ""),
    ({"config.json": {"num_labels": -(10**9)}}, "num_labels", ""),
]


def fill(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize(("files", "message", "hint"), DIRECTORIES, ids=lambda part: str(part)[:40])
def test_directories(tmp_path: Path, files: Files, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read_layout(fill(tmp_path, files))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.safetensors", b"", "is a file of weights"),
        ("model.gguf", b"GGUF", "is GGUF"),
        ("model", b"GGUF\3", "is GGUF"),
        ("pytorch_model.bin", b"PK\3\4", "is a pickle"),
        ("model.pt", b"\x80\2", "is a pickle"),
        ("config.json", b"{}", "is a file, not a checkpoint directory"),
        ("x.onnx", b"", "is an ONNX model"),
    ],
)
def test_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        check_directory(tmp_path / name)
    with pytest.raises(InputError, match="no such directory"):
        check_directory(tmp_path / "absent")


def test_an_unfinished_artifact(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    path.mkdir()
    with pytest.raises(InputError, match="unfinished run"):
        check_directory(path)


def test_what_is_no_drafter_and_no_huge_number(tmp_path: Path) -> None:
    assert not is_speculator({"architectures": ["Eagle2_5_VLForConditionalGeneration"]})
    assert not is_speculator({"architectures": None, "model_type": "llama"})
    assert is_speculator({"architectures": ["EagleLlamaForCausalLM"]})
    large = {"max_position_embeddings": 10**7, "rope_theta": 5 * 10**8, "vocab_size": 262_144}
    large |= {"num_parameters": 7 * 10**9, "num_training_tokens": 10**12, "n_params": 10**9}
    check_config(tmp_path, {**large, "num_hidden_layers": 126, "x": float("nan")})
