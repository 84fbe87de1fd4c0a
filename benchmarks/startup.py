"""Measure the time of `spectool --help` against importing typer and rich.

    python benchmarks/startup.py [--out benchmarks/results/...json]

The two commands alternate, so that drift of the machine's speed affects both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

from spectool.machine import describe

ROUNDS = 15
BASELINE = [sys.executable, "-c", "import typer, rich"]
OURS = [str(Path(sys.executable).with_name("spectool")), "--help"]


def seconds(command: list[str], folder: str) -> float:
    """Time a command in a process of its own."""
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, cwd=folder)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for command in (BASELINE, OURS):
            seconds(command, folder)
        pairs = [(seconds(BASELINE, folder), seconds(OURS, folder)) for _ in range(ROUNDS)]
    result = {
        "benchmark": "startup",
        "commands": ["python -c 'import typer, rich'", "spectool --help"],
        "machine": describe(),
        "peer_seconds": statistics.median(baseline for baseline, _ in pairs),
        "help_seconds": statistics.median(ours for _, ours in pairs),
        "ratio": statistics.median(ours / baseline for baseline, ours in pairs),
        "rounds": ROUNDS,
    }
    text = record.to_text(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
