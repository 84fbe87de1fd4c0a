"""Exports of packed checkpoints, read by the code of the other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.errors import UnsupportedError, UsageError
from spectool.model.packed import packed_modules
from spectool.quantize.base import parse_quantizer
from spectool.quantize.export import export
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.rules import Rule

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]
IDS = torch.arange(5, 45)[None]


@pytest.fixture
def phi(checkpoint: Checkpoints, tmp_path: Path) -> Callable[[bool], Path]:
    """Return `phi(tied)`, which makes a random model whose lm_head has a bias."""

    def make(tied: bool) -> Path:
        torch.manual_seed(0)
        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 56}
        config = PhiConfig(
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=tied, **sizes,
        )  # fmt: skip
        model = PhiForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path / "phi")
        AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path / "phi")
        return tmp_path / "phi"

    return make


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(("method", "options"), [("rtn", {"bits": 3}), ("olive", {})])
def test_dense_again(
    checkpoint: Checkpoints,
    compress: Compress,
    tmp_path: Path,
    family: str,
    method: str,
    options: dict[str, Any],
) -> None:
    packed = compress(checkpoint(family), method, job={"allow_dense": True}, **options)
    (line,) = export(open_checkpoint(packed), tmp_path / "dense", "dense")
    assert line == f"vllm serve {tmp_path / 'dense'}"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), logits(spectool.load(packed, activations="exact")))
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    AutoTokenizer.from_pretrained(tmp_path / "dense")
    spectool.load(tmp_path / "dense")


SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 4, "group_size": 8}),
    ("rtn", {"bits": 3, "group_size": 4096}),
    ("rtn", {"bits": 8, "group_size": 8, "symmetric": True}),
    ("gptq", {"bits": 2, "group_size": 8}),
    ("int8", {}),
]


@pytest.mark.parametrize(("method", "options"), SCHEMES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compressed_tensors_by_its_own_code(
    checkpoint: Checkpoints,
    compress: Compress,
    tmp_path: Path,
    text_file: str,
    family: str,
    method: str,
    options: dict[str, Any],
) -> None:
    """Decompress matrix by matrix, and load the whole model by transformers."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    job: dict[str, Any] = {}
    if method == "gptq":
        job = {"calibration": [text_file], "samples": 2, "seq_len": 16}
    packed = compress(checkpoint(family), method, job=job, **options)
    out = tmp_path / "served"
    lines = export(open_checkpoint(packed), out, "compressed-tensors")
    assert bool(lines) == (options.get("bits", 8) in (4, 8)), "what vLLM has kernels for"
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(quantization)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(quantization["format"])
    stored, ours = weights(out), packed_modules(spectool.load(packed, activations="exact"))
    assert ours and quantization["ignore"] == ["lm_head"]
    for name, linear in ours.items():
        tensors = {
            key.removeprefix(name + "."): tensor
            for key, tensor in stored.items()
            if key.startswith(name + ".weight_")
        }
        found = compressor.decompress(tensors, scheme)["weight"]
        scale = tensors["weight_scale"]
        assert torch.equal(found, linear.dequantize().to(scale.dtype))
    read: Any = spectool.load(out)
    for name, linear in ours.items():
        # compressed-tensors dequantizes in the dtype of the scales.
        weight, wanted = read.get_submodule(name).weight, linear.dequantize()
        torch.testing.assert_close(weight, wanted.to(weight.dtype), rtol=2**-8, atol=0)
    (text,) = Runner(read).generate([[5, 6, 7]], max_new_tokens=8)
    greedy = read.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    assert text.token_ids == greedy[0, 3:].tolist()
    if quantization["config_groups"]["group_0"]["weights"]["symmetric"]:
        # Zero points of that library's modules (0.20) have another shape than those it packs.
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(
            logits(theirs), logits(spectool.load(packed, activations="exact")), rtol=2e-2, atol=2e-2
        )


