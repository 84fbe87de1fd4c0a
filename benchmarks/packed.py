"""Measure what packed weights gain in decoding, at the cost of a 400 M model.

    python benchmarks/packed.py --shared FOLDER [--out DIR] [--methods M ...] [--name NAME]

FOLDER holds `models/codestory-10M` and `data` (see their README). A copy of the checkpoint, widened
to 400 M parameters (`widened.py`; the same function), is decoded as it is and quantized by each
method without calibration, its codes unpacked once (`dense`) and packed, with activations as they
are (`exact`) and rounded (`int8`). Tokens per second are greedy, plain and with a drafter, whose
texts must equal plain decoding in float32. The floor is the time to read the stored weights once a
token, at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import record
from loop_overhead import read_seconds
from main_job import RESULTS, spectool
from widened import widen

from decode import WIDTHS, write_prompts
from spectool.machine import describe

# The options of `quantize`. Speed does not depend on how well a method is fitted, so that
# calibration is short.
METHODS: dict[str, tuple[object, ...]] = {
    "int8": (),
    "rtn": ("--bits", 4),
    "nf4": (),
    "rtn-2": ("--bits", 2),
    "ptq161": ("--epochs", 0, "--no-compensate", "--samples", 4, "--seq-len", 128),
}
DRAFT = "trigram+recycle:tune"
# Bytes that are read to measure the bandwidth.
READ = 1 << 29
# Runtime and activations.
WAYS = (("dense", "exact"), ("packed", "exact"), ("packed", "int8"))


def stored_bytes(model: Path) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def decoding(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a run of `bench` says of decoding, without the time of the prompts."""
    seconds = found["seconds"] * (1 - found["prompt_share"])
    return {
        "ms_per_token": 1e3 * seconds / found["new_tokens"],
        "tokens_per_forward": found["tokens_per_forward"],
        "identical": found["identical"],
        "prompts": found["prompts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/packed"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--name", default="packed-2-core-cpu")
    given = parser.parse_args()
    out = given.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_prompts(given.shared / "data", out / "prompts.jsonl", given.each)
    bandwidth = max(READ / read_seconds(READ) for _ in range(5))
    results: dict[str, Any] = {"benchmark": "packed", "machine": describe()}
    wide = out / "wide"
    parameters = widen(given.shared / "models/codestory-10M", wide, **WIDTHS, dtype="bfloat16")
    results |= {"model": "codestory-10M, widened", "parameters": parameters}
    results |= {"draft": DRAFT, "bytes_per_second": bandwidth, "runs": []}

    def run(model: Path, method: str, dtype: str, runtime: str, activations: str) -> None:
        size = stored_bytes(model)
        if runtime == "dense":
            size = parameters * (4 if dtype == "float32" else 2)
        found = spectool(
            "bench", model, "--prompts", out / "prompts.jsonl", "--dtype", dtype,
            "--max-new-tokens", given.max_new_tokens, "--runtime", runtime,
            "--activations", activations, "--draft", DRAFT,
        )  # fmt: skip
        row = {
            "method": method, "dtype": dtype, "runtime": runtime, "activations": activations,
            "bytes": size, "floor_ms": 1e3 * size / bandwidth,
            "plain": decoding(found["baseline"]), "drafted": decoding(found["drafters"][0]),
        }  # fmt: skip
        print(row)
        results["runs"].append(row)
        record.write(RESULTS / f"{given.name}.json", results)

    for dtype in given.dtypes:
        run(wide, "none", dtype, "dense", "exact")
    for method in given.methods:
        packed, (verb, *_) = out / method, method.split("-")
        spectool("quantize", verb, wide, packed, *METHODS[method])
        for dtype in given.dtypes:
            for runtime, activations in WAYS:
                run(packed, method, dtype, runtime, activations)
        shutil.rmtree(packed)


if __name__ == "__main__":
    main()
