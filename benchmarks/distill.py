"""Measure consistency distillation: passes of Jacobi decoding before and after equal trainings.

    python benchmarks/distill.py --shared FOLDER [--out DIR] [--steps N] [--prompts N] [--each N]
        [--anchor NAME] [--ar-weight W] [--learning-rate R] [--only VARIANT …] [--name NAME]

FOLDER holds `models/codestory-10M` and `data` (see their README). Both variants train all weights
for equally many steps on text of the kinds that the checkpoint was trained on, from the same
trajectories. Held-out prompts are code, stories, prose and arithmetic; texts are cut where
plain greedy decoding of the same weights begins to repeat itself. Tokens per forward are greedy, in
float32, with intervals by resampling the prompts (2.5 to 97.5 %); the difference of the variants is
paired by prompt. Greedy output must equal plain decoding of the same weights. An early exit
(`jacobi:cap`) is measured by its tokens per forward and by the share of tokens that stay the same.
`--loss-limit` is wide, to measure weights whose held-out perplexity rose by more than the 3 % at
which a training keeps the original ones. Weights between the original and the tuned ones show what
is left at a smaller rise.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from heads import decode, metrics, open_prompts, rate
from main_job import RESULTS, spectool, write_texts
from safetensors.torch import load_file, save_file

from decode import write_prompts
from spectool.decode.result import Result
from spectool.machine import describe

NODES = 32
DRAFTS = (
    "jacobi:window=16",
    "jacobi:window=32",
    f"trigram+recycle:nodes={NODES}",
    f"jacobi+recycle:nodes={NODES}",
    f"jacobi+trigram+recycle:nodes={NODES}",
)
CAPS = (1, 2, 3, 4, 6, 8, 16)
VARIANTS: dict[str, tuple[object, ...]] = {
    "cllm": ("--variant", "cllm"),
    "forcing": ("--variant", "forcing", "--window", 4),
}
TRAINING = ("--seq-len", 256, "--new-tokens", 128, "--block", 16, "--held-out", 24,
            "--points", 4, "--decay", 0.6, "--batch-tokens", 1536)  # fmt: skip
SHARES = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/distill"))
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--anchor", default="original")
    parser.add_argument("--ar-weight", default="5")
    parser.add_argument("--loss-limit", default="0.15")
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--name", default="distill-2-core-cpu")
    given = parser.parse_args()
    model, out = given.shared / "models/codestory-10M", given.out
    texts = write_texts(given.shared / "data", out)
    write_prompts(given.shared / "data", out / "prompts.jsonl", given.each)
    names = ("steps", "prompts", "learning_rate", "anchor", "ar_weight", "loss_limit")
    report: dict[str, Any] = {
        "benchmark": "distill",
        "machine": describe(),
        "model": model.name,
        **{name: getattr(given, name) for name in names},
    }
    results: dict[str, dict[str, list[Result]]] = {}
    for name in ("original", *given.only):
        path = model if name == "original" else out / name
        entry: dict[str, Any] = {}
        if name != "original":
            entry["training"] = spectool(
                "distill", "consistency", model, path, "--data", texts["train"], *TRAINING,
                *VARIANTS[name], "--prompts", given.prompts, "--steps", given.steps,
                "--learning-rate", given.learning_rate, "--anchor", given.anchor,
                "--ar-weight", given.ar_weight, "--loss-limit", given.loss_limit,
                "--trajectories", out / "trajectories", "--metrics", out / f"{name}.jsonl",
                "--overwrite",
            )  # fmt: skip
            entry["curve"] = read_curve(out / f"{name}.jsonl")
        entry["eval"] = {
            text: spectool(
                "eval", path, "--text", texts[text], "--dtype", "float32", "--window", 256,
                *(() if name == "original" else ("--reference", model)),
            )
            for text in ("stories", "arithmetic", "book")
        }  # fmt: skip
        for result in entry["eval"].values():
            # Paths are the machine's own.
            for text in result["read"]:
                del text["source"]
        entry["decoded"], results[name] = decode_all(path, out)
        if name != "original":
            entry["way back"] = walk_back(model, path, texts["stories"], out)
        report[name] = entry
        write(report, given.name, out)
    if set(VARIANTS) <= set(results):
        cllm, forcing = (results[name]["jacobi:window=16"] for name in VARIANTS)
        report["forcing - cllm"] = paired(cllm, forcing)
        write(report, given.name, out)


def write(report: dict[str, Any], name: str, out: Path) -> None:
    """Write the report without the machine's own paths."""
    text = record.to_text(report).replace(f"{out}/", "")
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def walk_back(model: Path, tuned: Path, text: Path, out: Path) -> list[dict[str, Any]]:
    """Measure weights between the original and the tuned ones, `share` of the way."""
    between = out / "between"
    before, after = (load_file(path / "model.safetensors") for path in (model, tuned))
    figures = []
    for part in SHARES:
        shutil.rmtree(between, ignore_errors=True)
        shutil.copytree(model, between, copy_function=shutil.copyfile)
        between.chmod(0o755)
        mixed = {
            name: torch.lerp(old.float(), after[name].float(), part).to(old.dtype)
            for name, old in before.items()
        }
        save_file(mixed, between / "model.safetensors", {"format": "pt"})
        measured = spectool("eval", between, "--text", text, "--dtype", "float32", "--window", 256)
        runner, _, _, jobs, _ = open_prompts(between, out)
        figures.append(
            {
                "share": part,
                "stories": measured["perplexity"]["value"],
                "tokens_per_forward": rate(decode(runner, DRAFTS[0], jobs, 0.0)),
            }
        )
        print(tuned.name, figures[-1], flush=True)
    return figures


