"""Quantize a real checkpoint, train draft heads for both versions, measure all combinations.

    python benchmarks/main_job.py --shared FOLDER [--out DIR] [--steps N]

FOLDER holds `models/codestory-10M` and `data` (see their README). Runs the commands a user would,
each in its own process, and stores their JSON under results/. Heads are trained on the original and
on the quantized checkpoint, and once for no steps; in float32 the greedy output with each of them
must equal plain decoding on both. Evaluation data was not trained on.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

from spectool.examples.stdlib import read_documents

RESULTS = Path(__file__).parent / "results"


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a compressed JSON-lines file."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}[path.suffix]
    with opener(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def chat(row: dict[str, Any]) -> list[dict[str, str]]:
    """Make a conversation of a question and its answer."""
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def write_texts(data: Path, out: Path) -> dict[str, Path]:
    """Write training text of the kinds that the checkpoint was trained on, and held-out text."""
    train: list[dict[str, Any]] = [
        {"messages": chat(row)}
        for row in itertools.islice(rows(data / "prompts/gsm8k_train.jsonl.gz"), 1200)
    ]
    code = [document for document in read_documents() if not document.held_out]
    train += [{"text": document.text[:20_000]} for document in code[::8]]
    stories = rows(data / "text/tinystories_train.jsonl.gz")
    train += [{"text": row["text"]} for row in itertools.islice(stories, 800)]

    valid = gzip.decompress((data / "text/tinystories_valid.txt.gz").read_bytes()).decode()
    paragraphs = [part for part in valid.split("\n\n") if len(part) > 200]
    problems = list(rows(data / "prompts/humaneval.jsonl.gz"))
    questions = list(itertools.islice(rows(data / "prompts/gsm8k_test.jsonl.gz"), 400))
    prompts: list[dict[str, Any]] = [
        {"prompt": " ".join(part.split()[:30])} for part in paragraphs[:200:40]
    ]
    prompts += [{"prompt": problem["prompt"]} for problem in problems[::32][:5]]
    prompts += [{"messages": chat(row)[:1]} for row in questions[:200:40]]
    book = next(rows(data / "text/books_heldout.jsonl.xz"))["text"]

    files = {
        "train": "".join(json.dumps(row) + "\n" for row in train),
        "prompts": "".join(json.dumps(row) + "\n" for row in prompts),
        "stories": "\n".join(valid.split("\n\n"))[:100_000],
        "arithmetic": "".join(json.dumps({"messages": chat(row)}) + "\n" for row in questions),
        "book": book[:100_000],
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, text in files.items():
        kind = "jsonl" if name in ("train", "prompts", "arithmetic") else "txt"
        paths[name] = out / f"{name}.{kind}"
        paths[name].write_text(text, encoding="utf-8")
    return paths


def spectool(*words: object) -> dict[str, Any]:
    """Run a spectool command on the CPU, let its stderr through, and return its JSON result."""
    command = [sys.executable, "-m", "spectool", *map(str, words), "--json"]
    print("$ spectool", *map(str, words), file=sys.stderr, flush=True)
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/main-job"))
    parser.add_argument("--steps", type=int, default=250)
    given = parser.parse_args()
    model, out = given.shared / "models/codestory-10M", given.out
    texts = write_texts(given.shared / "data", out)
    packed = out / "packed"
    results: dict[str, Any] = {"model": model.name}
    results["quantize"] = spectool(
        "quantize", "ptq161", model, packed, "--calibration", texts["train"], "--seq-len", 256,
        "--samples", 64, "--epochs", 10, "--overwrite",
    )  # fmt: skip
    results["eval"] = {
        name: spectool("eval", packed, "--reference", model, "--text", texts[name], "--bos",
                       "--window", 512, "--dtype", "float32")
        for name in ("stories", "arithmetic", "book")
    }  # fmt: skip
    for name, target, steps in (
        ("untrained", model, 0), ("of-original", model, given.steps),
        ("of-packed", packed, given.steps),
    ):  # fmt: skip
        results[name] = spectool(
            "train-heads", "medusa", target, out / name, "--data", texts["train"], "--steps", steps,
            "--seq-len", 512, "--batch-tokens", 2048, "--learning-rate", 3e-3, "--overwrite",
        )  # fmt: skip
    drafts = [word for name in ("untrained", "of-original", "of-packed")
              for word in ("--draft", out / name)]  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        results[dtype] = spectool(
            "bench", packed, "--reference", model, "--prompts", texts["prompts"], "--draft",
            "ngram", *drafts, "--dtype", dtype, "--max-new-tokens", 96,
        )  # fmt: skip
    for run in (results["quantize"], *(results[name] for name in ("untrained", "of-original",
                                                              "of-packed"))):  # fmt: skip
        run["out"] = Path(run["out"]).name
    text = record.to_text(results).replace(f"{out}/", "").replace(f"{model.parent}/", "")
    (RESULTS / "main-job-2-core-cpu.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
