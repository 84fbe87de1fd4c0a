"""Statistics of the inputs of a block's matrices, collected while the block runs.

Only those that a method asks for are collected.

Shapes: m inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectool.model.matrices import Matrix

Statistic = Literal["absmax", "mean_abs", "hessian", "sample"]

# Most tokens that the `sample` statistic keeps.
SAMPLED = 512

# An expert with fewer calibration tokens is packed without data: its statistics are too noisy.
MIN_EXPERT_TOKENS = 128


@dataclass(slots=True)
class LinearStats:
    """Statistics of the input x [T, m] of one matrix, in float32; those not wanted stay None.

    absmax [m] = max_t |x|, mean_abs [m] = mean_t |x|, hessian [m, m] = mean_t x x^T,
    sample [., m] = inputs of the first `SAMPLED` tokens.
    """

    wanted: tuple[Statistic, ...]
    num_tokens: int = 0
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    hessian: Tensor | None = None
    sample: Tensor | None = None

    def add(self, x_Tm: Tensor) -> None:
        """Update the statistics with further tokens x [T, m]."""
        x_Tm = x_Tm.float()
        count = len(x_Tm)
        if count == 0:
            return
        self.num_tokens += count
        share = count / self.num_tokens
        for name in self.wanted:
            before = getattr(self, name)
            if name == "sample":
                missing = SAMPLED - (0 if before is None else len(before))
                new = x_Tm[: max(0, missing)].clone()
                merged = new if before is None else torch.cat([before, new])
            elif name == "absmax":
                new = x_Tm.abs().amax(0)
                merged = new if before is None else torch.maximum(before, new)
            else:
                new = x_Tm.abs().mean(0) if name == "mean_abs" else (x_Tm.T @ x_Tm).div_(count)
                # A running mean: a sum over a long text would lose digits or overflow.
                merged = new if before is None else before.lerp_(new, share)
            setattr(self, name, merged)


class Products(TorchFunctionMode):
    """Context that intercepts the products with a block's matrices; subclasses define `product`.

    A product is recognised by the address of its weight. This covers linears, transposed Conv1D
    and single experts of a fused tensor alike.
    """

    def __init__(self, module: nn.Module, block: str, matrices: Mapping[str, Matrix]) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        for name, matrix in matrices.items():
            weight: Tensor = module.get_parameter(matrix.parameter.removeprefix(block + "."))
            if matrix.expert is not None:
                weight = weight[matrix.expert]
            self._names[weight.data_ptr()] = name

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        """Return x [..., m] times the matrix `name`, plus its bias; `original()` computes it."""
        raise AssertionError("subclasses define product")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x = weight = bias = None
        if func is F.linear:
            x, weight, *more = args
            bias = more[0] if more else kwargs.get("bias")
        elif func is torch.addmm:
            bias, x, weight = args
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            x, weight = args
        name = self._names.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if name is None:
            return func(*args, **kwargs)
        assert isinstance(x, Tensor)
        return self.product(name, x, bias, lambda: func(*args, **kwargs))


class Observer(Products):
    """Context that collects statistics of the inputs of a block's matrices.

    Matrices with the same input tensor (q, k and v; gate and up) share one set of statistics.
    `opened` is the length of the sequences if each opens with a start token, else 0. Inputs of
    start tokens are left out: their outliers would often decide absmax alone.
    """

    def __init__(
        self,
        module: nn.Module,
        block: str,
        matrices: Mapping[str, Matrix],
        wanted: tuple[Statistic, ...],
        *,
        opened: int = 0,
    ) -> None:
        super().__init__(module, block, matrices)
        self.matrices, self.wanted, self.opened = matrices, wanted, opened
        self.stats: dict[str, LinearStats] = {}
        self._last: Tensor | None = None
        self._shared: LinearStats | None = None
        self._routed: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # An expert's input is indexed from the batch just before: keep the token indices.
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].ndim == 1:
            self._routed = args[1]
        return super().__torch_function__(func, types, args, kwargs)

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        if x is self._last and self._shared is not None:
            self.stats.setdefault(name, self._shared)
            return original()
        stats = self.stats.setdefault(name, LinearStats(self.wanted))
        stats.add(self._without_bos(name, x.reshape(-1, x.shape[-1])))
        self._last, self._shared = x, stats
        return original()

    def _without_bos(self, name: str, x_Tm: Tensor) -> Tensor:
        """Return the inputs x [T, m] of the matrix `name` without those of start tokens."""
        if not self.opened:
            return x_Tm
        if self.matrices[name].expert is None:
            return x_Tm.view(-1, self.opened, x_Tm.shape[1])[:, 1:].flatten(0, 1)
        # Some architectures route tokens to experts in another way; then all tokens count.
        if self._routed is None or len(self._routed) != len(x_Tm):
            return x_Tm
        return x_Tm[self._routed % self.opened != 0]
