"""Measure distillation into an encoder-decoder, and decoding that copies the source.

    python benchmarks/cross.py --shared FOLDER [--out DIR] [--steps N] [--mend-steps N]
        [--only stories mend]

FOLDER holds `models/codestory-10M`, the teacher, and `data` (see their README). `stories`: two
trainings of one student for equally many steps on the same stories, which the teacher has not read,
cut in two: with the teacher's probabilities (alpha 0.9) and without (alpha 0). `mend`: generated
sentences of few words, some of whose verbs lack their ending; a student learns to mend them from
the data alone, since the teacher does not know the task. Tokens per forward of its drafters are
greedy, in float32, and their output must equal plain decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from main_job import RESULTS, spectool

from distill import read_curve
from spectool.data.text import read_rows
from spectool.decode.generate import Runner
from spectool.machine import describe

NAME = "cross-2-core-cpu"
STUDENT = ("--width", 128, "--encoder-layers", 3, "--decoder-layers", 1)
MENDER = ("--width", 128, "--encoder-layers", 2, "--decoder-layers", 1)
DRAFTS = ("copy", "ngram", "trigram+recycle")
ANIMALS = ["cat", "dog", "bird", "fish", "fox", "frog", "bear", "duck", "cow", "pig"]
VERBS = ["see", "find", "like", "help", "call", "follow", "meet", "draw"]
KINDS = ["big", "small", "red", "blue", "old", "young", "happy", "sad"]
PLACES = ["home", "park", "river", "hill", "house", "garden", "tree", "road"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/cross"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mend-steps", type=int, default=700)
    parser.add_argument(
        "--only", nargs="+", choices=("stories", "mend"), default=["stories", "mend"]
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    parts = {"stories": compare_losses, "mend": mend}
    for name in given.only:
        found = {"machine": describe(), **parts[name](given)}
        file = RESULTS / f"{NAME}.json"
        # Read late: the two parts may run at the same time.
        report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        report |= {"benchmark": "cross", "teacher": "codestory-10M", name: found}
        record.write(file, report)


def train(given: argparse.Namespace, name: str, data: Path, *options: object) -> dict[str, Any]:
    """Train a student; return what the command reports, with its curve."""
    found = spectool(
        "distill", "cross", given.shared / "models/codestory-10M", given.out / name, "--data", data,
        *options, "--metrics", given.out / f"{name}-metrics.jsonl", "--overwrite",
    )  # fmt: skip
    found["curve"] = read_curve(given.out / f"{name}-metrics.jsonl")
    for text in found.get("read", ()):
        # Paths are the machine's own.
        text.pop("source", None)
    found.pop("out", None)
    return found


def compare_losses(given: argparse.Namespace) -> dict[str, Any]:
    """Train with a teacher and without, on equal batches."""
    data = given.out / "stories.jsonl"
    stories = read_rows(str(given.shared / "data/text/tinystories_valid.txt.gz"))
    text = "\n\n".join(row.text or "" for row in stories)
    pieces = re.split(r"(?=Once upon a time)", text)
    rows = [json.dumps({"text": piece.strip()}) + "\n" for piece in pieces if len(piece) > 200]
    data.write_text("".join(rows))
    options = (
        *STUDENT, "--steps", given.steps, "--seq-len", 192, "--batch-tokens", 1024,
        "--held-out", 24, "--learning-rate", "2e-3",
    )  # fmt: skip
    return {
        "stories": len(rows),
        "steps": given.steps,
        **{
            f"alpha {alpha}": train(given, f"alpha-{alpha}", data, *options, "--alpha", alpha)
            for alpha in (0.9, 0)
        },
    }


def sentences(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield texts some of whose verbs lack their ending, and the same texts mended.

    A text has no word twice: what follows a word can be copied without knowing where it stands.
    """
    noise = random.Random(seed)
    for _ in range(count):
        size = noise.randint(2, 3)
        kinds, animals = noise.sample(KINDS, 2 * size), noise.sample(ANIMALS, 2 * size)
        verbs, places = noise.sample(VERBS, size), noise.sample(PLACES, size)
        wrong, right = [], []
        for at in range(size):
            before, after = [kinds[2 * at], animals[2 * at]], [kinds[2 * at + 1]]
            after += [animals[2 * at + 1], places[at]]
            mended = f"{verbs[at]}s"
            right += [*before, mended, *after]
            wrong += [*before, verbs[at] if noise.random() < 0.3 else mended, *after]
        yield " ".join(wrong) + " .", " ".join(right) + " ."


def mend(given: argparse.Namespace) -> dict[str, Any]:
    """Train a student to mend sentences, and decode unseen ones with every drafter."""
    data = given.out / "mend.jsonl"
    pairs = [{"prompt": f"{a}\n", "completion": b} for a, b in sentences(8000, 0)]
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    trained = train(
        given, "mend", data, *MENDER, "--alpha", 0, "--steps", given.mend_steps, "--seq-len", 160,
        "--batch-tokens", 1024, "--held-out", 16, "--learning-rate", "2e-3",
    )  # fmt: skip
    unseen = list(sentences(40, 1))
    runner = Runner(given.out / "mend", dtype="float32")
    decoded: dict[str, Any] = {}
    plain = []
    for draft in ("none", *DRAFTS):
        runner.use(draft)
        results = runner.generate([f"{a}\n" for a, _ in unseen], max_new_tokens=96)
        plain = plain or results
        tokens = sum(len(each.token_ids) for each in results)
        pairs_of = zip(results, plain, strict=True)
        decoded[draft] = {
            "tokens_per_forward": tokens / sum(each.forwards for each in results),
            "identical": sum(a.token_ids == b.token_ids for a, b in pairs_of),
            "of": len(results),
        }
        print(draft, decoded[draft], flush=True)
    right = sum(r.text.strip() == b for r, (_, b) in zip(plain, unseen, strict=True))
    return {"steps": given.mend_steps, "training": trained, "mended": right, "drafts": decoded}


if __name__ == "__main__":
    main()
