"""Base of the kernels: products of rows of activations with a large matrix, on a CPU.

The result of a row does not depend on the other rows, to the last bit.

Shapes: n outputs and m inputs of a matrix, N rows of activations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectool.kernels import build, threads

# A matrix's stored tensors by name.
Fields = Mapping[str, Tensor]

# A matrix as a C file reads it: its rows, and the vectors that they are sums of, if they are.
Operands = tuple[Tensor, Tensor | None]


class Kernel(ABC):
    """Products with matrices of one format, for activations of one dtype.

    `source` is the C file's name. `smallest`: for matrices of fewer
    weights the call costs more than it saves. `most_rows`: beyond so many rows another way is
    faster. `everywhere`: it runs outside of decoding too.
    """

    source: ClassVar[str]
    smallest: ClassVar[int] = 1
    most_rows: int
    everywhere: ClassVar[bool] = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def prepare(self, fields: Fields) -> Operands:
        """Return what `linear` reads of a matrix; called once, when a model is loaded."""

    @abstractmethod
    def matrix(self, fields: Fields) -> Tensor:
        """Unpack the matrix W [n, m] in float32."""

    @abstractmethod
    def example(self, n: int, m: int, generator: torch.Generator) -> Fields:
        """Return the fields of a random matrix, for the self-test."""

    def missing(self) -> str | None:
        """Return why the kernel cannot run on this machine; None if it can."""
        return build.missing()

    @abstractmethod
    def linear(self, x: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
        """Compute x [..., m] times W transposed, plus bias [n], summed in float32, in x's dtype.

        Inference only.
        """

    def twin(self, x: Tensor, fields: Fields, bias: Tensor | None) -> Tensor:
        """Compute the same in torch: the specification of `linear`."""
        bias_n = None if bias is None else bias.float()
        return linear(x.float(), self.matrix(fields), bias_n).to(x.dtype)

    @threads.give_torch(several=False)
    def check(self) -> None:
        """Raise a RuntimeError if a small product differs from the twin's by more than rounding."""
        generator = torch.Generator().manual_seed(0)
        # Whole tiles, single rows and a rest of a step.
        n, m, num_rows = 13, 77, 7
        fields = self.example(n, m, generator)
        x_Nm = torch.randn(num_rows, m, generator=generator).to(self.dtype)
        bias_n = torch.randn(n, generator=generator).to(self.dtype)
        found_Nn = self.linear(x_Nm, self.prepare(fields), bias_n).float()
        expected_Nn = self.twin(x_Nm, fields, bias_n).float()
        tolerance = 2e-2 if self.dtype == torch.bfloat16 else 1e-5
        if not (found_Nn - expected_Nn).norm() <= tolerance * expected_Nn.norm():
            raise RuntimeError(
                f"the kernel {self.source} for {self.dtype} computes wrong products on this "
                "machine; please report it, with the output of spectool doctor"
            )
