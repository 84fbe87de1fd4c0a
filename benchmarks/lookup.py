"""Benchmark an lm_head of shared vectors (`vq`): products from tables against torch.

    python benchmarks/lookup.py [--out benchmarks/results/lookup-2-core-cpu.json]

A head of 32000 x 2048 with random codes. `tables` is the kernel; `unpacking`, the way without it:
the matrix is decoded at every call, or with one code a row the products with the codebook are
gathered; `dense`, torch's product with the unpacked matrix. Milliseconds; the ways alternate, and
the minimum over some rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import linear

from spectool.kernels.lookup import Lookup
from spectool.machine import describe
from spectool.quantize.lm_head.vq import VQ

SHAPE = (32000, 2048)
FORMATS: dict[str, dict[str, int]] = {
    "groups of 4": {"codes": 256, "width": 4},
    "groups of 8, two stages": {"codes": 256, "width": 8, "stages": 2},
    "one code a row": {"codes": 4096, "width": 0},
}
ROWS, ROUNDS = (1, 8, 16, 64), 4


@torch.inference_mode()
def measure(options: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """Time each way to multiply for each number of rows."""
    generator = torch.Generator().manual_seed(0)
    linear_vq = VQ(VQ.Config(**options)).build(SHAPE)
    codes, codebook = linear_vq.q.codes, linear_vq.q.codebook
    codes.copy_(torch.randint(options["codes"], codes.shape, generator=generator))
    codebook.copy_(torch.randn(codebook.shape, generator=generator))
    dense = linear_vq.dequantize().to(dtype)
    kernel = Lookup(dtype)
    prepared = kernel.prepare(dict(linear_vq.q.named_buffers()))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "tables": lambda x: kernel.linear(x, prepared, None),
        "unpacking": linear_vq,
        "dense": lambda x: linear(x, dense),
    }
    rows = []
    for count in ROWS:
        x_Nm = torch.randn(count, SHAPE[1], generator=generator).to(dtype)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began = time.perf_counter()
                way(x_Nm)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
        rows.append({"rows": count, **best})
    return {"bytes": linear_vq.q.codes.nbytes + linear_vq.q.codebook.nbytes, "ms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": describe(), "threads": torch.get_num_threads()}
    for name, options in FORMATS.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            results[key] = measure(options, dtype)
            print(key)
            for row in results[key]["ms"]:
                print("  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if given.out is not None:
        record.write(given.out, results)


if __name__ == "__main__":
    main()
