"""How long the command line takes to answer, against importing what it stands on.

    python benchmarks/startup.py [--out benchmarks/results/...json]

The two commands alternate, so that a machine whose speed drifts is fair to both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spectool.machine import describe

ROUNDS = 15
PEER = [sys.executable, "-c", "import typer, rich"]
OURS = [str(Path(sys.executable).with_name("spectool")), "--help"]


def seconds(command: list[str], folder: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, cwd=folder)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for command in (PEER, OURS):
            seconds(command, folder)
        pairs = [(seconds(PEER, folder), seconds(OURS, folder)) for _ in range(ROUNDS)]
    result = {
        "benchmark": "startup",
        "commands": ["python -c 'import typer, rich'", "spectool --help"],
        "machine": describe(),
        "peer_seconds": statistics.median(peer for peer, _ in pairs),
        "help_seconds": statistics.median(ours for _, ours in pairs),
        "ratio": statistics.median(ours / peer for peer, ours in pairs),
        "rounds": ROUNDS,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
