"""vLLM's entry to packed checkpoints: linears that multiply with the codes, by Triton kernels.

vLLM imports this file as a plugin (`vllm.general_plugins`), in each of its processes, and then
finds `quant_method: spectool` in a checkpoint's configuration. Not yet run within vLLM: written
from the interface of its quantization methods in 2026, and tested against a stand-in for it.

vLLM fuses linears (`qkv_proj`) and hands over the tensors of each by a shard's name. A layer keeps
them by shard, and after loading each becomes a product of its own. Refused: tensor parallelism,
packed experts and embeddings, and an lm_head other than the architecture's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from spectool.errors import UnsupportedError
from spectool.kernels.triton_products import TritonProduct
from spectool.model.packed import load_packed, make_packer
from spectool.model.registration import QUANT_METHOD, SpectoolConfig

# Shards of `qkv_proj`; other fused linears number theirs.
_SHARDS = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Do nothing: importing this file has registered the format."""


@register_quantization_config(QUANT_METHOD)
class VLLMConfig(QuantizationConfig):  # type: ignore[misc]
    """The packed matrices of a checkpoint, by their names there."""

    def __init__(self, modules: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.modules = modules

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        # Matrix units for bfloat16.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        # `config.json` has everything.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMConfig:
        modules = SpectoolConfig(**config).modules
        for name, entry in modules.items():
            for key in ("expert", "tied", "outside", "bias"):
                if entry.get(key):
                    raise _refuse(f"{name}: no kernels in vLLM for {key} = {entry[key]}")
        return cls(modules)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        entries = [self.modules.get(name) for name in self._list_shards(prefix)]
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            packed = [entry for entry in entries if entry is not None]
            if not packed:
                return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
            if len(packed) < len(entries):
                raise _refuse(f"{prefix}: some of its matrices are packed and others are not")
            return VLLMLinear(packed)
        if any(name == prefix or name.startswith(f"{prefix}.") for name in self.modules):
            raise _refuse(f"{prefix}: a packed {type(layer).__name__} has no kernel in vLLM")
        return None

    def _list_shards(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the matrices that are fused in a layer."""
        parent, _, leaf = prefix.rpartition(".")
        fused = [] if prefix in self.modules else self.packed_modules_mapping.get(leaf, [])
        return [f"{parent}.{each}" for each in fused] or [prefix]


class VLLMLinear(LinearMethodBase):  # type: ignore[misc]
    """The way in which a layer multiplies; `entries` are those of its shards."""

    def __init__(self, entries: list[Mapping[str, Any]]) -> None:
        self.entries = entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise _refuse("packed matrices are not split (--tensor-parallel-size 1)")
        layer.q, layer.shards = nn.Module(), [{} for _ in self.entries]
        names = {name for entry in self.entries for name in _layout(entry)}
        for field in sorted(names):
            # Empty: the tensors of shards differ in their sizes.
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = _make_loader(field, layer.shards)  # type: ignore[attr-defined]
            layer.q.register_parameter(field, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        device = next(layer.q.parameters()).device
        layer.products = []
        for entry, fields in zip(self.entries, layer.shards, strict=True):
            linear = load_packed(entry, fields).to(device)
            segments = linear.segments()
            shape = linear.out_features, linear.in_features
            # A format without segments multiplies by itself.
            layer.products.append(linear if segments is None else TritonProduct(segments, shape))
        del layer.q, layer.shards

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = [
            product(x, None) if isinstance(product, TritonProduct) else product(x)
            for product in layer.products
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias


def _layout(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a matrix."""
    n, m = entry["shape"]
    return make_packer(entry).layout((n, m))


def _make_loader(field: str, shards: list[dict[str, Tensor]]) -> Callable[..., None]:
    """Make what vLLM calls with a parameter, a tensor of the checkpoint and the shard's name."""

    def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int = 0) -> None:
        index = shard if isinstance(shard, int) else _SHARDS[shard]
        # A copy: the reader may reuse its buffer.
        shards[index][field] = tensor.to("cpu", copy=True)

    return load


def _refuse(reason: str) -> UnsupportedError:
    return UnsupportedError(reason, hint="serve it by spectool, or a dense export by vLLM")
