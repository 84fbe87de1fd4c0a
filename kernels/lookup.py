"""Rows that are sums of shared vectors (`lookup.c`): products from tables.

Fields: codes U8 or I16 [n, S G], codebook F16 [S, G, K, W], as `quantize/lm_head/vq.py` stores
them; columns from m to G W are padding. The products of the activations with all vectors are
tabulated, and an output adds up S G of the table's values: W / S times fewer additions than the
matrix has weights.

Shapes: n outputs, m inputs, N rows, S stages, G groups, K vectors of a codebook, W width of one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.kernels import build, threads
from spectool.kernels.base import Fields, Kernel, Operands

# Rows that share a table, at most.
_LANES = 16


class Lookup(Kernel):
    """Products with rows of shared vectors."""

    source = "lookup"
    everywhere = True
    # Unpacking takes longer for any number of rows: benchmarks/results/lookup-2-core-cpu.json.
    most_rows = sys.maxsize

    def prepare(self, fields: Fields) -> Operands:
        return fields["codes"], fields["codebook"]

    def linear(self, x: Tensor, operands: Operands, bias: Tensor | None) -> Tensor:
        codes, codebook_SGKW = operands
        assert codebook_SGKW is not None and x.dtype == self.dtype
        (n, entries), (_, groups, vectors, width) = codes.shape, codebook_SGKW.shape
        x_Nm = _pad(x.reshape(-1, x.shape[-1]), groups * width)
        size = _LANES * (groups * width + entries * vectors + n)
        scratch = torch.empty(size, dtype=torch.float32)
        out_Nn = torch.empty(len(x_Nm), n, dtype=torch.float32)
        bias_n = None if bias is None else bias.to(torch.float32).contiguous()
        tensors = (x_Nm, codebook_SGKW, codes, bias_n, out_Nn, scratch)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        sizes = (len(x_Nm), n, entries, groups, vectors, width, codes.itemsize)
        _load()(*pointers, *sizes, threads.count())
        return out_Nn.to(x.dtype).view(*x.shape[:-1], n)

    def twin(self, x: Tensor, fields: Fields, bias: Tensor | None) -> Tensor:
        """Compute the same to the bit: every sum in the order of `lookup.c`."""
        codes, codebook = fields["codes"].long(), fields["codebook"].float()
        _, groups, _, width = codebook.shape
        x_NGW = _pad(x, groups * width).view(len(x), groups, width)
        out_Nn = torch.zeros(len(x), len(codes))
        for entry, book_KW in enumerate(codebook.flatten(0, 1)):
            products_NK = torch.zeros(len(x), len(book_KW))
            for column in range(width):
                products_NK += x_NGW[:, entry % groups, column, None] * book_KW[:, column]
            out_Nn += products_NK[:, codes[:, entry]]
        return (out_Nn if bias is None else out_Nn + bias.float()).to(x.dtype)

    def matrix(self, fields: Fields) -> Tensor:
        codebook_SGKW = fields["codebook"].float()
        stages, groups, _, _ = codebook_SGKW.shape
        codes_nSG = fields["codes"].long().view(-1, stages, groups)
        stage_S1, group_G = torch.arange(stages)[:, None], torch.arange(groups)
        return codebook_SGKW[stage_S1, group_G, codes_nSG].sum(1).flatten(1)

    def example(self, n: int, m: int, generator: torch.Generator) -> Fields:
        stages, vectors = 2, 256
        width = next(width for width in (4, 5, 3, 7, 1) if m % width == 0)
        shape = stages, m // width, vectors, width
        codes = torch.randint(vectors, (n, stages * shape[1]), generator=generator)
        codes_dtype = torch.uint8 if n % 2 else torch.int16
        codebook = torch.randn(shape, generator=generator).half()
        return {"codes": codes.to(codes_dtype), "codebook": codebook}


def _pad(x_Nm: Tensor, columns: int) -> Tensor:
    """Convert rows to float32, with zeros up to a number of columns."""
    return F.pad(x_Nm.float(), (0, columns - x_Nm.shape[1])).contiguous()


@functools.cache
def _load() -> Any:
    """Load the product of `lookup.c`."""
    library = build.load_library()
    assert not isinstance(library, str), "the registry chooses kernels that can be built"
    run = library.functions.lookup_float32
    run.argtypes = [*[ctypes.c_void_p] * 6, *[ctypes.c_ssize_t] * 6, *[ctypes.c_int] * 2]
    run.restype = None
    return run
