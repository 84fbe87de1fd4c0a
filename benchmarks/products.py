"""Time products with packed matrices against other libraries' and against the processor's limits.

    python benchmarks/products.py [--ggml FOLDER] [--formats rtn4,...] [--shapes 4096x4096,...]
        [--threads 1,2] [--rows 1,8,32,64] [--activations int8,int16,exact] [--out …/results/…json]

Shapes are outputs x inputs. FOLDER holds libggml-base.so and libggml-cpu.so, by default those of an
installed llama-cpp-python. Matrices are a ring larger than four last-level caches. Ways to multiply
take turns, each for some milliseconds of the ring, forwards in one round and backwards in the next;
rounds in which a thread waited for a processor are repeated. Times are medians over the rounds, and
ratios medians of a round's ratio. Every product is checked against the unpacked matrix.

The floors: stored bytes over the bandwidth of reading, and multiply-adds over the peak of the
instruction that multiplies (8-bit integers, bfloat16 or float32), both measured here with as many
threads. In the table a time is followed by its multiple of the larger floor.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectool.processors import Waiting, limit_spin

if __name__ == "__main__":
    import os

    # Before torch is loaded.
    limit_spin(os.environ)

import peaks
import record
import torch
from ggml import TYPES, Ggml, GgmlRing, find_folder
from peaks import Peaks
from peers import CACHES, CallRing, DenseRing, Instruction, IntMMRing, NF4Ring, Ring, Setup
from torch import Tensor

from spectool.kernels import registry
from spectool.kernels.products import PackedProduct, Precision, precisions
from spectool.machine import describe, version
from spectool.quantize.base import Quantizer, parse_quantizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 15
# What one way computes in a round, in seconds, after as much that is not timed and wakes threads.
# Among other processes, short turns are the ones in which no thread waits.
TURN = 0.003
# A thread may wait for a processor for this share of a turn; so many turns are tried, after a pause
# in seconds, for one that counts.
MOST_WAITING, TRIES, PAUSE = 0.02, 20, 0.01
# Products that are timed singly, to choose how many a turn has.
SINGLES = 12
# Largest relative error of a product; those of peers with rounded activations are below 0.01.
MOST_ERROR = 0.02
MOST_OVER_FLOOR = 1.4


@dataclass(frozen=True, slots=True)
class Format:
    """One of our formats, its peers, and the ratios to the fastest of them that are the goal.

    `goals` are for activations rounded to int8, by number of rows; `exact`, for others, and
    against NF4 only.
    """

    method: str
    peers: tuple[str, ...]
    goals: Mapping[int, float] = field(default_factory=dict)
    exact: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a product of each way by round, and the share of turns in which a thread waited."""

    seconds: dict[str, list[float]]
    disturbed: float


DENSE = "dense"
_FOUR = ("NF4", "Q4_0"), {1: 1.1, 8: 2.0, 32: 1.9}, {8: 1.1}
_TWO = ("TQ2_0", "Q2_K"), {1: 1.0, 8: 2.0, 32: 1.5}
FORMATS = {
    "rtn4": Format("rtn:bits=4,group_size=128", *_FOUR),
    "nf4": Format("nf4", *_FOUR),
    "rtn2": Format("rtn:bits=2,group_size=128", *_TWO),
    "jlcm": Format("jlcm", *_TWO),
    "ptq161": Format("ptq161", ("TQ1_0",), {1: 1.5, 8: 2.5, 32: 2.0}),
    "int8": Format("int8", ("_int_mm", "Q8_0"), {1: 0.95, 8: 1.3, 32: 1.0}),
    DENSE: Format(DENSE, ("torch", "BF16")),
}


class OurRing(CallRing):
    """A ring of our products with matrices of a format, for activations of a dtype.

    `held_bytes`: what a product holds of its matrix, laid out anew.
    """

    held_bytes: int

    def __init__(self, format: str, precision: Precision, dtype: torch.dtype, setup: Setup) -> None:
        kind: Instruction = "float32" if precision == "exact" else "int8"
        super().__init__(f"ours {precision}", kind, setup)
        self.precision, self.dtype = precision, dtype
        weight_nm = torch.randn(self.shape, generator=setup.generator)
        if format == DENSE:
            self._fill_dense(weight_nm.to(dtype))
        else:
            self._fill_packed(parse_quantizer(FORMATS[format].method), weight_nm, setup)

    def _fill_dense(self, weight_nm: Tensor) -> None:
        """Make the products with a dense matrix."""
        if self.precision != "exact":
            raise LookupError(f"dense: no product with {self.precision} activations")
        if self.dtype == torch.bfloat16:
            self.instruction = "bfloat16"

        def make() -> Any:
            fields = {"weight": weight_nm.clone()}
            choice, product = registry.prepare(DENSE, fields, self.shape, self.dtype)
            if product is None:
                raise LookupError(f"dense: {choice}")
            return product

        self._values_nm = weight_nm.float()
        self.fill(make, weight_nm.nbytes)
        self.held_bytes = weight_nm.nbytes

    def _fill_packed(self, quantizer: Quantizer, weight_nm: Tensor, setup: Setup) -> None:
        """Pack the matrix, and make the products with it."""
        module = quantizer.build(self.shape)
        module.q.load_state_dict(quantizer.pack(weight_nm, None, setup.generator))
        segments = module.segments()
        if segments is None or self.precision not in precisions(segments):
            raise LookupError(f"{quantizer}: no product with {self.precision} activations")
        self._values_nm = module.dequantize()
        stored = quantizer.stored_bytes(self.shape)
        self.fill(lambda: PackedProduct(segments, self.shape, self.precision), stored)
        self.held_bytes = self.matrices[0].nbytes

    def matrix(self) -> Tensor:
        return self._values_nm

    def convert(self, x_Nm: Tensor) -> Tensor:
        return x_Nm.to(self.dtype)

    def call(self, x: Tensor, matrix: Any) -> Tensor:
        return matrix(x, None)


