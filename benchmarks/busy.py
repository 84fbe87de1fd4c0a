"""Measure the speed of `spectool generate` while other processes keep the CPU busy.

    python benchmarks/busy.py --shared FOLDER [--out …/results/…json] [--busy 0 2] [--rounds 3]

FOLDER holds `models/codestory-10M` (see its README). The benchmark runs this model, and its copy
widened to 100 M parameters (`widened.py`), which computes the same function at the cost of such a
model. Each command runs in its own process: with one thread; with two threads and OpenMP's default
spinning; with two threads and the bounded spinning that spectool sets. The settings alternate, and
the median over several rounds is reported. The other processes are endless loops, one per
processor; `--other-work` marks results measured while further work was running.
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
from spectool.processors import NUM_THREADS, SPIN, WAIT_POLICY

WIDTHS = {"hidden": 1024, "intermediate": 2944, "heads": 32}
PROMPT = "def fibonacci(n):\n"
# libgomp's default written out: spectool does not change a value that is set.
OWN_SPIN = {"GOMP_SPINCOUNT": "300000"}
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "1 thread": (1, {}),
    "2 threads, OpenMP's own spin": (2, OWN_SPIN),
    "2 threads, bounded spin": (2, {}),
}


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


def tokens_per_second(model: Path, threads: int, spin: dict[str, str], count: int) -> float:
    """Generate `count` tokens in a process of its own and return its tokens per second."""
    controlled = (*SPIN, WAIT_POLICY, *NUM_THREADS)
    environ = {name: value for name, value in os.environ.items() if name not in controlled}
    done = subprocess.run(
        [
            sys.executable, "-m", "spectool", "generate", str(model), "--prompt", PROMPT,
            "--dtype", "float32", "--threads", str(threads), "--max-new-tokens", str(count),
            "--draft", "none", "--json",
        ],
        capture_output=True, text=True, check=True, env={**environ, **spin},
    )  # fmt: skip
    return float(json.loads(done.stdout)["tokens_per_second"])


def measure(model: Path, count: int, numbers: list[int], rounds: int) -> dict[str, Any]:
    """Return the median speed of each setting, for each number of busy processes."""
    medians: dict[str, Any] = {}
    for number in numbers:
        speeds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        with busy(number):
            for _ in range(rounds):
                for setting, (threads, spin) in SETTINGS.items():
                    speeds[setting].append(tokens_per_second(model, threads, spin, count))
        row = {setting: statistics.median(each) for setting, each in speeds.items()}
        medians[f"{number} busy processes beside"] = row
        shown = ", ".join(f"{setting} {speed:.1f}" for setting, speed in row.items())
        print(f"{model.name}, {number} busy processes: {shown} tokens/s", flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--other-work", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = given.shared / "models/codestory-10M"
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
        wide = Path(scratch) / "codestory-10M widened"
        result["widened_parameters"] = widen(model, wide, **WIDTHS, dtype="float32")
        for each in (model, wide):
            speeds = measure(each, given.tokens, given.busy, given.rounds)
            result["tokens_per_second"][each.name] = speeds
            if given.out:
                record.write(given.out, result)
    print(record.to_text(result))


if __name__ == "__main__":
    main()
