"""Benchmark the kernels for few rows with large dense matrices against torch.

    python benchmarks/few_rows.py [--out benchmarks/results/...json]

Multiplies the seven matrices of a layer with hidden size 2048, in several copies, so that they are
read from memory rather than from a cache. The ways alternate; the minimum over some rounds counts.
The floor is the kernel's bytes over the memory bandwidth, measured by summing as many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from loop_overhead import read_seconds
from torch import Tensor
from torch.nn.functional import linear

from spectool.kernels import registry
from spectool.kernels.base import Kernel
from spectool.machine import describe

SHAPES = [(2048, 2048)] * 4 + [(5888, 2048)] * 2 + [(2048, 5888)]
LAYERS, ROUNDS = 3, 3
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@torch.inference_mode()
def measure(kernel: Kernel) -> dict[str, Any]:
    """Time each way to multiply, in milliseconds, for each number of rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES * LAYERS
    fields = [kernel.example(n, m, generator) for n, m in shapes]
    prepared = [kernel.prepare(each) for each in fields]
    dense = [kernel.matrix(each).to(kernel.dtype) for each in fields]
    ways: dict[str, Callable[[Tensor, int], Tensor]] = {
        "kernel": lambda x, i: kernel.linear(x, prepared[i], None),
        "torch": lambda x, i: linear(x, dense[i]),
    }
    rows = []
    for count in ROWS:
        x = {m: torch.randn(count, m, generator=generator).to(kernel.dtype) for _, m in shapes}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began = time.perf_counter()
                for i, (_, m) in enumerate(shapes):
                    way(x[m], i)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
        rows.append({"rows": count, **best})
    num_bytes = sum(tensor.nbytes for each in fields for tensor in each.values())
    weights = sum(n * m for n, m in shapes)
    return {"weights": weights, "floor": 1e3 * read_seconds(num_bytes), "ms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": describe()}
    for key in registry.KERNELS:
        choice, name = registry.choose(*key), f"{key[0]} {str(key[2])[6:]}"
        if choice.kernel is None:
            raise SystemExit(f"{name}: nothing to measure: {choice}")
        found = results[name] = measure(choice.kernel)
        print(
            f"{name}, {found['weights'] / 1e6:.0f} M weights: the floor is {found['floor']:.1f} ms"
        )
        for row in found["ms"]:
            times = ", ".join(f"{way} {ms:.1f} ms" for way, ms in row.items() if way != "rows")
            print(f"{row['rows']:5} rows: {times}", flush=True)
    if given.out is not None:
        record.write(given.out, results)


if __name__ == "__main__":
    main()
