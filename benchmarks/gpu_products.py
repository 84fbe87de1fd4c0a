"""Time products with packed matrices on a GPU, by the share of its copy bandwidth that they reach.

    python benchmarks/gpu_products.py [--formats FORMAT ...] [--out benchmarks/results/...json]

Each format multiplies distinct matrices of 8192 x 28672, at least 2 GB of codes together, because
fewer fit the device's cache; one CUDA graph holds the products with all of them. Bytes a second
are compared with those that copies of 2 GB read and write. Times are medians of replays. A product
that is not that of the unpacked matrix is an error.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import linear

from spectool.kernels.triton_products import TritonProduct
from spectool.machine import describe
from spectool.quantize.base import Quantizer, parse_quantizer

SHAPE = 8192, 28672
LEAST_BYTES = 2 << 30
FORMATS = ("rtn:bits=4", "rtn:bits=3", "rtn:bits=2", "hqq:bits=4", "int8", "ptq161")
ROWS, REPLAYS = (1, 8, 16, 64), 20
# Relative error of bfloat16 results; a wrong code errs by far more.
MOST_ERROR = 0.005


def make_product(quantizer: Quantizer, shape: tuple[int, int], seed: int) -> TritonProduct:
    """Pack a random matrix, and lay it out for its product."""
    generator = torch.Generator("cuda").manual_seed(seed)
    weight_nm = torch.randn(shape, generator=generator, device="cuda")
    with torch.device("cuda"):
        packed: Any = quantizer.build(shape)
    packed.q.load_state_dict(quantizer.pack(weight_nm, None, generator))
    return TritonProduct(packed.segments(), shape)


def check(product: TritonProduct, x_Nm: Tensor) -> None:
    """Raise a SystemExit if a product differs from that of the unpacked matrix."""
    expected_Nn = linear(x_Nm.float(), product.rows())
    error = float((product(x_Nm, None).float() - expected_Nn).norm() / expected_Nn.norm())
    if not error <= MOST_ERROR:
        raise SystemExit(f"a product of {len(x_Nm)} rows errs by {error:.2g}")


def time_graph(run: Callable[[], object]) -> float:
    """Return the seconds of one replay of what `run` does on the device."""
    # Kernels are compiled, and memory is reserved, before the capture.
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    seconds = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)


def measure_copies() -> float:
    """Return the bytes that copies read and write in a second."""
    source = torch.empty(LEAST_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * LEAST_BYTES / time_graph(lambda: target.copy_(source))


def measure(quantizer: Quantizer, bandwidth: float) -> dict[str, Any]:
    """Time the products of a format for each number of rows."""
    products = [make_product(quantizer, SHAPE, 0)]
    while sum(product.nbytes for product in products) < LEAST_BYTES:
        products.append(make_product(quantizer, SHAPE, len(products)))
    num_bytes = sum(product.nbytes for product in products)
    rows = []
    for count in ROWS:
        x_Nm = torch.randn(count, SHAPE[1], device="cuda", dtype=torch.bfloat16)
        check(products[-1], x_Nm)

        def run(x_Nm: Tensor = x_Nm) -> None:
            for product in products:
                product(x_Nm, None)

        seconds = time_graph(run)
        share = num_bytes / seconds / bandwidth
        rows.append({"rows": count, "microseconds": 1e6 * seconds / len(products), "share": share})
    weights = len(products) * SHAPE[0] * SHAPE[1]
    return {"matrices": len(products), "bits a weight": 8 * num_bytes / weights, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bandwidth = measure_copies()
    results: dict[str, Any] = {"machine": describe(), "bytes copied a second": bandwidth}
    for format in given.formats:
        found = results[format] = measure(parse_quantizer(format), bandwidth)
        print(f"{format}: {found['bits a weight']:.3g} bits a weight")
        for row in found["rows"]:
            print("  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if given.out is not None:
        record.write(given.out, results)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
