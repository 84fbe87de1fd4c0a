"""Kernels of a model's linear layers, which get them once, when a model is opened for decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.kernels import registry
from spectool.model.packed import PackedExperts, PackedLinear


class KernelLinear(nn.Linear):
    """Linear layer that computes with a kernel where kernels are in force."""

    product: registry.Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, product = self.weight, self.product
        if (
            product is not None
            and product.supports(x)
            # Casts and assignments may have replaced the weight since the kernel was chosen.
            and weight.dtype is x.dtype
            and weight.is_contiguous()
        ):
            return product.kernel.linear(x, (weight, None), self.bias)
        return F.linear(x, weight, self.bias)


def attach_kernels(model: nn.Module, dtype: torch.dtype) -> dict[str, registry.Choice]:
    """Give the linears of a model, with activations of a dtype, the kernels that there are here.

    Returns the choice for each format of the table that the model has.
    """
    choices: dict[str, registry.Choice] = {}
    experts: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PackedExperts):
            # Their matrices are unpacked, not multiplied with.
            experts.update(module.children())
        elif isinstance(module, PackedLinear) and module.format and module not in experts:
            fields, format = dict(module.q.named_buffers()), module.format
            shape = module.out_features, module.in_features
            choice, module.product = registry.prepare(format, fields, shape, dtype)
            choices[format] = choice
        elif isinstance(module, nn.Linear) and type(module) in (nn.Linear, KernelLinear):
            weight, shape = module.weight, (module.out_features, module.in_features)
            choice, product = registry.prepare("dense", {"weight": weight}, shape, weight.dtype)
            if product is not None:
                # Only the class changes: names, parameters and hooks stay.
                module.__class__ = KernelLinear
            if isinstance(module, KernelLinear):
                module.product = product
            # Small matrices beside large ones are not worth a word.
            if product is not None or "dense" not in choices:
                choices["dense"] = choice
    return choices
