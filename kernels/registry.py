"""The kernels by format, device and dtype of the activations, and where they are in force.

The kernel of dense matrices runs only inside `use_kernels`, which passes of the decode loop and of
draft heads enter. Outside (evaluation, calibration, training) the same modules compute with torch.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.kernels.base import Fields, Kernel
from spectool.kernels.dense import Dense
from spectool.kernels.lookup import Lookup

KERNELS: dict[tuple[str, str, torch.dtype], type[Kernel]] = {
    ("dense", "cpu", torch.float32): Dense,
    ("dense", "cpu", torch.bfloat16): Dense,
    ("vq", "cpu", torch.float32): Lookup,
    ("vq", "cpu", torch.bfloat16): Lookup,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that multiplies with matrices of a format here, or None and why."""

    kernel: Kernel | None
    reason: str = ""

    def __str__(self) -> str:
        if self.kernel is None:
            return f"torch ({self.reason})"
        most = self.kernel.most_rows
        return "kernel" if most == sys.maxsize else f"kernel for up to {most} rows"


@functools.cache
def choose(format: str, device: str, dtype: torch.dtype) -> Choice:
    """Choose the kernel for a format on a type of device, compiled and tested.

    Raises:
        RuntimeError: the kernel computes wrong products here.
    """
    kind = KERNELS.get((format, device, dtype))
    if kind is None:
        return Choice(None, f"no kernel for {format} in {str(dtype)[6:]} on {device}")
    kernel = kind(dtype)
    if (reason := kernel.missing()) is not None:
        return Choice(None, reason)
    kernel.check()
    return Choice(kernel)


class _Force(threading.local):
    on = False


_force = _Force()


@contextmanager
def use_kernels() -> Iterator[None]:
    """Let matrices that have a kernel use it, in this thread."""
    before, _force.on = _force.on, True
    try:
        yield
    finally:
        _force.on = before


def in_force() -> bool:
    """Whether kernels are in force in this thread."""
    return _force.on


class Product:
    """The product with one matrix, prepared for its kernel."""

    def __init__(
        self, kernel: Kernel, fields: Fields, num_inputs: int, *, any_rows: bool = False
    ) -> None:
        self.kernel = kernel
        self._dtype = kernel.dtype
        self._operands = kernel.prepare(fields)
        self._most_values = sys.maxsize if any_rows else kernel.most_rows * num_inputs

    def supports(self, x: Tensor) -> bool:
        """Whether this kernel is in force, and x has its dtype and few enough rows for it.

        It computes no gradients.
        """
        may_run = self.kernel.everywhere or in_force()
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        fits = x.dtype is self._dtype and x.numel() <= self._most_values
        return may_run and fits and not wants_gradient

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x [..., m] times the matrix transposed, plus bias [n]."""
        return self.kernel.linear(x, self._operands, bias)


def prepare(
    format: str,
    fields: Fields,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    always: bool = False,
) -> tuple[Choice, Product | None]:
    """Choose the kernel for a matrix [n, m], and prepare the matrix for it.

    `always`: also where torch is faster, for small matrices and for many rows.
    """
    key = format, next(iter(fields.values())).device.type, dtype
    kind = KERNELS.get(key)
    if kind is not None and shape[0] * shape[1] < kind.smallest and not always:
        # Not chosen, so a model of small matrices does not start the compiler.
        return Choice(None, f"matrices of fewer than {kind.smallest} weights"), None
    choice = choose(*key)
    if choice.kernel is None:
        return choice, None
    if not all(field.is_contiguous() for field in fields.values()):
        return Choice(None, "its tensors are not contiguous"), None
    return choice, Product(choice.kernel, fields, shape[1], any_rows=always)
