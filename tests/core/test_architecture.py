"""Blocks, matrices and tensor names of every family; wrappers, experts, refusals."""

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
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError, UnsupportedError
from spectool.model.architecture import Architecture
from spectool.model.matrices import find_matrices
from spectool.model.meta import model_class, read_config
from spectool.model.packed import packed_modules
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize

Checkpoints = Callable[..., Path]

# family: blocks, one of them, its matrices in order
KNOWN = {
    "llama": ("model.layers.1", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
              "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "phi3": ("model.layers.1", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj",
             "mlp.down_proj"]),
    "gpt2": ("transformer.h.1", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "opt": ("model.decoder.layers.1", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj",
            "self_attn.out_proj", "fc1", "fc2"]),
    "gpt_neox": ("gpt_neox.layers.1", ["attention.query_key_value", "attention.dense",
                 "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
}  # fmt: skip


@pytest.mark.parametrize("family", list(KNOWN))
def test_blocks_and_matrices(checkpoint: Checkpoints, family: str) -> None:
    architecture = Architecture(open_checkpoint(checkpoint(family)))
    block, names = KNOWN[family]
    assert architecture.blocks == [block[:-1] + index for index in "01"]
    matrices = architecture.block_matrices(block)
    assert [matrix.name for matrix in matrices] == [f"{block}.{name}" for name in names]
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    tensors = dict(model.named_parameters())
    for matrix in matrices:
        weight_nm = matrix.weight_nm(tensors)
        assert weight_nm.shape == matrix.shape
        module = model.get_submodule(matrix.name)
        x_m = torch.randn(1, matrix.shape[1])
        bias = module.bias if module.bias is not None else 0
        torch.testing.assert_close(module(x_m), x_m @ weight_nm.T + bias)
    assert all(parameter.is_meta for parameter in architecture.model.parameters())


def test_every_stored_tensor_is_in_a_block_or_outside(checkpoint: Checkpoints) -> None:
    for family in ("llama", "gpt2", "opt", "mixtral"):
        checkpoint_ = open_checkpoint(checkpoint(family))
        architecture = Architecture(checkpoint_)
        inside = [
            name for block in architecture.blocks for name in architecture.block_tensors(block)
        ]
        names = inside + architecture.outer_tensors()
        assert len(names) == len(set(names))
        read = architecture.read(names)
        want = AutoModelForCausalLM.from_pretrained(checkpoint(family)).state_dict()
        assert all(torch.equal(read[name], want[name]) for name in read)
        tied = set(architecture.model.all_tied_weights_keys)
        assert set(want) - tied <= set(read)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_slices_of_fused_tensors(checkpoint: Checkpoints, family: str) -> None:
    checkpoint_ = open_checkpoint(checkpoint(family))
    architecture = Architecture(checkpoint_)
    experts = [
        matrix
        for matrix in architecture.block_matrices(architecture.blocks[0])
        if matrix.expert is not None
    ]
    assert [matrix.expert for matrix in experts] == [0, 1, 2, 3] * 2
    tensors = architecture.read([matrix.parameter for matrix in experts])
    for matrix in experts:
        weight_nm = matrix.weight_nm(tensors)
        assert weight_nm.shape == matrix.shape
        assert torch.equal(weight_nm, tensors[matrix.parameter][matrix.expert])


def test_twelve_experts_keep_their_order(checkpoint: Checkpoints, tmp_path: Path) -> None:
    # As text, 10 and 11 come before 2.
    source = checkpoint("qwen3_moe", num_experts=12)
    job = QuantizeJob(method="rtn", config=RTN.Config(bits=8), allow_dense=True)
    quantize(open_checkpoint(source), tmp_path / "out", job)
    model, original = spectool.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    parameters = dict(original.named_parameters())
    experts = {n: m for n, m in packed_modules(model).items() if ".experts." in n}
    assert len(experts) == 2 * 2 * 12
    for name, module in experts.items():
        tensor, _, index = name.rpartition(".")
        want = parameters[tensor][int(index)].detach()
        assert float((module.dequantize() - want).abs().max()) < 0.01


def test_transposed_experts(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip
    original = GptOssForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "source")
    job = QuantizeJob(method="rtn", config=RTN.Config(bits=8, group_size=16), allow_dense=True)
    quantize(open_checkpoint(tmp_path / "source"), tmp_path / "out", job)
    model = spectool.load(tmp_path / "out", activations="exact")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        want, got = (part(input_ids=ids, use_cache=False).logits for part in (original, model))
        dense = spectool.load(tmp_path / "out", runtime="dense")(input_ids=ids, use_cache=False)
    matrices = list(find_matrices(original.model.layers[0], "model.layers.0"))
    assert {matrix.transposed for matrix in matrices if matrix.expert is not None} == {True}
    assert float((got - want).square().mean() / want.square().mean()) < 1e-3
    torch.testing.assert_close(dense.logits, got, rtol=1e-4, atol=1e-4)


def vision_model(kind: str) -> PreTrainedModel:
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "image_size": 16,
        "num_attention_heads": 2, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16),
            image_token_index=319,
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text, head_dim=8, sliding_window=16),
        vision_config=transformers.SiglipVisionConfig(**vision),
        mm_tokens_per_image=4,
        image_token_index=319,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_multimodal_wrappers_keep_their_towers(
    tmp_path: Path, checkpoint: Checkpoints, kind: str, calibrated: bool
) -> None:
    source = tmp_path / "source"
    original = vision_model(kind)
    original.save_pretrained(source)
    for path in checkpoint("llama").glob("tokenizer*"):
        shutil.copy(path, source)
    (tmp_path / "text.txt").write_text("one two three four five six " * 60)
    job = QuantizeJob(
        method="rtn",
        config=RTN.Config(bits=8),
        calibration=[str(tmp_path / "text.txt")] if calibrated else [],
        samples=3,
        seq_len=20,
    )
    report = quantize(open_checkpoint(source), tmp_path / "out", job)
    assert len(report.blocks) == 2 and all("language_model" in row.name for row in report.layers)
    if calibrated:
        assert all(0 < block.output_error < 0.1 for block in report.blocks)

    model = spectool.load(tmp_path / "out")
    assert type(model) is type(original)
    before, after = original.state_dict(), model.state_dict()
    kept = [name for name in after if "vision" in name or "projector" in name]
    assert len(kept) > 30
    assert all(torch.equal(after[name], before[name]) for name in kept)
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        want, got = (part(input_ids=ids, use_cache=False).logits for part in (original, model))
    assert float((got - want).square().mean() / want.square().mean()) < 1e-3


