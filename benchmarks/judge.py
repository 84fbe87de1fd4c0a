"""Measure judge decoding on arithmetic: how many drafted tokens are accepted, at which accuracy.

    python benchmarks/judge.py --shared FOLDER [--out DIR] [--model NAME] [--steps N] [--layers N]
        [--draft DIR] [--draft-steps N] [--prompts N] [--test N] [--name NAME]

The task is the sum of two numbers of two digits. A reply names the sum of the ones, that of the
tens and the result, each in one of several wordings, so that two models often word it differently
and agree in the result. First NAME of FOLDER/models is tuned on replies to 6000 pairs of numbers;
its draft model is made of its first layers, by `distill logits` on the same replies, unless --draft
gives one. `train-heads judge` then labels replies to other pairs. The table is of pairs that
neither saw: plain decoding of both models, standard verification, and the judge at several
thresholds, among them the head's own. Chains have at most 8 tokens, decoding is greedy, in float32.

Intervals resample the test prompts (2.5 to 97.5 %); differences are paired by prompt, judge minus
standard verification. Passes and tokens are counted; nothing but the preparation is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from main_job import RESULTS, spectool
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectool.data.text import read_prompts
from spectool.decode.generate import Runner
from spectool.distill.data.samples import pad, read_samples
from spectool.machine import describe

ASKED = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "Compute {a} + {b}.",
)
# Parts of a reply, each in wordings of which one is drawn.
WORDINGS = (
    ("", "Sure. ", "Let us see. ", "Well. "),
    ("The ones make {o}", "Ones: {o}", "We have {o} ones", "First {o}"),
    (", the tens {t}. ", ", then {t}. ", " and {t} tens. "),
    ("The answer is {x}.", "So we get {x}.", "That makes {x}.", "Together it is {x}."),
)
PATTERN = r"(?:is|get|makes) ([\d ]+)\."
TUNED_PAIRS, REPEATS, SEQ_LEN, LONGEST, DEPTH = 6000, 2, 80, 48, 8
Pairs = Sequence[tuple[int, int]]


def make_rows(pairs: Pairs, rng: random.Random) -> list[dict[str, str]]:
    """Make a question, a worded reply and the result of each pair of numbers.

    Digits stand apart, since some tokenizers have a token for every number below 100.
    """
    rows = []
    for a, b in pairs:
        ones = a % 10 + b % 10
        numbers = {"a": a, "b": b, "o": ones, "t": a // 10 + b // 10 + ones // 10, "x": a + b}
        words = {name: " ".join(str(number)) for name, number in numbers.items()}
        rows.append(
            {
                "question": rng.choice(ASKED).format(**words),
                "reply": "".join(rng.choice(part) for part in WORDINGS).format(**words),
                "result": words["x"],
            }
        )
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, str]], key: str, end: str = "") -> Path:
    """Write questions, each with its `reply` or `result` as the answer, and the text's end."""
    kept = [{"question": row["question"], "answer": row[key] + end} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return path


def tune(source: Path, out: Path, text: Path, steps: int, rate: float) -> float:
    """Train all weights of a checkpoint on the replies, 32 a step; return the seconds."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    samples = read_samples([str(text)], AutoTokenizer.from_pretrained(source), seq_len=SEQ_LEN)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng, began = random.Random(0), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 40) * (1 - step / steps)
        tokens_BL, in_loss_BL = pad(rng.sample(samples, 32))
        logits_BLV = model(tokens_BL, use_cache=False).logits[:, :-1]
        wanted = in_loss_BL[:, 1:]
        loss = F.cross_entropy(logits_BLV[wanted], tokens_BL[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            took = time.monotonic() - began
            print(f"step {step + 1}: loss {loss.item():.3f}, {took:.0f} s", flush=True)
    shutil.copytree(source, out, dirs_exist_ok=True)
    model.save_pretrained(out)
    return time.monotonic() - began


def cut_layers(target: Path, out: Path, layers: int) -> Path:
    """Write a checkpoint of the first layers of another."""
    shutil.copytree(target, out, dirs_exist_ok=True)
    first = tuple(f"model.layers.{layer}." for layer in range(layers))
    kept = {
        name: tensor
        for name, tensor in load_file(target / "model.safetensors").items()
        if not name.startswith("model.layers.") or name.startswith(first)
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(config))
    return out


def prepare(given: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Tune the target and make its draft model, unless they are there; return both, and times."""
    source, target = given.shared / "models" / given.model, given.out / "target"
    pairs = list_pairs()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = make_rows([p for p in pairs[:TUNED_PAIRS] for _ in range(REPEATS)], random.Random(1))
    # A chat template ends a reply itself.
    end = "" if tokenizer.chat_template else tokenizer.eos_token
    text = write_rows(given.out / "replies.jsonl", rows, "reply", end)
    log = given.out / "prepared.json"
    seconds = json.loads(log.read_text()) if log.is_file() else {}
    if not target.is_dir():
        seconds["target"] = tune(source, target, text, given.steps, given.rate)
    draft = given.draft or given.out / "draft"
    if not draft.is_dir():
        first = cut_layers(target, given.out / "first-layers", given.layers)
        done = spectool(
            "distill", "logits", first, draft, "--teacher", target, "--data", text,
            "--steps", given.draft_steps, "--batch-tokens", 1024, "--seq-len", SEQ_LEN,
            "--learning-rate", "4e-3", "--held-out", 32,
        )  # fmt: skip
        seconds["draft"] = done["seconds"]
    log.write_text(json.dumps(seconds))
    return target, draft, seconds


def list_pairs() -> Pairs:
    """List all pairs of numbers of two digits in a random order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs


class Test:
    """Decoding of the test questions, and figures of each."""

    def __init__(self, target: Path, questions: Path) -> None:
        self.runner = Runner(target, dtype=torch.float32)
        self.prompts = read_prompts(str(questions), self.runner.tokenizer)

    def decode(self, draft: str | None, runner: Runner | None = None) -> list[list[int]]:
        """Return of each reply: right or not, tokens, passes after the prompt, tokens accepted."""
        runner = runner or self.runner
        runner.use(draft)
        results = runner.generate(
            [prompt.given for prompt in self.prompts],
            max_new_tokens=LONGEST,
            eos=[prompt.ends for prompt in self.prompts],
            batch_size=8,
            lossy=draft is not None and "judge=" in draft,
        )
        found = []
        for prompt, result in zip(self.prompts, results, strict=True):
            right = re.findall(PATTERN, result.text)[-1:] == [prompt.answer]
            found.append([int(right), len(result.token_ids), result.forwards - 1, result.accepted])
        return found


Figure = Callable[[Sequence[Sequence[int]]], float]
FIGURES: dict[str, Figure] = {
    "accuracy": lambda rows: sum(row[0] for row in rows) / len(rows),
    "accepted_length": lambda rows: sum(row[3] for row in rows) / sum(row[2] for row in rows),
    "tokens_per_forward": lambda rows: (
        sum(row[1] for row in rows) / sum(row[2] + 1 for row in rows)
    ),
}


def interval(value: Callable[[Sequence[int]], float], size: int) -> dict[str, float]:
    """Return a value of all prompts, and its interval by resampling them."""
    rng = random.Random(0)
    drawn = sorted(value(rng.choices(range(size), k=size)) for _ in range(2000))
    return {"value": value(range(size)), "low": drawn[50], "high": drawn[1949]}


def summarize(
    rows: Sequence[Sequence[int]], standard: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return every figure with its interval, and its difference to standard verification's."""
    found: dict[str, Any] = {"tokens": sum(row[1] for row in rows)}
    for name, figure in FIGURES.items():
        found[name] = interval(lambda at, f=figure: f([rows[i] for i in at]), len(rows))
        if standard is not None:
            found[f"{name} - standard"] = interval(
                lambda at, f=figure: f([rows[i] for i in at]) - f([standard[i] for i in at]),
                len(rows),
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/judge"))
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--draft-steps", type=int, default=1050)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--name", default="judge-2-core-cpu")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    target, draft, seconds = prepare(given)
    others = make_rows(list_pairs()[TUNED_PAIRS:], random.Random(2))
    asked, tested = others[: given.prompts], others[given.prompts : given.prompts + given.test]
    questions = write_rows(given.out / "questions.jsonl", asked, "result")
    head = given.out / "head"
    trained = spectool(
        "train-heads", "judge", target, head, "--draft-model", draft, "--data", questions,
        "--answer", PATTERN, "--max-new-tokens", LONGEST, "--dtype", "float32", "--overwrite",
    )  # fmt: skip
    test = Test(target, write_rows(given.out / "test.jsonl", tested, "result"))
    alone = {"target": test.decode(None), "draft model": test.decode(None, Runner(draft))}
    standard = test.decode(f"{draft}:depth={DEPTH}")
    # Several shares to catch may have one threshold.
    thresholds = sorted({0.0, 1.0, *(row["threshold"] for row in trained["curve"])})
    judged = {
        f"threshold {each:.6g}": test.decode(
            f"{draft}:depth={DEPTH},judge={head},judge_threshold={each}"
        )
        for each in thresholds
    }
    assert judged["threshold 0"] == standard
    report = {
        "target": given.model,
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "options": {key: getattr(given, key) for key in
                    ("steps", "rate", "layers", "draft_steps", "prompts", "test")},
        "preparation_seconds": seconds,
        "head": {key: trained[key] for key in
                 ("seconds", "threshold", "C", "auc", "substitutions", "curve")},
        "alone": {name: summarize(rows) for name, rows in alone.items()},
        "standard": summarize(standard),
        "judge": {name: summarize(rows, standard) for name, rows in judged.items()},
    }  # fmt: skip
    record.write(RESULTS / f"{given.name}.json", report)
    for name, found in {"standard": report["standard"], **report["judge"]}.items():
        shown = (f"{key} {found[key]['value']:.3f}" for key in FIGURES)
        print(name, ", ".join(shown), flush=True)


if __name__ == "__main__":
    main()
