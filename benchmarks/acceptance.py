"""Measure an acceptance head: chains of fixed lengths against chains that the head ends.

    python benchmarks/acceptance.py --shared FOLDER [--out DIR] [--draft DIR] [--steps N]
        [--prompts N] [--tokens N] [--temperatures T ...] [--name NAME]

The target is `codestory-10M` of FOLDER/models (see its README), of 8 layers. Without --draft its
draft model is made of its first two, by 160 steps of `distill logits` on FOLDER's training stories
in DIR. For each temperature a head is trained on the same stories. Then beginnings of held-out
stories are continued, one at a time, with chains of 1 to 8 tokens and with chains of at
most 16 tokens that the head ends at several thresholds. Greedy texts are cut where plain decoding
begins to repeat itself, and must equal plain decoding.

The unit of cost is a pass of the target that verifies a draft. A draft model's pass and a call of
the head cost what they took, divided by what such a pass took: medians over this run, in which all
settings take turns prompt by prompt. Intervals resample the prompts (2.5 to 97.5 %).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from main_job import RESULTS, spectool
from safetensors.torch import load_file, save_file

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.result import loop_start
from spectool.machine import describe

LENGTHS = range(1, 9)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST = 16
TEXTS = 3000
# Layers of the draft model.
LAYERS = 2


class Clock:
    """Counts and seconds of the calls of a module."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def watch(self, module: torch.nn.Module) -> None:
        """Time every call of a module."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/acceptance"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--name", default="acceptance-2-core-cpu")
    given = parser.parse_args()
    target = given.shared / "models/codestory-10M"
    given.out.mkdir(parents=True, exist_ok=True)
    text = given.out / "stories.jsonl"
    text.write_text("".join(read_stories(given.shared, TEXTS)), "utf-8")
    draft = given.draft or make_draft(target, text, given.out)
    report: dict[str, Any] = {
        "target": target.name,
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "options": {key: getattr(given, key) for key in ("steps", "prompts", "tokens")},
    }
    for temperature in given.temperatures:
        head = given.out / f"{given.name}-{temperature}"
        trained = spectool(
            "train-heads", "acceptance", target, head, "--draft-model", draft, "--data", text,
            "--temperature", temperature, "--steps", given.steps, "--batch-tokens", 1024,
            "--seq-len", 256, "--held-out", 32, "--learning-rate", "3e-3", "--dtype", "float32",
            "--overwrite",
        )  # fmt: skip
        measured = measure(target, draft, head, given, temperature)
        training = {key: trained[key] for key in ("parameters", "seconds", "initial", "best")}
        report[f"temperature {temperature:g}"] = {"training": training, **measured}
        record.write(RESULTS / f"{given.name}.json", report)
        print(json.dumps(measured["best"]), flush=True)


def make_draft(target: Path, text: Path, out: Path) -> Path:
    """Make a draft model of the target's first layers, and let it learn the target's probabilities.

    Returns its directory.
    """
    first, draft = out / "first-layers", out / "draft"
    shutil.copytree(target, first, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    layers = tuple(f"model.layers.{layer}." for layer in range(LAYERS))
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or name.startswith(layers)
    }
    save_file(kept, first / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = LAYERS
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    (first / "config.json").write_text(json.dumps(config))
    spectool(
        "distill", "logits", first, draft, "--teacher", target, "--data", text, "--steps", 160,
        "--batch-tokens", 2048, "--seq-len", 256, "--learning-rate", "1e-3", "--held-out", 8,
        "--overwrite",
    )  # fmt: skip
    return draft


def read_stories(shared: Path, count: int) -> list[str]:
    """Return the first training stories, a line of JSON each."""
    with gzip.open(shared / "data/text/tinystories_train.jsonl.gz", "rt") as file:
        return [line for line, _ in zip(file, range(count), strict=False)]


def read_prompts(shared: Path, count: int, runner: Runner) -> list[list[int]]:
    """Return the beginnings of held-out stories, about 60 characters each."""
    with gzip.open(shared / "data/text/tinystories_valid.txt.gz", "rt") as file:
        parts = [part.strip() for part in file.read(400_000).split("\n\n")]
    chosen = [part for part in parts if len(part) > 200 and part.startswith("Once upon a time")]
    assert runner.tokenizer is not None and len(chosen) >= count
    return [runner.tokenizer(each[:60])["input_ids"] for each in chosen[:count]]


def measure(
    target: Path, draft: Path, head: Path, given: Any, temperature: float
) -> dict[str, Any]:
    """Decode the prompts with all settings in turns; return their figures."""
    runner = Runner(target, dtype=torch.float32)
    prompts = read_prompts(given.shared, given.prompts, runner)
    plain = runner.generate(prompts, max_new_tokens=given.tokens, temperature=temperature)
    limits = [max(8, loop_start(result.token_ids)) for result in plain]
    settings = {f"depth={length}": "" for length in LENGTHS}
    pair = f"acceptance={head},depth={LONGEST}"
    settings |= {f"threshold={h:g}": pair for h in THRESHOLDS}
    drafters: dict[str, DraftModelDrafter] = {}
    clocks = {name: Clock() for name in ("target", "draft", "head")}
    clocks["target"].watch(runner.target.model)
    for name, options in settings.items():
        runner.use(f"{draft}:{','.join(filter(None, (options, name)))}")
        drafter: Any = runner.drafter
        drafters[name] = drafter
        clocks["draft"].watch(drafter.draft_model.model)
        if drafter.acceptance_head is not None:
            # `probs` calls it.
            clocks["head"].watch(drafter.acceptance_head)
    rows: dict[str, list[list[int]]] = {name: [] for name in settings}
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        for name in settings:
            runner.use(drafters[name])
            before = {key: len(clock.seconds) for key, clock in clocks.items()}
            (result,) = runner.generate(
                [prompt], max_new_tokens=limit, temperature=temperature, seed=number
            )
            assert temperature or result.token_ids == plain[number].token_ids[:limit], name
            calls = {key: len(clock.seconds) - before[key] for key, clock in clocks.items()}
            # The pass over the prompt is no step.
            calls["target"] -= 1
            rows[name].append([len(result.token_ids), result.accepted, result.drafted,
                               *calls.values()])  # fmt: skip
    seconds = {key: statistics.median(clock.seconds) for key, clock in clocks.items()}
    costs = [1.0, seconds["draft"] / seconds["target"], seconds["head"] / seconds["target"]]
    found = {name: summarize(each, costs) for name, each in rows.items()}
    best = {
        kind: max((n for n in found if n.startswith(kind)), key=lambda n: found[n]["rate"])
        for kind in ("depth", "threshold")
    }
    return {
        "cost": {"draft": costs[1], "head": costs[2], "target_ms": 1000 * seconds["target"]},
        "best": {
            **{kind: {"setting": name, "rate": found[name]["rate"]} for kind, name in best.items()},
            "threshold - depth": paired(rows[best["depth"]], rows[best["threshold"]], costs),
        },
        "settings": found,
    }


def rate(rows: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    """Compute tokens per unit of cost."""
    cost = sum(count * each for row in rows for count, each in zip(row[3:], costs, strict=True))
    return sum(row[0] for row in rows) / cost


def summarize(rows: Sequence[Sequence[int]], costs: Sequence[float]) -> dict[str, float]:
    """Compute the figures of one setting, with the interval of its rate."""
    tokens, accepted, drafted, target, draft, head = (
        sum(column) for column in zip(*rows, strict=True)
    )
    rng = random.Random(0)
    resampled = sorted(rate(rng.choices(rows, k=len(rows)), costs) for _ in range(2000))
    return {
        "rate": rate(rows, costs),
        "low": resampled[50],
        "high": resampled[1949],
        "tokens": tokens,
        "target_passes": target,
        "draft_passes": draft,
        "head_calls": head,
        "drafted": drafted,
        "accepted": accepted,
    }


def paired(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], costs: Sequence[float]
) -> dict[str, float]:
    """Compute the difference of two settings' rates, and its interval by resampling prompts."""

    def difference(chosen: Sequence[int]) -> float:
        return rate([after[i] for i in chosen], costs) - rate([before[i] for i in chosen], costs)

    rng, size = random.Random(0), len(before)
    drawn = sorted(difference(rng.choices(range(size), k=size)) for _ in range(2000))
    return {"mean": difference(range(size)), "low": drawn[50], "high": drawn[1949]}


if __name__ == "__main__":
    main()
