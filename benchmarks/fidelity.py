"""Stored bits against what was lost: every method on given checkpoints and texts.

    python benchmarks/fidelity.py --case MODEL TEXT WINDOW --case … [--out results.json]

Each checkpoint is packed by each method and compared with itself in float32: windows opened with
the start token, every token of the text scored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from spectool.evaluate.evaluate import Request, evaluate
from spectool.headers import read_layout
from spectool.machine import describe
from spectool.methods import resolve
from spectool.quantize.ledger import measure
from spectool.quantize.run import Job, quantize

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("nf4", {}),
    ("rtn", {"bits": 4, "group_size": 128}),
    ("rtn", {"bits": 4, "group_size": 32}),
    ("rtn", {"bits": 3, "group_size": 128}),
    ("rtn", {"bits": 2, "group_size": 128}),
]


def row(model: str, text: str, window: int, method: str, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        config = resolve(method, "quantizer").Config(**options)
        began = time.perf_counter()
        quantize(model, out, Job(method=method, config=config))
        seconds = time.perf_counter() - began
        ledger = measure(read_layout(out))
        request = Request(
            texts=[text], window=window, bos=True, reference=model, dtype="float32", runtime="dense"
        )
        found = evaluate(str(out), request)
    return {
        "model": Path(model).name,
        "text": Path(text).name,
        "method": method,
        "options": options,
        "bits_linears": ledger.linears,
        "bits_file": ledger.file,
        "bytes": ledger.file_bytes,
        "quantize_seconds": seconds,
        "perplexity": found["perplexity"],
        "reference_perplexity": found["reference"]["perplexity"],
        "perplexity_ratio": found["perplexity_ratio"],
        "kl": found["kl"],
        "top1_agreement": found["top1_agreement"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs=3, action="append", required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    rows = [
        row(model, text, int(window), method, options)
        for model, text, window in arguments.case
        for method, options in METHODS
    ]
    result = {"benchmark": "fidelity", "machine": describe(), "rows": rows}
    print("| model | method | bits, linears | bits, file | perplexity | ratio | KL | top-1 |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for one in rows:
        options = " ".join(f"{key}={value}" for key, value in one["options"].items())
        print(
            f"| {one['model']} | {one['method']} {options} | {one['bits_linears']:.2f} | "
            f"{one['bits_file']:.2f} | {one['perplexity']['value']:.2f} | "
            f"{one['perplexity_ratio']:.3f} | {one['kl']:.4f} | {one['top1_agreement']:.1%} |"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
