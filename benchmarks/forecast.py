"""Check what `train-heads --dry-run` foretells against what comes.

    python benchmarks/forecast.py --shared FOLDER [--out DIR] [--only METHOD ...] [--name NAME]

The target is `stories260K` of FOLDER/models (see its README), the text its training stories. Heads
of each method train for each of BUDGETS steps with two seeds, in DIR. From these the acceptance
after each of LATER steps is foretold, and then heads train for so many with two other seeds. A
figure that comes lies inside its interval or not; both figures of a training come from one fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import record
import torch

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.heads.artifact import read_record
from spectool.distill.plan import HeadsJob
from spectool.distill.train_heads import prepare_heads, train_heads
from spectool.evaluate.forecast import Finished, Forecast, as_finished, forecast, read_finished
from spectool.machine import describe
from spectool.methods import import_method

RESULTS = Path(__file__).parent / "results"
BUDGETS = (20, 40, 80, 160)
LATER = (320,)
SEEDS, LATER_SEEDS = (0, 1), (2, 3)
METHODS = {"medusa": 3e-3}
STORIES = 1200


class Trial:
    """Trainings of one method's heads for one target."""

    def __init__(self, method: str, target: Path, data: Path, out: Path) -> None:
        self.method, self.out = method, out
        self.checkpoint, self.data = open_checkpoint(target), data

    def job(self, steps: int, seed: int) -> HeadsJob:
        """Return a training of so many steps; everything else is equal."""
        return HeadsJob(
            method=self.method,
            config=import_method(self.method, "drafter").Heads.Config(),
            data=(str(self.data),),
            steps=steps,
            seed=seed,
            seq_len=256,
            batch_tokens=1024,
            held_out=16,
            learning_rate=METHODS[self.method],
        )

    def train(self, steps: int, seed: int) -> Path:
        """Train heads, unless they are there, and return their directory."""
        directory = self.out / f"{self.method}-{steps}-{seed}"
        if not directory.exists():
            train_heads(self.checkpoint, directory, self.job(steps, seed), dtype=torch.float32)
            print(f"{directory.name}: {finished_of(directory)}", flush=True)
        return directory

    def foretell(self, steps: int, heads: list[Path]) -> Forecast:
        """Return what `--dry-run` says of a training of so many steps."""
        job, out = self.job(steps, LATER_SEEDS[0]), self.out / "none"
        prepared = prepare_heads(self.checkpoint, out, job, dtype=torch.float32)
        options = prepared.job.config.as_dict()
        found = read_finished(heads, self.method, options, prepared.identity)
        assert len(found) == len(heads)
        return forecast(found, prepared.plan.tokens)


def finished_of(directory: Path) -> Finished:
    return as_finished(read_record(directory))


def compare(foretold: Forecast, came: list[Finished]) -> dict[str, Any]:
    """Return the intervals, what came, and how much of it lies inside."""
    result: dict[str, Any] = {"tokens": foretold.tokens, "largest": foretold.largest}
    for name in ("tokens_per_forward", "accuracy"):
        interval, figures = getattr(foretold, name), [getattr(each, name)[1] for each in came]
        result[name] = {
            "foretold": dataclasses.asdict(interval),
            "came": figures,
            "inside": sum(interval.lower <= figure <= interval.upper for figure in figures),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/forecast"))
    parser.add_argument("--only", nargs="+", default=list(METHODS))
    parser.add_argument("--name", default="forecast-stories260K")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.out / "stories.jsonl"
    archive = given.shared / "data/text/tinystories_train.jsonl.gz"
    with gzip.open(archive, "rt") as stories, data.open("w") as file:
        for line in itertools.islice(stories, STORIES):
            file.write(json.dumps({"text": json.loads(line)["text"]}) + "\n")
    result: dict[str, Any] = {"model": "stories260K", "machine": describe(), "methods": {}}
    for method in given.only:
        trial = Trial(method, given.shared / "models/stories260K", data, given.out)
        heads = [trial.train(steps, seed) for steps in BUDGETS for seed in SEEDS]
        points = [finished_of(directory) for directory in heads]
        # Foretold before anything later is trained.
        foretold = {steps: trial.foretell(steps, heads) for steps in LATER}
        later = {}
        for steps in LATER:
            came = [finished_of(trial.train(steps, seed)) for seed in LATER_SEEDS]
            later[str(steps)] = compare(foretold[steps], came)
        fitted = [dataclasses.asdict(each) for each in points]
        result["methods"][method] = {"finished": fitted, "later": later}
        record.write(RESULTS / f"{given.name}.json", result)


if __name__ == "__main__":
    main()
