"""Benchmark training-free drafters on a real checkpoint, and at the cost of a 400 M model.

    python benchmarks/decode.py --shared FOLDER [--out DIR] [--dtype T ...] [--name NAME]

FOLDER holds `models/codestory-10M` and `data` (see their README). Prompts are code, stories, prose
and arithmetic that the checkpoint was not trained on. First every drafter runs on the checkpoint
itself in float32, where greedy output must equal plain decoding. Then speed is measured on its
widened copy (`widened.py`), which computes the same function: greedy and at temperature 0.8, with
tuned and with fixed trees, against transformers' `generate`, plain and with prompt lookup. The copy
has the cost of a 400 M model, but not its quality.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import record
import torch
from loop_overhead import read_seconds
from main_job import RESULTS, chat, rows, spectool
from widened import widen

from spectool.kernels import registry

WIDTHS = {"hidden": 2048, "intermediate": 5888, "heads": 64}
EXACT = ("ngram", "recycle", "trigram", "ngram+recycle", "jacobi", "skip", "ngram+recycle:tune")
FAST = (
    "ngram:tune", "recycle:tune", "trigram:tune", "ngram+recycle:tune", "trigram+recycle:tune",
    "recycle:nodes=6", "jacobi:tune", "skip:tune",
)  # fmt: skip


def write_prompts(data: Path, path: Path, each: int) -> None:
    """Write `each` held-out prompts of every category."""
    valid = gzip.decompress((data / "text/tinystories_valid.txt.gz").read_bytes()).decode()
    stories = [part for part in valid.split("\n\n") if len(part) > 300][7::11][:each]
    problems = list(rows(data / "prompts/humaneval.jsonl.gz"))[3 :: max(1, 160 // each)]
    questions = itertools.islice(rows(data / "prompts/gsm8k_test.jsonl.gz"), 500, 500 + each)
    books = list(rows(data / "text/books_heldout.jsonl.xz"))
    prose = [
        " ".join(books[i % len(books)]["text"].split()[1000 + 40 * i : 1040 + 40 * i])
        for i in range(each)
    ]
    made: list[dict[str, Any]] = []
    made += [{"category": "code", "prompt": row["prompt"]} for row in problems[:each]]
    made += [{"category": "stories", "prompt": " ".join(t.split()[:30])} for t in stories]
    made += [{"category": "prose", "prompt": text} for text in prose]
    made += [{"category": "arithmetic", "messages": chat(row)[:1]} for row in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/decode"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--name", default="decode-2-core-cpu")
    given = parser.parse_args()
    model, out = given.shared / "models/codestory-10M", given.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_prompts(given.shared / "data", out / "prompts.jsonl", given.each)
    common = ("--prompts", out / "prompts.jsonl", "--max-new-tokens", given.max_new_tokens)

    def drafts(names: tuple[str, ...]) -> list[str]:
        return [word for name in names for word in ("--draft", name)]

    def save() -> None:
        text = record.to_text(results).replace(f"{out}/", "").replace(f"{model.parent}/", "")
        (RESULTS / f"{given.name}.json").write_text(text + "\n", encoding="utf-8")

    kernel = str(registry.choose("dense", "cpu", torch.float32))
    results: dict[str, Any] = {"model": model.name, "kernel": kernel}
    results["exact"] = spectool("bench", model, *common, "--dtype", "float32", *drafts(EXACT))
    for dtype in given.dtype:
        copy = out / f"widened-{dtype}"
        parameters = widen(model, copy, **WIDTHS, dtype=dtype)
        size = parameters * getattr(torch, dtype).itemsize
        run = {"parameters": parameters, "floor_ms_per_token": 1e3 * read_seconds(size)}
        for temperature in (0.0, 0.8):
            run[f"temperature {temperature}"] = spectool(
                "bench", copy, *common, "--dtype", dtype, "--temperature", temperature,
                "--baselines", "--plot", out / f"{dtype}-{temperature}.png", *drafts(FAST),
            )  # fmt: skip
            results[f"widened {dtype}"] = run
            save()
        shutil.rmtree(copy)


if __name__ == "__main__":
    main()
