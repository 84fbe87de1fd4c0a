"""The exchange of a model's dense matrices with packed ones, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectool.errors import CheckpointError
from spectool.model.packed import (
    FieldSpec,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    TensorSpec,
    build_packed,
)


def replace_with_packed(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    specs: Mapping[str, FieldSpec],
    *,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    """Replace the named matrices of `model` by empty packed ones; biases are kept.

    An embedding that is `tied` to an lm_head replaces both.

    `modules`: an artifact's entries by name. `specs`: the fields of these matrices by name.
    `prefix`: the name of `model` within these names.

    Raises:
        CheckpointError: a name that the model does not have, or fields that are absent.
    """
    experts: dict[str, dict[int, PackedLinear]] = {}
    for name, entry in modules.items():
        if name not in specs:
            raise CheckpointError(f"{name}: the artifact says it is packed, but holds no codes")
        local = name.removeprefix(prefix + ".") if prefix else name
        try:
            packed = build_packed(entry, specs[name])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if entry.get("expert"):
            tensor, _, index = local.rpartition(".")
            experts.setdefault(tensor, {})[int(index)] = packed
            continue
        parent, leaf = _parent(model, local)
        old = getattr(parent, leaf)
        if isinstance(old, nn.Embedding):
            setattr(parent, leaf, PackedEmbedding(old, packed, dtype))
            if "tied" not in entry:
                continue
            parent, leaf = _parent(model, entry["tied"])
            old = getattr(parent, leaf)
            ties: Any = model.all_tied_weights_keys
            if ties.pop(f"{entry['tied']}.weight", None) is None:
                raise CheckpointError(
                    f"{entry['tied']}: the architecture does not tie it to {name}"
                )
            # Not a child: the fields are the embedding's, and transformers ties only parameters.
            packed.__dict__["q"] = packed._modules.pop("q")
        elif entry.get("outside"):
            # An lm_head of its own, even if the architecture ties it.
            getattr(model, "all_tied_weights_keys", {}).pop(f"{local}.weight", None)
        packed.bias = old.bias
        if entry.get("bias") and old.bias is None:
            packed.bias = nn.Parameter(torch.empty(packed.out_features, dtype=dtype), False)
        setattr(parent, leaf, packed)
    for local, slices in experts.items():
        parent, leaf = _parent(model, local)
        transposed = bool(parent.is_transposed)
        del parent._parameters[leaf]
        setattr(parent, leaf, PackedExperts(slices, transposed=transposed, dtype=dtype))
        # Only the eager loop over experts indexes the tensor; fused kernels read all of it.
        parent.config._experts_implementation = "eager"


def _parent(model: nn.Module, name: str) -> tuple[Any, str]:
    """Return the module that holds `name`, and the attribute's name in it."""
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{name}: the architecture has no such module") from error
    if not hasattr(parent, leaf):
        raise CheckpointError(f"{name}: the architecture has no such module")
    return parent, leaf


def field_specs(tensors: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Group stored tensors `<name>.q.<field>` by name."""
    specs: dict[str, dict[str, TensorSpec]] = {}
    for key, header in tensors.items():
        name, infix, field = key.rpartition(".q.")
        if infix:
            specs.setdefault(name, {})[field] = header
    return specs


def unpack_in_place(model: nn.Module, *, dtype: torch.dtype, keep_kernels: bool = False) -> None:
    """Replace the packed matrices by dense ones, one after another.

    `keep_kernels`: leave those that have a kernel.
    """
    tables: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, PackedExperts):
                if not (keep_kernels and child.has_kernel()):
                    stacked = child.unpack().to(dtype).contiguous()
                    delattr(parent, leaf)
                    parent.register_parameter(leaf, nn.Parameter(stacked, False))
                continue
            if isinstance(parent, PackedExperts):
                continue
            if not isinstance(child, (PackedLinear, PackedEmbedding)):
                continue
            packed = child.packed if isinstance(child, PackedEmbedding) else child
            if packed is child and not packed.is_matrix:
                continue
            if keep_kernels and packed.has_kernel():
                continue
            # A tied lm_head has the fields of the embedding, and gets the same weight.
            if id(child.q) not in tables:
                tables[id(child.q)] = nn.Parameter(child.dequantize().to(dtype).contiguous(), False)
            if isinstance(child, PackedEmbedding):
                table = child.embedding
                del table.weight
                table.register_parameter("weight", tables[id(child.q)])
                setattr(parent, leaf, table)
            else:
                dense = nn.Linear(
                    child.in_features, child.out_features, bias=False, device="meta", dtype=dtype
                )
                dense.weight = tables[id(child.q)]
                dense.register_parameter("bias", child.bias)
                setattr(parent, leaf, dense)
