"""Experts whose result for a token depends on no other token of the pass.

transformers asks a function for the sum over the experts that a router chose. Its own functions
multiply as many tokens as chose an expert by torch, whose sums change with that number; here each
product is one call of `F.linear`, which `RowProducts` gives to the kernel of
dense matrices, and packed experts to theirs (`model/packed.py`).

Shapes: N tokens, K experts of a token, S = N K, D hidden width, E experts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectool.kernels import registry


class RowProducts(TorchFunctionMode):
    """Within it, products with dense matrices are the kernel's, whatever the number of rows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and all(isinstance(each, Tensor) for each in args[:2]):
            x, weight, *bias = args
            choice = registry.choose("dense", x.device.type, x.dtype)
            is_matrix = weight.ndim == 2 and weight.is_contiguous()
            fits = weight.dtype is x.dtype and weight.device == x.device
            if choice.kernel is not None and is_matrix and fits and weight.shape[1] == x.shape[-1]:
                return choice.kernel.linear(x, (weight, None), bias[0] if bias else None)
        return func(*args, **(kwargs or {}))


def sum_experts(experts: Any, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Return the weighted sum of the experts that each token chose [N, D].

    `experts` is a module as transformers' `use_experts_implementation` makes it, without biases,
    whose matrices are not transposed. A token's experts are added in the order of its choice.
    """
    num_chosen = chosen_NK.shape[1]
    chosen_S = chosen_NK.reshape(-1)
    order_S = chosen_S.argsort(stable=True)
    counts = torch.bincount(chosen_S, minlength=experts.num_experts).tolist()
    ends = list(itertools.accumulate(counts))

    def multiply(x_SM: Tensor, name: str) -> Tensor:
        matrices = getattr(experts, name)
        return torch.cat(
            [
                F.linear(x_SM[end - count : end], matrices[expert])
                for expert, (count, end) in enumerate(zip(counts, ends, strict=True))
                if count
            ]
        )

    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_SM = multiply(hidden_ND[order_S // num_chosen], first)
    activate: Callable[[Tensor], Tensor] = (
        experts._apply_gate if experts.has_gate else experts.act_fn
    )
    out_SD = multiply(activate(inner_SM), "down_proj")
    weighted_SD = out_SD * weights_NK.reshape(-1, 1)[order_S]
    # In bfloat16 each addition would round.
    wide = torch.promote_types(weighted_SD.dtype, torch.float32)
    parts_SD = torch.empty_like(weighted_SD, dtype=wide)
    parts_SD[order_S] = weighted_SD.to(wide)
    first_ND, *others = parts_SD.view(*chosen_NK.shape, -1).unbind(1)
    return sum(others, start=first_ND).to(hidden_ND.dtype)


def choose_experts(model: nn.Module) -> None:
    """Let all experts of a model compute by `sum_experts`, if it can say what they compute.

    The modules take a class that does; their configuration, which models may share, stays as it is.
    """
    found = _list_experts(model)
    if all(map(_is_known, found)):
        for experts in found:
            if not isinstance(experts, ChosenExperts):
                kind: Any = type(experts)
                experts.__class__ = _chosen_class(kind)


def are_chosen(module: nn.Module) -> bool:
    """Whether all experts inside of a module, if there are any, compute by `sum_experts`."""
    return all(isinstance(each, ChosenExperts) for each in _list_experts(module))


def release_experts(model: nn.Module) -> None:
    """Let experts compute as they did before `choose_experts`."""
    for experts in _list_experts(model):
        if isinstance(experts, ChosenExperts):
            experts.__class__ = _own_class(type(experts))


class ChosenExperts:
    """Part of the classes of experts that compute by `sum_experts`."""

    def forward(self, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return `sum_experts`."""
        return sum_experts(self, hidden_ND, chosen_NK, weights_NK)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is of the own class, so that a pickled model opens where this module is not.
        return object.__new__, (_own_class(type(self)),), self.__dict__


@functools.cache
def _chosen_class(kind: type[nn.Module]) -> type[nn.Module]:
    # Messages keep the experts' own name.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    chosen: type[nn.Module] = type(kind.__name__, (ChosenExperts, kind), names)
    return chosen


def _own_class(kind: type) -> type:
    """Return the class that `_chosen_class` was given."""
    own: type = kind.__bases__[1]
    return own


def _list_experts(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "is_transposed")]


def _is_known(experts: Any) -> bool:
    return not (
        experts.is_transposed
        or experts.has_bias
        or getattr(experts, "has_post_expert_norm", False)
        or experts._is_expert_parallel
    )
