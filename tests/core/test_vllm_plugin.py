"""vLLM's entry, against a stand-in for the parts of vLLM that it uses."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UnsupportedError
from spectool.kernels.segments import assemble
from spectool.quantize.base import parse_quantizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.rules import Rule
from spectool.quantize.run import quantize

LAYERS = "vllm.model_executor.layers"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearBase(nn.Module):
    """A layer as vLLM makes one."""

    def __init__(self, config: Any, prefix: str, inputs: int, sizes: list[int]) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        sizes_and_type = (inputs, sizes, inputs, sum(sizes), torch.float32)
        self.quant_method.create_weights(self, *sizes_and_type, weight_loader=None)


class ParallelLMHead(nn.Module):
    pass


class UnquantizedLinearMethod:
    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        pass


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class Product:
    """Products of the same segments where there is no device."""

    def __init__(self, segments: Any, shape: tuple[int, int]) -> None:
        self.weight = assemble(segments, shape)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.weight, bias)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, imported where vLLM is the stand-in; `registered` are the formats there."""
    registered: dict[str, type] = {}

    def register(name: str) -> Callable[[type], type]:
        return lambda kind: registered.setdefault(name, kind)

    parts: dict[str, dict[str, Any]] = {
        f"{LAYERS}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{LAYERS}.quantization": {"register_quantization_config": register},
        f"{LAYERS}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{LAYERS}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
    }
    for name in ("vllm", "vllm.model_executor", LAYERS, *parts):
        module = ModuleType(name)
        module.__dict__.update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    place, _, function = project["entry-points"]["vllm.general_plugins"]["spectool"].partition(":")
    found: Any = importlib.import_module(place)
    getattr(found, function)()
    monkeypatch.setattr(found, "TritonProduct", Product)
    found.registered = registered
    yield found
    del sys.modules[place]


def make_config(plugin: Any, artifact: Path) -> Any:
    stored = json.loads((artifact / "config.json").read_text())["quantization_config"]
    config = plugin.registered[stored["quant_method"]].from_config(stored)
    config.packed_modules_mapping = FUSED
    return config


def fill(layer: LinearBase, prefix: str, tensors: dict[str, Tensor], shards: list[Any]) -> None:
    """Hand the tensors over as vLLM's models do."""
    parameters: dict[str, Any] = dict(layer.named_parameters())
    parent, _, leaf = prefix.rpartition(".")
    for shard, name in zip(shards, FUSED.get(leaf, [leaf]), strict=True):
        for key, tensor in tensors.items():
            if key.startswith(f"{parent}.{name}.q."):
                parameter = parameters[key.removeprefix(f"{parent}.{name}.")]
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def test_fused_layers_multiply_as_the_model_does(
    plugin: Any, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    choice = parse_quantizer("rtn:bits=3")
    # Widths and methods may differ within a fused layer.
    rules = [
        Rule("*.k_proj", parse_quantizer("int8"), "a rule"),
        Rule("*.up_proj", parse_quantizer("vq:codes=8"), "a rule"),
    ]
    job = QuantizeJob(method="rtn", config=choice.config, rules=rules)
    out = tmp_path / "out"
    quantize(open_checkpoint(checkpoint("llama")), out, job)
    config, model = make_config(plugin, out), spectool.load(out, activations="exact")
    tensors: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    x_Nm = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    block: Any = model.model.layers[0]
    kinds = {
        "self_attn.qkv_proj": ["q", "k", "v"],
        "mlp.gate_up_proj": [0, 1],
        "self_attn.o_proj": [None],
    }
    for name, shards in kinds.items():
        parent, _, leaf = name.rpartition(".")
        parts = [block.get_submodule(f"{parent}.{each}") for each in FUSED.get(leaf, [leaf])]
        prefix = f"model.layers.0.{name}"
        layer = LinearBase(config, prefix, 32, [part.out_features for part in parts])
        fill(layer, prefix, tensors, shards)
        bias = torch.arange(sum(part.out_features for part in parts)).float()
        with torch.inference_mode():
            expected = torch.cat([part(x_Nm) for part in parts], -1)
            torch.testing.assert_close(layer.quant_method.apply(layer, x_Nm), expected)
            found = layer.quant_method.apply(layer, x_Nm, bias)
            torch.testing.assert_close(found, expected + bias)
        assert not list(layer.parameters()), "the fields are freed"


def entry(**more: Any) -> dict[str, Any]:
    options = {"bits": 4, "group_size": 128, "symmetric": False}
    return {"method": "rtn", "options": options, "shape": [32, 32], **more}


def config_of(plugin: Any, **modules: Any) -> Any:
    stored = {"format_version": 1, "modules": modules, "quant_method": "spectool"}
    config = plugin.VLLMConfig.from_config(stored)
    config.packed_modules_mapping = FUSED
    return config


def test_what_it_cannot_do_is_refused(plugin: Any) -> None:
    for key in ("expert", "bias"):
        with pytest.raises(UnsupportedError, match=f"one.0: no kernels in vLLM for {key} = True"):
            config_of(plugin, **{"one.0": entry(**{key: True})})
    config = config_of(plugin, **{"a.q_proj": entry(), "a.k_proj": entry(), "b": entry()})
    with pytest.raises(UnsupportedError, match=r"a\.qkv_proj: some of its matrices are packed"):
        LinearBase(config, "a.qkv_proj", 32, [32, 32, 32])
    with pytest.raises(UnsupportedError, match=r"b: a packed Embedding has no kernel"):
        config.get_quant_method(nn.Embedding(1, 1), "b")
    layer = LinearBase(config, "b", 32, [32])
    with pytest.raises(UnsupportedError, match="tensor-parallel"):
        layer.quant_method.create_weights(layer, 16, [32], 32, 32, torch.float32)
    assert isinstance(config.get_quant_method(layer, "dense"), UnquantizedLinearMethod)
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None
    assert config.get_quant_method(nn.Identity(), "a.attn") is None
