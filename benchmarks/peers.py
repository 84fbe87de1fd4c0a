"""Rings of matrices, which `products.py` multiplies with, and those of torch and bitsandbytes.

A ring holds so many copies of a matrix that a pass over it reads every byte from memory. The copies
are equal, which no product notices. Shapes: n outputs, m inputs, N rows of activations.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectool.kernels import cpu

# What multiplies and adds: its measured peak is the floor of computing (`peaks.py`).
Instruction = Literal["int8", "bfloat16", "float32"]

# A ring is larger than the last-level cache by more than this factor.
CACHES = 4


@dataclass(frozen=True, slots=True)
class Setup:
    """Shape [n, m] of a ring's matrices, and the bytes of the last-level cache."""

    shape: tuple[int, int]
    cache_bytes: int
    generator: torch.Generator


class Ring(ABC):
    """Equal matrices [n, m] of a format at different addresses.

    `num_bytes`: stored bytes of one. `count`: how many there are.
    """

    num_bytes: int
    count: int

    def __init__(self, name: str, instruction: Instruction, setup: Setup) -> None:
        self.name, self.instruction, self.shape = name, instruction, setup.shape
        self._cache_bytes = setup.cache_bytes

    def set_bytes(self, num_bytes: int) -> None:
        """Set the bytes of a matrix, and so the number of matrices."""
        self.num_bytes = num_bytes
        self.count = CACHES * self._cache_bytes // num_bytes + 1

    def slices(self, part: int) -> list[list[int]]:
        """Return the numbers of the matrices in slices of `part`; the last starts over again."""
        starts = range(0, self.count, part)
        return [[(start + i) % self.count for i in range(part)] for start in starts]

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of the products."""
        torch.set_num_threads(threads)

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the values of the matrices [n, m] in float32."""

    @abstractmethod
    def multiply(self, x_Nm: Tensor, part: int) -> list[Callable[[], Tensor]]:
        """Return functions that together multiply x with every matrix, each with `part` of them.

        A function returns its last product. They are not to be called after the next `multiply`.
        """

    def rest(self) -> None:
        """Let the threads sleep until the next product."""

    def expect(self, x_Nm: Tensor) -> Tensor:
        """Return what `multiply` should compute, in float32."""
        return linear(x_Nm.float(), self.matrix())

    def close(self) -> None:
        """Free memory that Python does not free by itself."""


class CallRing(Ring):
    """Ring whose matrices are multiplied by one call each."""

    def fill(self, make: Callable[[], Any], num_bytes: int) -> None:
        """Make the matrices, each of so many stored bytes."""
        self.set_bytes(num_bytes)
        self.matrices = [make() for _ in range(self.count)]

    @abstractmethod
    def call(self, x: Any, matrix: Any) -> Tensor:
        """Multiply with one matrix; x as `convert` returns it."""

    def convert(self, x_Nm: Tensor) -> Any:
        """Return activations in the form that `call` takes; not timed."""
        return x_Nm

    def multiply(self, x_Nm: Tensor, part: int) -> list[Callable[[], Tensor]]:
        converted, call = self.convert(x_Nm), self.call

        def run(matrices: list[Any]) -> Tensor:
            for matrix in matrices:
                product = call(converted, matrix)
            return product

        return [partial(run, [self.matrices[i] for i in each]) for each in self.slices(part)]


class DenseRing(CallRing):
    """torch's product with a dense matrix, float32 or bfloat16."""

    def __init__(self, dtype: torch.dtype, setup: Setup) -> None:
        kind: Instruction = "bfloat16" if dtype == torch.bfloat16 else "float32"
        super().__init__("torch", kind, setup)
        weight_nm = torch.randn(setup.shape, generator=setup.generator).to(dtype)
        self.dtype = dtype
        self.fill(weight_nm.clone, weight_nm.nbytes)

    def matrix(self) -> Tensor:
        weight_nm: Tensor = self.matrices[0]
        return weight_nm.float()

    def convert(self, x_Nm: Tensor) -> Tensor:
        return x_Nm.to(self.dtype)

    def call(self, x: Tensor, matrix: Tensor) -> Tensor:
        return linear(x, matrix)


class IntMMRing(CallRing):
    """torch's `_int_mm`, bare: activations are rounded before, and products stay integers."""

    def __init__(self, setup: Setup) -> None:
        super().__init__("_int_mm", "int8", setup)
        codes_nm = torch.randint(
            -127, 128, setup.shape, generator=setup.generator, dtype=torch.int8
        )
        self.fill(codes_nm.clone, codes_nm.nbytes)

    def matrix(self) -> Tensor:
        codes_nm: Tensor = self.matrices[0]
        return codes_nm.float()

    def convert(self, x_Nm: Tensor) -> Tensor:
        x_Nm = x_Nm.float()
        return (x_Nm * (127 / x_Nm.abs().amax(1, keepdim=True))).round().to(torch.int8)

    def expect(self, x_Nm: Tensor) -> Tensor:
        return super().expect(self.convert(x_Nm))

    def call(self, x: Tensor, matrix: Tensor) -> Tensor:
        return torch._int_mm(x, matrix.t())


class NF4Ring(CallRing):
    """bitsandbytes' AVX-512 product with NF4, called as it does after its first forward."""

    block = 64

    @staticmethod
    def missing() -> str:
        """Return why the product cannot run here; empty if it can."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed"
        if "avx512_bf16" not in (cpu.flags() or ()):
            return "the processor has no AVX-512 for bfloat16"
        return ""

    def __init__(self, setup: Setup) -> None:
        from bitsandbytes import functional
        from bitsandbytes.cextension import lib

        super().__init__("NF4", "bfloat16", setup)
        self._library = lib
        weight_nm = torch.randn(setup.shape, generator=setup.generator)
        codes, state = functional.quantize_4bit(
            weight_nm, blocksize=self.block, compress_statistics=False, quant_type="nf4"
        )
        self._values_nm = functional.dequantize_4bit(codes, state).view(setup.shape)
        codes, state = functional._convert_weight_packed_for_cpu(codes, state)
        self.fill(lambda: (codes.clone(), state.absmax.clone()), codes.nbytes + state.absmax.nbytes)

    def set_threads(self, threads: int) -> None:
        # Its OpenMP may be another than torch's.
        self._library.omp_set_num_threads(threads)

    def matrix(self) -> Tensor:
        return self._values_nm

    def convert(self, x_Nm: Tensor) -> Tensor:
        return x_Nm.to(torch.bfloat16).contiguous()

    def call(self, x: Tensor, matrix: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale = matrix
        n, m = self.shape
        product_Nn = torch.empty(len(x), n, dtype=torch.bfloat16)
        pointers = (c_void_p(tensor.data_ptr()) for tensor in (x, codes, scale, product_Nn))
        sizes, strides = map(c_int64, (len(x), n, m)), map(c_int64, (self.block, m, n))
        self._library.gemv_4bit_inference_cpu_nf4_bf16(*sizes, *pointers, *strides)
        return product_Nn