def read_curve(metrics: Path) -> list[dict[str, Any]]:
    """Read the held-out metrics of a training, a line an evaluation."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[1:]]
    return [{"step": line["step"], **line["held_out"]} for line in lines if "held_out" in line]


def decode_all(path: Path, out: Path) -> tuple[dict[str, Any], dict[str, list[Result]]]:
    """Decode the prompts with every drafter; return figures, and the results by drafter."""
    runner, _, categories, jobs, plain = open_prompts(path, out)
    figures: dict[str, Any] = {}
    by_draft: dict[str, list[Result]] = {}
    for draft in DRAFTS:
        results = by_draft[draft] = decode(runner, draft, jobs, 0.0)
        same = [a.token_ids == b.token_ids for a, b in zip(results, plain, strict=True)]
        figures[draft] = {"identical": sum(same), "of": len(same), **metrics(results, categories)}
        print(path.name, draft, sum(same), figures[draft]["all"], flush=True)
    figures["early exit"] = []
    for cap in CAPS:
        runner.use(f"jacobi:window=16,cap={cap}")
        prompts, limits = [prompt for prompt, _ in jobs], [limit for _, limit in jobs]
        results = runner.generate(prompts, max_new_tokens=limits, lossy=True)
        figures["early exit"].append(
            {"cap": cap, "tokens_per_forward": rate(results), "same": share(results, plain)}
        )
    return figures, by_draft


def share(results: Sequence[Result], plain: Sequence[Result]) -> float:
    """Compute the share of positions whose token is that of plain decoding."""
    same = size = 0
    for result, other in zip(results, plain, strict=True):
        pairs = list(zip(result.token_ids, other.token_ids, strict=False))
        same += sum(a == b for a, b in pairs)
        size += len(pairs)
    return same / size


def paired(before: Sequence[Result], after: Sequence[Result]) -> dict[str, float]:
    """Compute the difference in tokens per forward, and its interval by resampling prompts."""

    def difference(chosen: Sequence[int]) -> float:
        return rate([after[i] for i in chosen]) - rate([before[i] for i in chosen])

    rng, size = random.Random(0), len(before)
    drawn = sorted(difference(rng.choices(range(size), k=size)) for _ in range(2000))
    return {"mean": difference(range(size)), "low": drawn[50], "high": drawn[1949]}


if __name__ == "__main__":
    main()
