"""Measured limits of the processor: bytes read a second, and multiply-adds a second (`peaks.c`)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import Instruction

# Ways to read, the fastest of which counts: streams side by side, and bytes to prefetch ahead.
READS = [(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024, 4096)]
REPEATS = 40
# Rounds of 16 instructions, some milliseconds.
ROUNDS = 1 << 22


@dataclass(frozen=True, slots=True)
class Peaks:
    """Limits of some threads together: bytes a second, multiply-adds a second by instruction."""

    read: float
    multiply: dict[Instruction, float]


def last_level_cache() -> int:
    """Return the bytes of the largest cache of the first processor, as Linux reports it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes]
    if not found:
        raise SystemExit("the system does not report the sizes of caches; Linux does")
    return max(found)


def measure(threads: int, num_bytes: int) -> Peaks:
    """Measure the limits; each thread reads so many bytes of its own, more than caches hold."""
    library = _build()
    blocks = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(threads)]
    instructions: tuple[Instruction, ...] = ("int8", "bfloat16", "float32")
    with ThreadPoolExecutor(threads) as pool:

        def rate(work: Callable[[int], int]) -> float:
            """Return the most that the threads do in a second."""
            best = 0.0
            for _ in range(REPEATS):
                began = time.perf_counter()
                done = sum(pool.map(work, range(threads)))
                best = max(best, done / (time.perf_counter() - began))
            return best

        pointers = [block.data_ptr() for block in blocks]
        reads = [
            rate(lambda i, way=way: library.read_peak(pointers[i], num_bytes, *way))
            for way in READS
        ]
        multiply = {}
        for name in instructions:
            peak = getattr(library, f"{name}_peak")
            multiply[name] = rate(lambda i, peak=peak: peak(ROUNDS))
    return Peaks(max(reads), multiply)


def _build() -> ctypes.CDLL:
    """Compile and load `peaks.c` for this processor.

    Raises:
        SystemExit: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("the floors need a C compiler")
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peaks.so"
        flags = ("-O3", "-march=native", "-fPIC", "-shared")
        subprocess.run([compiler, *flags, source, "-o", target], check=True)
        library = ctypes.CDLL(str(target))
    for name in ("int8_peak", "bfloat16_peak", "float32_peak"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64]
    library.read_peak.restype = ctypes.c_int64
    library.read_peak.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    return library
