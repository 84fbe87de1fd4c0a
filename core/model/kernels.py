"""Kernels of a model's linear layers: products with packed matrices, and with dense ones.

A packed linear whose format has a product here becomes one that owns the product: its codes are
laid out anew, and the fields that they came in are freed, matrix by matrix. It computes by that
product from then on, whoever calls. Dense layers get their kernel when a model is opened for
decoding, and use it where kernels are in force (`kernels/registry.py`).
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import machine
from spectool.errors import UnsupportedError
from spectool.kernels import build, precision, products, registry
from spectool.kernels.dense import Dense
from spectool.kernels.products import PackedProduct, precisions
from spectool.model.packed import PackedEmbedding, PackedLinear, make_placeholder

# Weights that are laid out anew before the memory used for it is given back to the system.
TRIM = 1 << 25

# Dtypes of activations that products take.
DTYPES = (torch.float32, torch.bfloat16)


class ProductLinear(PackedLinear):
    """Packed linear that computes with the codes. The fields that they were stored in are gone."""

    product: PackedProduct

    @property
    def weight(self) -> Tensor:
        return make_placeholder(self.out_features, torch.device("cpu"))

    @property
    def is_differentiable(self) -> bool:
        return False

    def has_kernel(self) -> bool:
        return True

    def segments(self) -> None:
        return None

    def rows(self, rows: slice | Tensor) -> Tensor:
        return self.product.rows(rows)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in DTYPES and not (torch.is_grad_enabled() and x.requires_grad):
            return self.product(x, self.bias)
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProductLinear:
        if fn(torch.empty(0)).device.type != "cpu":
            raise UnsupportedError(
                "the packed matrices of this model are laid out for the processor; it cannot move",
                hint="load it on the device",
            )
        apply: Any = super()._apply
        apply(fn, recurse)
        return self


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


def attach_products(
    model: nn.Module, dtype: torch.dtype, activations: str = "auto"
) -> dict[str, registry.Choice]:
    """Let the packed linears of a model compute by products, where there are any.

    `dtype`: of the activations. `activations`: `exact`, `int16` or `int8` (where the format has
    integers) or `auto`. A linear whose fields are trained is left alone, and so is an embedding
    that no lm_head shares: its rows are only looked up. Returns the choice for each format that has
    rows of its own in the kernels' table.
    """
    choices: dict[str, registry.Choice] = {}
    # A list without the modules of their fields, which would keep these.
    found = [each for each in model.modules() if isinstance(each, PackedLinear)]
    weights = 0
    for linear in found:
        if not isinstance(linear, ProductLinear):
            choices |= _attach_product(linear, dtype, activations)
            weights += linear.in_features * linear.out_features
            if weights >= TRIM or linear is found[-1]:
                machine.trim_memory()
                weights = 0
    for module in model.modules():
        if isinstance(module, PackedEmbedding) and isinstance(module.packed, ProductLinear):
            module._modules.pop("q", None)
    return choices


def _attach_product(
    linear: Any, dtype: torch.dtype, activations: str
) -> dict[str, registry.Choice]:
    """Replace the fields of a packed linear by a product, if there is one here.

    A format with rows in the kernels' table keeps its fields; returns the choice for it.
    """
    # Fields that are trained are parameters.
    is_trained = next(linear.q.parameters(), None) is not None
    if is_trained or explain_missing(linear.weight.device, dtype):
        return {}
    shape = linear.out_features, linear.in_features
    if linear.format is not None:
        fields = dict(linear.q.named_buffers())
        choice, linear.product = registry.prepare(linear.format, fields, shape, dtype)
        return {linear.format: choice}
    segments = linear.segments()
    if segments is None:
        return {}
    bits = max(segment.bits for segment in segments)
    wanted = precision.choose(linear.method, bits, _resolve(activations, dtype))
    chosen = wanted if wanted in precisions(segments) else "exact"
    linear.product = PackedProduct(segments, shape, chosen)
    # A tied lm_head has its fields as a plain attribute.
    for holder in (linear._modules, linear.__dict__):
        holder.pop("q", None)
    # Only the class changes, so that names, hooks and other modules' references stay.
    linear.__class__ = ProductLinear
    return {}


def _resolve(activations: str, dtype: torch.dtype) -> str:
    """Return `exact` for `auto` in float32, where drafting must not change a text of any model.

    Not all attention sums a row by itself (`decode/target/row_attention.py`). Where it does not, it
    differs in the last bits between a pass of one token and one of several; where that moves an
    activation over the border between two integers, the difference becomes that of rounding.
    """
    return "exact" if activations == "auto" and dtype == torch.float32 else activations


def explain_missing(device: torch.device, dtype: torch.dtype) -> str:
    """Say why there are no products on a device for activations of a dtype; "" if there are."""
    if device.type != "cpu":
        return f"no kernel on {device.type}"
    if dtype not in DTYPES:
        return f"no kernel in {str(dtype).removeprefix('torch.')}"
    return _missing_library()


def describe_products(device: str, dtype: torch.dtype) -> str:
    """Describe what multiplies with packed matrices on a type of device."""
    reason = explain_missing(torch.device(device), dtype)
    return f"torch ({reason})" if reason else "kernel"


def name_library() -> str:
    """Return the name of the variant of the kernels that this processor runs, or "none"."""
    library = build.load_library()
    return "none" if isinstance(library, str) else library.variant.name


@functools.cache
def _missing_library() -> str:
    """Say why there is no library of products, which is tested here; "" if there is.

    Raises:
        RuntimeError: it computes wrong products.
    """
    if (reason := build.missing_products()) is None:
        products.check()
    return reason or ""


def attach_kernels(
    model: nn.Module, dtype: torch.dtype, *, any_rows: bool = False
) -> dict[str, registry.Choice]:
    """Give the linears of a model, with activations of a dtype, the kernels that there are here.

    `any_rows`: also where torch is faster, so that no row depends on the other ones.

    Returns the choice for the dense ones, if there are any, and those of `attach_products`.
    """
    choices = attach_products(model, dtype)
    # Beside products all sums of a row are independent of the other rows.
    always = any_rows or has_products(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, KernelLinear):
            weight, shape = module.weight, (module.out_features, module.in_features)
            choice, product = registry.prepare(
                "dense", {"weight": weight}, shape, weight.dtype, always=always
            )
            if product is not None:
                # Only the class changes: names, parameters and hooks stay.
                module.__class__ = KernelLinear
            if isinstance(module, KernelLinear):
                module.product = product
            # Small matrices beside large ones are not worth a word.
            if product is not None or "dense" not in choices:
                choices["dense"] = choice
    return choices


def most_kernel_rows(model: nn.Module) -> int:
    """Return the most rows of a pass in which kernels compute all large products; 0 for none.

    Embeddings are not multiplied with: their rows are looked up.
    """
    rows = sys.maxsize
    for module in model.modules():
        if isinstance(module, KernelLinear) and module.product is not None:
            rows = min(rows, module.product.kernel.most_rows)
        elif isinstance(module, PackedLinear):
            rows = rows if module.has_kernel() else 0
        elif not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            rows = 0 if any(each.numel() >= Dense.smallest for each in own) else rows
    return rows


def has_products(model: nn.Module) -> bool:
    """Whether some of a model's linears compute by products with packed matrices."""
    return any(isinstance(module, ProductLinear) for module in model.modules())