def test_missing_tensor_is_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in no file: 1, the first model\.norm"):
        Architecture(open_checkpoint(tmp_path / "source"))


def test_tied_head_may_be_absent_or_stored(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint("llama-tied")
    assert "lm_head.weight" not in Architecture(open_checkpoint(source)).origins
    shutil.copytree(source, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    quantize(
        open_checkpoint(tmp_path / "source"),
        tmp_path / "out",
        QuantizeJob(method="rtn", config=RTN.Config()),
    )
    model = spectool.load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def write_checkpoint(path: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of one tensor with this configuration."""
    (path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.ones(1)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonesuch"}, "unknown architecture"),
        ({}, "unknown architecture"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "whisper"}, "whisper is an encoder-decoder"),
        ({"model_type": "vit"}, "vit: transformers has no causal model"),
    ],
)
def test_refused_architectures(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, config)
    with pytest.raises(UnsupportedError, match=message) as caught:
        model_class(read_config(open_checkpoint(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "?"},
        {"hidden_size": 33, "num_attention_heads": 7},
        {"rope_parameters": "x"},
        {"dtype": "float1"},
        {"layer_types": ["full_attention"]},
    ],
)
def test_configurations_that_contradict_themselves(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, {"model_type": "llama", **config})
    with pytest.raises(CheckpointError, match=r"config\.json is not valid") as caught:
        read_config(open_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_from_the_checkpoint_needs_permission(tmp_path: Path) -> None:
    remote = {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}
    write_checkpoint(tmp_path, {"model_type": "zz", "auto_map": remote})
    (tmp_path / "x.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="unknown architecture") as caught:
        read_config(open_checkpoint(tmp_path))
    assert caught.value.hint is not None and "--trust-remote-code" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_tensor_of_another_shape_is_named(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is .*, but the configuration says"):
        Architecture(open_checkpoint(tmp_path / "source"))
