"""Compare task scores of `spectool eval --task` with lm-evaluation-harness's own `hf` model.

Both score one dense checkpoint in float32, `hf` at batch size 1. Every log-likelihood, whether each
continuation is the greedy one, and every item's metrics are compared. Needs `pip install
'spectool[tasks]' accelerate`.

    python benchmarks/task_scores.py MODEL --data FOLDER --limit 60 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
from lm_eval.evaluator import evaluate as ask_harness
from lm_eval.models.huggingface import HFLM

from spectool import machine
from spectool.decode.generate import Runner
from spectool.evaluate.tasks.answers import Answers
from spectool.evaluate.tasks.ask import SHOT_SEED
from spectool.evaluate.tasks.harness import HarnessModel
from spectool.evaluate.tasks.kept import KeptAnswers
from spectool.evaluate.tasks.load import TaskSet, list_local


def run(model: Any, tasks: TaskSet, limit: int) -> dict[str, list[dict[str, Any]]]:
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=SHOT_SEED)
    found = ask_harness(model, {"tasks": tasks.tasks}, limit=limit, bootstrap_iters=0)
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    runner = Runner(args.model, dtype="float32")
    ours = HarnessModel(Answers(runner, KeptAnswers(None, {}), batch_size=args.batch_size))
    theirs = HFLM(str(args.model), dtype="float32", device="cpu", batch_size=1)
    for name in list_local():
        tasks = TaskSet([name], args.data)
        seconds, both = [], []
        for model in (ours, theirs):
            began = time.perf_counter()
            both.append(run(model, tasks, args.limit)[name])
            seconds.append(round(time.perf_counter() - began, 2))
        gaps, greedy, differ = [0.0], 0, 0
        for own, its in zip(*both, strict=True):
            differ += any(
                own[metric] != its[metric] for metric in own["metrics"] if "acc" in metric
            )
            for ((mine, is_mine),), ((other, is_other),) in zip(
                own["resps"], its["resps"], strict=True
            ):
                gaps.append(abs(mine - other))
                greedy += is_mine != is_other
        metrics = {
            metric: [sum(item[metric] for item in items) / len(items) for items in both]
            for metric in both[0][0]["metrics"]
        }
        rows.append(
            {
                "task": name,
                "items": len(both[0]),
                "continuations": len(gaps) - 1,
                "largest_difference": max(gaps),
                "greedy_differs": greedy,
                "items_with_another_accuracy": differ,
                "means_ours_and_hf": metrics,
                "seconds_ours_and_hf": seconds,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "model": args.model.name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "processor": machine.processor(),
        "fused_layers": runner.target.num_fused,
        "tasks": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
