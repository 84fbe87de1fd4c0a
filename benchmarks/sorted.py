"""Measure a draft with exits: each exit trained and untrained, and the exit rule by its cost.

    python benchmarks/sorted.py --shared FOLDER [--out DIR] [--steps N] [--each N] [--loss NAME ...]

FOLDER holds `models/codestory-10M` and `data` (see their README). The first four of its eight
layers train with exits after 1, 2 and 4 of them, on the model's own probabilities (kl) or on the
tokens of the text (ce), on text of the kinds that the checkpoint was trained on. The same layers
untrained are the baseline. Held-out figures of each exit are those of the training. Then each draft
decodes held-out prompts of code, stories, prose and arithmetic, cut where plain greedy text begins
to repeat itself: with each exit alone, with the calibrated thresholds, with the paper's, and with
others. Output must equal plain decoding. Costs are counted, not timed: a forward of the target is
1, and passes of the draft's layers are their share of the target's layers (`layers`), or of the
weights of layers and lm_head, which every exit that is asked reads (`weights`). Intervals are by
resampling the prompts (2.5 to 97.5 %); rules and the best single exit are paired by prompt.
Trainings that DIR has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from heads import open_prompts
from main_job import RESULTS, spectool, write_texts

from decode import write_prompts
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.result import Result
from spectool.distill.objectives.sorted import Costs, Sorted
from spectool.machine import describe
from spectool.model.loading import load_model

EXITS = "1,2,4"
RULES = {
    "1": "0/0/0",
    "2": "1/0/0",
    "4": "1/1/0",
    "calibrated": "auto",
    "paper's": ".5/.5/0",
    "0.8": ".8/.8/0",
    "0.2, else 2": ".2/0/0",
    "0.1, else 2": ".1/0/0",
}
SINGLE = ("1", "2", "4")
# The first one for every draft, the others for the first.
DEPTHS = (4, 2, 8)
TRAINING = ("--seq-len", 256, "--held-out", 24, "--exits", EXITS)


@dataclass(frozen=True, slots=True)
class Text:
    """A decoded prompt: new tokens, forwards of the target, and the draft's passes by exit."""

    tokens: int
    forwards: int
    passes: dict[int, int]

    def cost(self, costs: Costs) -> float:
        """Return the cost in forwards of the target."""
        return self.forwards + costs.of_passes(self.passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/sorted"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--each", type=int, default=6)
    parser.add_argument("--loss", nargs="+", choices=("kl", "ce"), default=["kl", "ce"])
    parser.add_argument("--name", default="sorted-2-core-cpu")
    given = parser.parse_args()
    model, out = given.shared / "models/codestory-10M", given.out
    out.mkdir(parents=True, exist_ok=True)
    texts = write_texts(given.shared / "data", out)
    write_prompts(given.shared / "data", out / "prompts.jsonl", given.each)
    names = ("steps", "batch_tokens", "learning_rate")
    report: dict[str, Any] = {
        "benchmark": "sorted",
        "machine": describe(),
        "model": model.name,
        "exits": EXITS,
        **{name: getattr(given, name) for name in names},
    }
    for loss in given.loss:
        report[loss] = {
            "training": train(given, model, texts["train"], loss),
            "curve": read_curve(out / f"{loss}.jsonl"),
        }
        record.write(RESULTS / f"{given.name}.json", report)
    runner, _, _, jobs, plain = open_prompts(model, out)
    report["prompts"], report["new_tokens"] = len(jobs), sum(len(r.token_ids) for r in plain)
    cut, _ = Sorted.choose_student(open_checkpoint(model), Sorted.Config(exits=EXITS))
    report["untrained"] = {}
    for name in (*given.loss, "untrained"):
        checkpoint = cut if name == "untrained" else open_checkpoint(out / name)
        draft = load_model(checkpoint, dtype=torch.float32)
        rules = SINGLE if name == "untrained" else tuple(RULES)
        for depth in DEPTHS if name == given.loss[0] else DEPTHS[:1]:
            report[name][f"depth {depth}"] = compare(runner, draft, (depth, rules), jobs, plain)
            print(name, depth, report[name][f"depth {depth}"], flush=True)
            record.write(RESULTS / f"{given.name}.json", report)