def test_several_schemes_are_groups_of_the_format(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    wide = Rule("down_proj", RTN(RTN.Config(bits=8, group_size=8, symmetric=True)), "")
    job = {"rules": [wide], "embeddings": None}
    packed = compress(checkpoint("llama"), "rtn", bits=4, group_size=8, symmetric=True, job=job)
    out = tmp_path / "served"
    assert export(open_checkpoint(packed), out, "compressed-tensors") == []
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(quantization)
    compressor = BaseCompressor.get_value_from_registry(quantization["format"])
    stored, ours = weights(out), packed_modules(spectool.load(packed, activations="exact"))
    found = {}
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            tensors = {
                key.removeprefix(name + "."): tensor
                for key, tensor in stored.items()
                if key.startswith(name + ".weight_")
            }
            found[name] = compressor.decompress(tensors, scheme)["weight"]
            wanted = ours[name].dequantize().to(tensors["weight_scale"].dtype)
            assert torch.equal(found[name], wanted)
    assert found.keys() == ours.keys() and len(config.config_groups) == 2
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(
        logits(theirs), logits(spectool.load(packed, activations="exact")), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", "olive", {}, "uniform grids; olive has none"),
        ("llama", "hqq", {}, "uniform grids; hqq has none"),
        ("gpt2", "rtn", {"group_size": 8}, "and this is none .conv1d"),
        ("qwen3_moe", "rtn", {"group_size": 8}, "and this is none .expert"),
        ("llama", "rtn", {"group_size": 24}, "no whole number of groups of 24"),
    ],
)
def test_what_it_cannot_hold(
    checkpoint: Checkpoints,
    compress: Compress,
    tmp_path: Path,
    family: str,
    method: str,
    options: dict[str, Any],
    message: str,
) -> None:
    packed = compress(checkpoint(family), method, job={"allow_dense": True}, **options)
    with pytest.raises(UnsupportedError, match=message) as caught:
        export(open_checkpoint(packed), tmp_path / "served", "compressed-tensors")
    assert caught.value.hint is not None and "--format dense" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def fit_job(text_file: str, epochs: int) -> dict[str, Any]:
    """Make the options of a job that fits the lm_head."""
    lm_head = parse_quantizer(f"vq:codes=32,epochs={epochs}")
    return {"lm_head": lm_head, "calibration": [text_file], "samples": 4, "seq_len": 32}


@pytest.mark.parametrize(("tied", "embeddings"), [(False, None), (True, None), (True, "int8")])
def test_a_fitted_lm_head_where_the_architecture_has_a_bias(
    phi: Callable[[bool], Path],
    compress: Compress,
    text_file: str,
    tmp_path: Path,
    tied: bool,
    embeddings: str | None,
) -> None:
    job = fit_job(text_file, epochs=1)
    if embeddings is not None:
        job["embeddings"] = parse_quantizer(embeddings)
    packed = compress(phi(tied), "rtn", bits=8, group_size=16, job=job)
    export(open_checkpoint(packed), tmp_path / "dense", "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert dense.lm_head.bias.any()
    torch.testing.assert_close(logits(dense), logits(spectool.load(packed, activations="exact")))
    torch.testing.assert_close(logits(spectool.load(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_fitted_bias_that_is_zero_is_left_out(
    checkpoint: Checkpoints, compress: Compress, text_file: str, tmp_path: Path, epochs: int
) -> None:
    job = fit_job(text_file, epochs)
    packed = compress(checkpoint("llama-tied"), "rtn", bits=8, group_size=16, job=job)
    if epochs:
        with pytest.raises(UnsupportedError, match=r"fitted with a bias, and .* llama has none"):
            export(open_checkpoint(packed), tmp_path / "dense", "dense")
        return
    export(open_checkpoint(packed), tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), logits(spectool.load(packed, activations="exact")))


def test_what_is_no_packed_checkpoint(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    with pytest.raises(UsageError, match="is not packed by spectool"):
        export(open_checkpoint(source), tmp_path / "x", "dense")
    packed = compress(source)
    with pytest.raises(UsageError, match="must lie outside"):
        export(open_checkpoint(packed), packed / "served", "dense")
    with pytest.raises(UsageError, match="expected one of dense, compressed-tensors"):
        export(open_checkpoint(packed), tmp_path / "x", "gguf")
    with pytest.raises(UsageError, match="exists already"):
        export(open_checkpoint(packed), packed, "dense")
