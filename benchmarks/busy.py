"""Measure the speed of decoding while other processes keep the CPU busy.

    python benchmarks/busy.py --shared FOLDER [--out …/results/…json] [--busy 0 1 2] [--rounds 3]

FOLDER holds `models/codestory-10M` (see its README). The benchmark decodes this model, and its copy
widened to 400 M parameters (`widened.py`), which computes the same function at the cost of such a
model; each in bfloat16 and packed to 4 bits. A process of its own loads a model once for each way
in which OpenMP's threads spin: bounded as spectool sets it, and libgomp's default. In it, one
thread and two take turns, and so do the numbers of other processes, which are endless loops. The
median over the rounds is reported; `--other-work` marks results measured while further work was
running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from widened import widen

from spectool.machine import describe
from spectool.processors import NUM_THREADS, SPIN, WAIT_POLICY, limit_spin

SIZES = {"hidden": 2048, "intermediate": 5888, "heads": 64}
PROMPT = "def fibonacci(n):\n"
# libgomp's default written out: spectool does not change a value that is set.
SPINS: dict[str, dict[str, str]] = {"bounded": {}, "OpenMP's own": {"GOMP_SPINCOUNT": "300000"}}
THREADS = (1, 2)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes that compute without pause."""
    loop = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure_here(model: Path, tokens: int, numbers: list[int], rounds: int) -> dict[str, Any]:
    """Return the median tokens per second by number of busy processes and of threads."""
    limit_spin(os.environ)
    import torch

    from spectool.decode.generate import Runner

    runner = Runner(model, dtype="bfloat16")
    speeds: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        for number in numbers:
            with busy(number):
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    spent = runner.timings.target
                    (result,) = runner.generate([PROMPT], max_new_tokens=tokens)
                    # The first token is the prompt's.
                    speed = (len(result.token_ids) - 1) / (runner.timings.target - spent)
                    speeds.setdefault((number, threads), []).append(speed)
    return {
        f"{number} busy processes beside": {
            f"{threads} threads": statistics.median(speeds[number, threads]) for threads in THREADS
        }
        for number in numbers
    }


def measure(model: Path, spin: dict[str, str], given: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure_here` returns, of a process of its own."""
    controlled = (*SPIN, WAIT_POLICY, *NUM_THREADS)
    environ = {name: value for name, value in os.environ.items() if name not in controlled}
    command = [sys.executable, __file__, "--model", str(model), "--busy", *map(str, given.busy)]
    command += ["--rounds", str(given.rounds), "--tokens", str(given.tokens)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**environ, **spin}
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def list_models(source: Path, folder: Path) -> Iterator[Path]:
    """Yield a model, its widened copy and their packed versions, as they are made in `folder`."""
    wide = folder / "codestory-10M widened"
    widen(source, wide, **SIZES, dtype="bfloat16")
    for model in (source, wide):
        packed = folder / f"{model.name}, 4 bits"
        command = [sys.executable, "-m", "spectool", "quantize", "rtn", str(model), str(packed)]
        subprocess.run([*command, "--bits", "4"], check=True, capture_output=True)
        yield model
        yield packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--shared", type=Path)
    chosen.add_argument("--model", type=Path, help="measure it here, and print the medians as JSON")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--other-work", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.model:
        print(json.dumps(measure_here(given.model, given.tokens, given.busy, given.rounds)))
        return
    result: dict[str, Any] = {
        "benchmark": "busy",
        "machine": describe(),
        "beside_other_work": given.other_work,
        "rounds": given.rounds,
        "new_tokens": given.tokens,
        "spin": SPIN,
        "tokens_per_second": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for model in list_models(given.shared / "models/codestory-10M", Path(scratch)):
            for name, spin in SPINS.items():
                speeds = measure(model, spin, given)
                result["tokens_per_second"][f"{model.name}, spin {name}"] = speeds
                print(f"{model.name}, spin {name}: {speeds}", file=sys.stderr, flush=True)
                if given.out:
                    record.write(given.out, result)
    print(record.to_text(result))


if __name__ == "__main__":
    main()
