"""Measure lexical unit distillation: steps per token against perplexity, before and after.

    python benchmarks/lexical_units.py --shared FOLDER [--out DIR] [--steps N] [--only MODEL …]

FOLDER holds `models` and `data` (see their README). Each checkpoint is trained on text of its own
kinds and decodes held-out prompts with `units`, before and after: verified, and with guesses taken
untested above each beta. Texts are greedy, in float32, and as long as the plain text of the same
weights until that begins to repeat itself. A step is a pass of the model, the prompt's included.
The perplexity of a text is that of its new tokens under the checkpoint before training: it says
what guesses taken untested are worth. Intervals are by resampling the prompts (2.5 to 97.5 %).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from heads import metrics, open_prompts
from main_job import RESULTS, rows, spectool, write_texts

from decode import write_prompts
from distill import read_curve, share
from spectool.decode.generate import Runner
from spectool.decode.result import Result
from spectool.machine import describe

BETAS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint and how it is trained; `alpha` fits how sure it is of its texts."""

    model: str
    alpha: float
    learning_rate: float


CASES = (Case("codestory-10M", 0.3, 3e-4), Case("babyllama-char-a", 0.9, 3e-4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/lexical-units"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--each", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=[case.model for case in CASES])
    parser.add_argument("--name", default="lexical-units-2-core-cpu")
    given = parser.parse_args()
    kept = RESULTS / f"{given.name}.json"
    report: dict[str, Any] = {"benchmark": "lexical_units", "steps": given.steps}
    if given.only and kept.exists():
        report = json.loads(kept.read_text(encoding="utf-8"))
    report["machine"] = describe()
    for case in CASES:
        if not given.only or case.model in given.only:
            report[case.model] = measure(case, given)
            record.write(kept, report)


def measure(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """Train a checkpoint and decode with it before and after."""
    model, out = given.shared / "models" / case.model, given.out / case.model
    data = write_data(case, given.shared / "data", out, given.each)
    trained = spectool(
        "distill", "lexical-units", model, out / "tuned", "--data", data, "--seq-len", 256,
        "--steps", given.steps, "--held-out", 16, "--alpha", case.alpha, "--loss-limit", 9,
        "--learning-rate", case.learning_rate, "--metrics", out / "metrics.jsonl", "--overwrite",
    )  # fmt: skip
    original = Runner(model, dtype=torch.float32)
    entry = {
        "alpha": case.alpha,
        "learning_rate": case.learning_rate,
        "draft": trained["draft"],
        "seconds": trained["seconds"],
        "initial": trained["initial"],
        "best": trained["best"],
        "curve": read_curve(out / "metrics.jsonl"),
    }
    for name, path in (("original", model), ("tuned", out / "tuned")):
        entry[name] = decode_all(path, out, trained["draft"], original)
    return entry


def write_data(case: Case, data: Path, out: Path, each: int) -> Path:
    """Write the training text and the held-out prompts of a checkpoint's kinds."""
    if case.model == "codestory-10M":
        texts = write_texts(data, out)
        write_prompts(data, out / "prompts.jsonl", each)
        return texts["train"]
    out.mkdir(parents=True, exist_ok=True)
    stories = itertools.islice(rows(data / "text/tinystories_train.jsonl.gz"), 3000)
    lines = [json.dumps({"text": row["text"]}) + "\n" for row in stories]
    (out / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    valid = gzip.decompress((data / "text/tinystories_valid.txt.gz").read_bytes()).decode()
    parts = [part for part in valid.split("\n\n") if len(part) > 300][7::11][: 4 * each]
    prompts = [{"category": "stories", "prompt": " ".join(p.split()[:12])} for p in parts]
    lines = [json.dumps(row) + "\n" for row in prompts]
    (out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return out / "train.jsonl"


def decode_all(path: Path, out: Path, draft: str, original: Runner) -> dict[str, Any]:
    """Decode the prompts plainly, verified, and with each beta."""
    runner, _, categories, jobs, plain = open_prompts(path, out)
    prompts, limits = [prompt for prompt, _ in jobs], [limit for _, limit in jobs]
    found: dict[str, Any] = {}
    for name in ("plain", "verified", *BETAS):
        own = {"plain": None, "verified": draft}.get(str(name), f"{draft},beta={name}")
        runner.use(own)
        results = runner.generate(
            prompts, max_new_tokens=limits, batch_size=6, lossy=isinstance(name, float)
        )
        rates = metrics(results, categories)
        steps = 1 / rates["all"]["mean"]
        entry = {
            "steps_per_token": steps,
            "text_perplexity": perplexity(original, prompts, results),
            "same": share(results, plain),
            "tokens_per_forward": rates,
        }
        found[str(name)] = entry
        print(path.name, name, {**entry, "tokens_per_forward": rates["all"]}, flush=True)
    return found


@torch.inference_mode()
def perplexity(runner: Runner, prompts: Sequence[str], results: Sequence[Result]) -> float:
    """Compute the perplexity of the results' tokens after their prompts."""
    nats, count = 0.0, 0
    for prompt, result in zip(prompts, results, strict=True):
        given = runner.make_request(prompt).tokens
        ids = torch.tensor([[*given, *result.token_ids]])
        logp_LV = runner.target.model(ids).logits[0, len(given) - 1 : -1].log_softmax(-1)
        nats -= float(logp_LV.gather(-1, ids[0, len(given) :, None]).sum())
        count += len(result.token_ids)
    return math.exp(nats / count)


if __name__ == "__main__":
    main()
