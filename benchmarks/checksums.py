"""Measure the time that verifying checksums adds to loading an artifact.

Quantizes a random bf16 Llama of a billion parameters with `int8` (about 1.1 GB) and loads it
alternately with and without checksums, from the page cache and from disk after dropping its pages.
The weights of a quantized model are memory-mapped and read in its first forward, so the benchmark
times loading alone, loading and reading every weight once, and loading with unpacking to dense.

    python benchmarks/checksums.py [--layers 14] [--rounds 7] [--busy] [--out …/results/…json]

`--busy` marks results measured while other work was running. The reported speed of reading the
dropped files shows whether they come from a disk or from a cache of the host.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from quantize_memory import write_checkpoint

import spectool
from spectool.machine import describe

CHUNK = 1 << 22


def drop(files: list[Path]) -> None:
    """Drop the pages of these files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read(files: list[Path]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def read_weights(model: Any) -> None:
    """Read every weight once."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8).amax()


def measure(artifact: Path, files: list[Path], rounds: int) -> dict[str, Any]:
    """Time each way of loading with and without checksums."""

    def load(checksums: bool, *, runtime: str = "packed", reads_weights: bool = False) -> None:
        model = spectool.load(artifact, runtime=runtime, checksums=checksums)
        if reads_weights:
            read_weights(model)

    loads: dict[str, tuple[int, bool, Callable[[bool], None]]] = {
        "cached, mapped only": (rounds, False, load),
        "cached, every weight read": (rounds, False, lambda sums: load(sums, reads_weights=True)),
        "cached, unpacked to dense": (3, False, lambda sums: load(sums, runtime="dense")),
        "disk, every weight read": (3, True, lambda sums: load(sums, reads_weights=True)),
    }
    results = {}
    for name, (count, dropped, run) in loads.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        # One round more than counted: the first is a warm-up.
        for number in range(count + 1):
            for checksums in (True, False) if number % 2 else (False, True):
                gc.collect()
                if dropped:
                    drop(files)
                began = time.perf_counter()
                run(checksums)
                seconds[checksums].append(time.perf_counter() - began)
        best = {checksums: min(times[1:]) for checksums, times in seconds.items()}
        results[name] = {
            "seconds_without": best[False],
            "seconds_with": best[True],
            "added": best[True] / best[False] - 1,
            "rounds": count,
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, help="directory for the temporary artifact")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        model, artifact = Path(scratch) / "model", Path(scratch) / "artifact"
        parameters, _ = write_checkpoint(model, given.layers)
        command = ["quantize", "int8", str(model), str(artifact), "--device", "cpu"]
        subprocess.run(
            [sys.executable, "-m", "spectool", *command], check=True, capture_output=True
        )
        files = sorted(artifact.glob("*.safetensors"))
        num_bytes = sum(file.stat().st_size for file in files)
        speeds = {}
        for name, prepare in (("disk", drop), ("page cache", read)):
            prepare(files)
            began = time.perf_counter()
            read(files)
            speeds[name] = num_bytes / (time.perf_counter() - began)
        result = {
            "benchmark": "checksums",
            "machine": describe(),
            "beside_other_work": given.busy,
            "parameters": parameters,
            "bytes": num_bytes,
            "files": len(files),
            "read_bytes_per_second": speeds,
            "loads": measure(artifact, files, given.rounds),
        }
    text = record.to_text(result)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