def precision_of(model: nn.Module) -> str:
    """Return how the products of a model take activations, joined by "and" if in several ways."""
    products = (each.product for each in model.modules() if isinstance(each, ProductLinear))
    return _name({product.precision for product in products})


def product_bytes(model: nn.Module) -> int:
    """Return the bytes of all products of a model; they are no buffers of it."""
    return sum(each.product.nbytes for each in model.modules() if isinstance(each, ProductLinear))


def plan_precision(
    entries: Iterable[Mapping[str, Any]], device: torch.device, dtype: torch.dtype, activations: str
) -> str:
    """Return how products with the matrices of an artifact's entries will take activations."""
    if explain_missing(device, dtype):
        return "exact"
    wanted = _resolve(activations, dtype)
    return _name(
        {
            precision.choose(entry["method"], entry["options"].get("bits"), wanted)
            for entry in entries
        }
    )


def _name(found: set[precision.Precision]) -> str:
    return " and ".join(sorted(found)) or "exact"


def describe_packed(model: nn.Module) -> str:
    """Describe how the packed linears of a model compute, or return "" if it has none."""
    ways = Counter(
        _describe(module) for module in model.modules() if isinstance(module, PackedLinear)
    )
    if not ways:
        return ""
    parts = list(ways) if len(ways) == 1 else [f"{count} {way}" for way, count in ways.items()]
    return f"{ways.total()} linears packed ({', '.join(parts)})"


def _describe(linear: PackedLinear) -> str:
    if not linear.has_kernel():
        return "unpacked each time"
    how = linear.product.precision if isinstance(linear, ProductLinear) else "exact"
    return f"by kernel, {how} activations"