def ours(format: str, precision: Precision, dtype: torch.dtype, setup: Setup) -> list[Ring]:
    """Make the ring of our product; none, with a word, where there is no such product."""
    try:
        return [OurRing(format, precision, dtype, setup)]
    except LookupError as error:
        print(f"not measured: {error}")
        return []


def open_peer(name: str, dtype: torch.dtype, ggml: Ggml | None, setup: Setup) -> list[Ring]:
    """Make the rings of a peer: of a ggml format, one for each way that it can be laid out."""
    if name in TYPES:
        if ggml is None:
            return []
        types = [each for each in ggml.buffer_types if ggml.supports(name, setup.shape, each)]
        return [GgmlRing(ggml, name, each, setup) for each in types]
    if name == "torch":
        return [DenseRing(dtype, setup)]
    if name == "NF4" and (reason := NF4Ring.missing()):
        print(f"not measured: NF4: {reason}")
        return []
    return [NF4Ring(setup) if name == "NF4" else IntMMRing(setup)]


def measure(rings: Sequence[Ring], x_Nm: Tensor, threads: int, rounds: int) -> Timing:
    """Time the rings' products in turns, each way so many rounds."""
    turns = {ring.name: _start(ring, x_Nm, threads) for ring in rings}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    shares = []
    for number in range(rounds):
        for ring in rings if number % 2 else reversed(rings):
            ring.set_threads(threads)
            tried = []
            for _ in range(TRIES):
                tried.append(turns[ring.name]())
                ring.rest()
                if tried[-1][0] <= MOST_WAITING:
                    break
                time.sleep(PAUSE)
            share, took = min(tried)
            shares.append(share)
            seconds[ring.name].append(took)
    disturbed = sum(share > MOST_WAITING for share in shares) / len(shares)
    return Timing(seconds, disturbed)


def _start(ring: Ring, x_Nm: Tensor, threads: int) -> Callable[[], tuple[float, float]]:
    """Check a ring's product; return a function that computes for a turn.

    It returns the share of the time that a thread waited, and the seconds a product.

    Raises:
        SystemExit: the product is wrong.
    """
    ring.set_threads(threads)
    singles = ring.multiply(x_Nm, 1)
    found_Nn, expected_Nn = singles[0]().float(), ring.expect(x_Nm)
    error = float((found_Nn - expected_Nn).norm() / expected_Nn.norm())
    if not error <= MOST_ERROR:
        raise SystemExit(f"{ring.name}: the product has a relative error of {error:.3g}")
    took = []
    # The least of some, as a turn of a disturbed estimate would be too short.
    for single in itertools.islice(itertools.cycle(singles), SINGLES):
        began = time.perf_counter()
        single()
        took.append(time.perf_counter() - began)
    ring.rest()
    part = max(1, min(ring.count, round(TURN / min(took))))
    parts = itertools.cycle(ring.multiply(x_Nm, part))

    def turn() -> tuple[float, float]:
        waiting = Waiting()
        next(parts)()
        run = next(parts)
        began = time.perf_counter()
        run()
        took = time.perf_counter() - began
        return waiting.share(), took / part

    return turn