def train(given: Any, model: Path, text: Path, loss: str) -> dict[str, Any]:
    """Train a draft, unless the folder has it already; return what the command printed."""
    path = given.out / f"{loss}.json"
    if not path.exists():
        printed = spectool(
            "distill", "sorted", model, given.out / loss, "--data", text, *TRAINING, "--loss", loss,
            "--steps", given.steps, "--batch-tokens", given.batch_tokens,
            "--learning-rate", given.learning_rate, "--metrics", given.out / f"{loss}.jsonl",
        )  # fmt: skip
        for text_read in printed["read"]:
            # Paths are the machine's own.
            del text_read["source"]
        path.write_text(json.dumps({**printed, "out": loss}), encoding="utf-8")
    trained: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trained


def read_curve(metrics: Path) -> list[dict[str, Any]]:
    """Read the held-out metrics of a training, a line an evaluation."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()[1:]]
    return [{"step": line["step"], **line["held_out"]} for line in lines if "held_out" in line]


def compare(
    runner: Runner, draft: Any, how: tuple[int, Sequence[str]], jobs: Any, plain: Sequence[Result]
) -> dict[str, Any]:
    """Decode the prompts with chains of a depth and each of some rules; return figures by rule."""
    depth, rules = how
    figures: dict[str, Any] = {}
    decoded: dict[str, list[Text]] = {}
    for name in rules:
        config = DraftModelDrafter.Config(exits=RULES[name], depth=depth)
        decoded[name], same = decode(runner, draft, config, jobs, plain)
        figures[name] = {"identical": same, "of": len(jobs), **describe_texts(decoded[name])}
        if name == "calibrated":
            figures[name]["exits"] = draft.config.exits
    for unit, costs in count_costs(runner, draft).items():
        best = max(
            (name for name in SINGLE if name in rules), key=lambda name: rate(decoded[name], costs)
        )
        chosen: dict[str, Any] = {"best single exit": best}
        for name, texts in decoded.items():
            chosen[name] = interval(texts, lambda some, costs=costs: rate(some, costs))
        for rule in [name for name in rules if name not in SINGLE]:
            pairs = list(zip(decoded[rule], decoded[best], strict=True))
            chosen[f"{rule} / best single"] = interval(
                pairs,
                lambda some, costs=costs: (
                    rate([a for a, _ in some], costs) / rate([b for _, b in some], costs)
                ),
            )
        figures[f"tokens per cost, {unit}"] = chosen
    return figures


def decode(
    runner: Runner, draft: Any, config: Any, jobs: Any, plain: Sequence[Result]
) -> tuple[list[Text], int]:
    """Decode each prompt alone; return what each took, and how many texts are plain decoding's."""
    drafter = DraftModelDrafter(draft, config, target=runner.target)
    model: Any = drafter.draft_model
    runner.use(drafter)
    texts, same = [], 0
    for (prompt, limit), expected in zip(jobs, plain, strict=True):
        before = list(model.row_passes)
        (result,) = runner.generate([prompt], max_new_tokens=limit)
        same += result.token_ids == expected.token_ids
        counts = [now - then for now, then in zip(model.row_passes, before, strict=True)]
        layers = [exit.layer for exit in model.exits]
        passes = dict(zip(layers, counts, strict=True))
        texts.append(Text(len(result.token_ids), result.forwards, passes))
    return texts, same


def count_costs(runner: Runner, draft: Any) -> dict[str, Costs]:
    """Return the costs of passes in layers, and in weights of layers and lm_head."""
    target = runner.target
    exits = draft.config.exits["layers"]
    layer = sum(p.numel() for p in target.layers()[0].parameters())
    head = sum(p.numel() for p in target.model.get_output_embeddings().parameters())
    return {
        "layers": Costs({n: n for n in exits}, 0, target.num_layers),
        "weights": Costs({n: n * layer for n in exits}, head, target.num_layers * layer + head),
    }


def describe_texts(texts: Sequence[Text]) -> dict[str, Any]:
    """Return tokens per forward and the draft's passes by exit, of all texts."""
    exits = list(texts[0].passes)
    return {
        "tokens_per_forward": interval(texts, lambda some: rate(some, None)),
        "forwards": sum(text.forwards for text in texts),
        "passes": {str(n): sum(text.passes[n] for text in texts) for n in exits},
    }


def rate(texts: Sequence[Text], costs: Costs | None) -> float:
    """Compute tokens per cost, or per forward of the target."""
    return sum(text.tokens for text in texts) / sum(
        text.forwards if costs is None else text.cost(costs) for text in texts
    )


def interval(items: Sequence[Any], figure: Any) -> dict[str, float]:
    """Return a figure of some items, and its interval by resampling them."""
    rng = random.Random(0)
    drawn = sorted(figure(rng.choices(items, k=len(items))) for _ in range(2000))
    return {"mean": figure(items), "low": drawn[50], "high": drawn[1949]}


if __name__ == "__main__":
    main()
