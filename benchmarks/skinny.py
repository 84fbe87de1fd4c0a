"""Benchmark small-batch matmuls with large matrices: `kernels/skinny.c` against torch.

    python benchmarks/skinny.py [--out benchmarks/results/...json]

Multiplies the seven matrices of a layer with hidden size 2048, in several copies, so that they are
read from memory rather than from a cache. The two alternate; the minimum over some rounds counts.
The floor is the matrices' bytes over the memory bandwidth, measured by summing as many bytes.
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

from spectool.kernels import skinny
from spectool.machine import describe

SHAPES = [(2048, 2048)] * 4 + [(5888, 2048)] * 2 + [(2048, 5888)]
LAYERS, ROUNDS = 6, 6
ROWS = (1, 2, 4, 8, 16, 32, 64)


@torch.inference_mode()
def measure(dtype: torch.dtype) -> dict[str, Any]:
    """Time both for each number of rows."""
    weights = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
    numel = sum(weight.numel() for weight in weights)

    def seconds(product: Callable[[Tensor, Tensor], Tensor], x: dict[int, Tensor]) -> float:
        began = time.perf_counter()
        for weight in weights:
            product(x[weight.shape[1]], weight)
        return time.perf_counter() - began

    rows = []
    for count in ROWS:
        x = {width: torch.randn(count, width).to(dtype) for width in (2048, 5888)}
        pairs = [(seconds(skinny.linear, x), seconds(linear, x)) for _ in range(ROUNDS)]
        ours, torchs = (min(times) for times in zip(*pairs, strict=True))
        rows.append(
            {
                "rows": count,
                "ms": 1e3 * ours,
                "torch_ms": 1e3 * torchs,
                "speedup": torchs / ours,
                "gflops": 2e-9 * count * numel / ours,
            }
        )
    floor = 1e3 * read_seconds(numel * dtype.itemsize)
    return {"weights": numel, "floor_ms": floor, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    if (missing := skinny.missing()) is not None:
        raise SystemExit(f"nothing to measure: {missing}")
    results: dict[str, Any] = {"machine": describe()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        results[name] = measure(dtype)
        print(f"{name}, {results[name]['weights'] / 1e6:.0f} M weights", end="")
        print(f"; reading them takes {results[name]['floor_ms']:.1f} ms")
        for row in results[name]["rows"]:
            print(
                "{rows:3} rows {ms:7.1f} ms, torch {torch_ms:7.1f} ({speedup:.2f}x)".format(**row)
            )
    if out is not None:
        record.write(out, results)


if __name__ == "__main__":
    main()