def compare(
    format: Format, rings: Sequence[Ring], rows: int, timing: Timing, limits: Peaks
) -> dict[str, Any]:
    """Return each way's figures: time and floors in milliseconds, and what ours compare with."""
    ways = {ring.name: _figures(ring, rows, timing, limits) for ring in rings}
    for ring in rings:
        if not isinstance(ring, OurRing):
            continue
        goals, rivals = format.goals, [each for each in rings if not isinstance(each, OurRing)]
        if ring.precision != "int8":
            goals = format.exact
            if goals:
                # NF4's product does not round activations to int8 either.
                rivals = [each for each in rivals if isinstance(each, NF4Ring)]
        if rivals:
            peer = min((each.name for each in rivals), key=lambda name: ways[name]["ms"])
            pairs = zip(timing.seconds[peer], timing.seconds[ring.name], strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
            ways[ring.name] |= {"peer": peer, "ratio": ratio, "goal": goals.get(rows)}
        ways[ring.name]["held_bits"] = 8 * ring.held_bytes / (ring.shape[0] * ring.shape[1])
    return {"rows": rows, "disturbed": timing.disturbed, "ways": ways}


def _figures(ring: Ring, rows: int, timing: Timing, limits: Peaks) -> dict[str, Any]:
    """Return what was measured of a way, and its floors."""
    n, m = ring.shape
    ms = 1e3 * statistics.median(timing.seconds[ring.name])
    read = 1e3 * ring.num_bytes / limits.read
    # Activations of 16 bits are multiplied as two of 8.
    parts = 2 if isinstance(ring, OurRing) and ring.precision == "int16" else 1
    multiply = 1e3 * rows * parts * n * m / limits.multiply[ring.instruction]
    return {
        "ms": ms,
        "bits": 8 * ring.num_bytes / (n * m),
        "read_floor_ms": read,
        "multiply_floor_ms": multiply,
        "over_floor": ms / max(read, multiply),
    }


def show(line: dict[str, Any]) -> None:
    """Print the times with a number of rows, and how ours compare."""
    ways = line["ways"]
    cells = [f"{way['ms']:.3f} ({way['over_floor']:.2f})" for way in ways.values()]
    note = f"  {line['disturbed']:.0%} of turns disturbed" if line["disturbed"] else ""
    print(f"{line['rows']:5}" + "".join(f"{cell:>18}" for cell in cells) + note)
    for name, way in ways.items():
        if "ratio" not in way:
            continue
        against = f"{way['ratio']:.2f}x the speed of {way['peer']}"
        if way["goal"] is not None:
            against += _verdict(way["ratio"] >= way["goal"], way["goal"])
        floor = max(way["read_floor_ms"], way["multiply_floor_ms"])
        kind = "reading" if floor == way["read_floor_ms"] else "multiplying"
        over = _verdict(way["over_floor"] <= MOST_OVER_FLOOR, MOST_OVER_FLOOR)
        print(f"{name:>18}: {against}; {way['over_floor']:.2f}x {kind}, {floor:.3f} ms{over}")


def _verdict(met: bool, goal: float) -> str:
    return f" (goal {goal:g}: {'met' if met else 'MISSED'})"


def run(given: argparse.Namespace, ggml: Ggml | None) -> dict[str, Any]:
    """Measure every combination that was asked for, and print its lines."""
    cache_bytes = given.cache_bytes or peaks.last_level_cache()
    limits = {}
    for threads in given.threads:
        found = limits[threads] = peaks.measure(threads, CACHES * cache_bytes)
        peak = ", ".join(f"{name} {rate / 1e9:.0f} G" for name, rate in found.multiply.items())
        print(f"{threads} threads: {found.read / 1e9:.1f} GB/s, multiply-adds a second: {peak}")
    results = []
    for shape, name in itertools.product(given.shapes, given.formats):
        setup = Setup(shape, cache_bytes, torch.Generator().manual_seed(0))
        dtype = DTYPES[given.dtype]
        rings: list[Ring] = []
        for precision in given.activations:
            rings += ours(name, precision, dtype, setup)
        for peer in FORMATS[name].peers:
            rings += open_peer(peer, dtype, ggml, setup)
        for threads in given.threads:
            size = f"{shape[0]}x{shape[1]}"
            print(f"\n{name}, {size}, {threads} threads: ms (times the larger floor)")
            print(" rows" + "".join(f"{ring.name:>18}" for ring in rings))
            lines = []
            for rows in given.rows:
                x_Nm = torch.randn(rows, shape[1], generator=setup.generator)
                timing = measure(rings, x_Nm, threads, given.rounds)
                lines.append(compare(FORMATS[name], rings, rows, timing, limits[threads]))
                show(lines[-1])
            results.append({"format": name, "shape": size, "threads": threads, "rows": lines})
        for ring in rings:
            ring.close()
    floors = {str(threads): asdict(found) for threads, found in limits.items()}
    return {"last_level_cache": cache_bytes, "peaks": floors, "products": results}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    def shape(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split("x")))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ggml", type=Path, default=find_folder(), help="folder of ggml's libraries")
    add("--formats", type=listed(str), default=list(FORMATS), help=",".join(FORMATS))
    add("--shapes", type=listed(shape), default=[(4096, 4096), (11008, 4096)])
    add("--threads", type=listed(int), default=[1, 2])
    add("--rows", type=listed(int), default=[1, 8, 32, 64])
    add("--activations", type=listed(str), default=["int8", "int16", "exact"])
    add("--dtype", choices=DTYPES, default="bfloat16", help="of our activations")
    add("--rounds", type=int, default=ROUNDS)
    add("--cache-bytes", type=int, help="last-level cache; by default as the system reports it")
    add("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    ggml = None if given.ggml is None else Ggml(given.ggml)
    if ggml is None:
        print("without ggml: no llama-cpp-python is installed, and --ggml was not given")
    result = {
        "benchmark": "products",
        "machine": describe(),
        "ggml": None if ggml is None else ggml.describe(),
        "bitsandbytes": version("bitsandbytes"),
        "dtype": given.dtype,
        "rounds": given.rounds,
        **run(given, ggml),
    }
    if given.out is not None:
        record.write(given.out, result)


if __name__ == "__main__":
    main()
