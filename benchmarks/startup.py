"""Measure how long commands take to start, each beside the least that its imports cost.

    python benchmarks/startup.py [--shared FOLDER] [--rounds 7] [--out …/results/…json]

`--help` and `list` stand beside importing typer and rich. With FOLDER, which holds
`models/codestory-10M`, `generate`'s first token on that checkpoint and on its packed version stands
beside the first token of a script that loads the same model and tokenizer with transformers and
runs one forward. `first run`: no cost curve of the model is known. A command and its script
alternate, so that drift of the machine's speed affects both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record

from spectool.machine import describe

SPECTOOL = (sys.executable, "-m", "spectool")
PROMPT = "def fibonacci(n):"
SCRIPT = """
import sys
import torch
import spectool
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
    print(tokenizer.decode(model(ids).logits[0, -1].argmax()), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """A command of ours and what it stands beside. `forgets`: the cost curves, before each run."""

    ours: tuple[str, ...]
    peer: tuple[str, ...]
    forgets: bool = False


def list_pairs(folder: Path, source: Path | None) -> dict[str, Pair]:
    """Return the pairs by name; those of `generate` for a checkpoint, whose copies are written."""
    imports = (sys.executable, "-c", "import typer, rich")
    pairs = {name: Pair((*SPECTOOL, name), imports) for name in ("--help", "list")}
    if source is None:
        return pairs
    dense, packed = folder / "dense", folder / "packed"
    shutil.copytree(source, dense)
    command = [*SPECTOOL, "quantize", "rtn", str(dense), str(packed), "--bits", "4"]
    subprocess.run(command, check=True, capture_output=True)
    for kind, model in (("dense", dense), ("packed", packed)):
        ours = (*SPECTOOL, "generate", str(model), "--prompt", PROMPT, "--max-new-tokens", "1")
        peer = (sys.executable, "-c", SCRIPT, str(model), PROMPT)
        pairs[f"generate, {kind}"] = Pair(ours, peer)
    pairs["generate, first run"] = replace(pairs["generate, dense"], forgets=True)
    return pairs


def seconds(command: tuple[str, ...], folder: Path, *, forgets: bool = False) -> float:
    """Time a command in a process of its own, to the first byte that it writes."""
    cache = folder / "cache"
    if forgets:
        (cache / "spectool/curves.json").unlink(missing_ok=True)
    # Modules are compiled once, as where they were installed.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environ["XDG_CACHE_HOME"] = str(cache)
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=environ
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        spent = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with exit code {process.returncode}")
    return spent


def measure(pair: Pair, folder: Path, rounds: int) -> dict[str, float]:
    """Return the median seconds of both commands, and of their ratio by round."""
    for command in (pair.peer, pair.ours):
        seconds(command, folder)
    times = [
        (seconds(pair.peer, folder), seconds(pair.ours, folder, forgets=pair.forgets))
        for _ in range(rounds)
    ]
    return {
        "peer_seconds": statistics.median(peer for peer, _ in times),
        "seconds": statistics.median(ours for _, ours in times),
        "ratio": statistics.median(ours / peer for peer, ours in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--other-work", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "startup",
        "machine": describe(),
        "beside_other_work": given.other_work,
        "rounds": given.rounds,
        "commands": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = given.shared and given.shared / "models/codestory-10M"
        for name, pair in list_pairs(folder, source).items():
            found = measure(pair, folder, given.rounds)
            result["commands"][name] = found
            print(f"{name}: {found}", file=sys.stderr, flush=True)
            if given.out:
                record.write(given.out, result)
    print(record.to_text(result))


if __name__ == "__main__":
    main()
