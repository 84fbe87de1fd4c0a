"""Measure continuous batching: requests that join and leave, against groups that wait.

    python benchmarks/continuous.py --shared FOLDER [--out benchmarks/results/...json]

FOLDER holds `models/codestory-10M` and `data` (see their README). Its copy widened to 100 M
parameters (`widened.py`) continues pieces of text in float32, greedily. Lengths of prompts and
outputs are drawn log-uniformly from 16 to 512, ends of text are ignored. The same requests run
twice: submitted at once to an engine of 8 rows, and in groups of 8, the next one submitted when the
slowest of a group has ended. First-token latency counts from the start of a run, when all prompts
are there. `identical` counts the requests with the same tokens in both runs.
"""

from __future__ import annotations

import argparse
import lzma
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from widened import widen

from spectool.decode.generate import Runner
from spectool.decode.request import Request
from spectool.machine import describe

ROWS, SHORTEST, LONGEST = 8, 16, 512

WIDTHS = {"hidden": 1024, "intermediate": 2944, "heads": 32}


@dataclass(frozen=True, slots=True)
class Run:
    """The requests of a run, its seconds, and those until each request's first token."""

    requests: list[Request]
    seconds: float
    first: list[float]

    def metrics(self) -> dict[str, float]:
        """Return tokens a second and latencies."""
        tokens = sum(len(request.new_tokens) for request in self.requests)
        deciles = statistics.quantiles(self.first, n=10)
        return {
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "first_token_median_seconds": deciles[4],
            "first_token_p90_seconds": deciles[8],
        }


def draw_jobs(text: Sequence[int], count: int, seed: int) -> list[tuple[list[int], int]]:
    """Return prompts with their numbers of new tokens."""
    rng = random.Random(seed)

    def length() -> int:
        return round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())

    jobs = []
    for _ in range(count):
        start, size = rng.randrange(len(text) - LONGEST), length()
        jobs.append((list(text[start : start + size]), length()))
    return jobs


def run(runner: Runner, jobs: Sequence[tuple[list[int], int]], group: int) -> Run:
    """Decode all jobs, `group` submitted at a time."""
    requests = [
        runner.make_request(prompt, index=index, max_new_tokens=limit, live=False)
        for index, (prompt, limit) in enumerate(jobs)
    ]
    engine, first = runner.engine(ROWS), [0.0] * len(jobs)
    began = time.perf_counter()
    for start in range(0, len(requests), group):
        for request in requests[start : start + group]:
            engine.submit(request)
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                index = event.request.index
                first[index] = first[index] or time.perf_counter() - began
    return Run(requests, time.perf_counter() - began, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--draft", nargs="+", default=["none", "ngram+recycle:nodes=8"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {
        "benchmark": "continuous",
        "command": "python benchmarks/continuous.py --shared FOLDER",
        "machine": describe(),
        "requests": given.requests,
        "rows": ROWS,
        "lengths": [SHORTEST, LONGEST],
        "dtype": "float32",
        "drafters": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        wide = Path(scratch) / "widened"
        source = given.shared / "models/codestory-10M"
        results["parameters"] = widen(source, wide, **WIDTHS, dtype="float32")
        runner = Runner(wide, dtype=torch.float32)
        runner.target.model.generation_config.eos_token_id = None
        assert runner.tokenizer is not None
        runner.tokenizer.eos_token = None
        with lzma.open(given.shared / "data/text/books_heldout.jsonl.xz", "rt") as file:
            text = runner.tokenizer(file.read(200_000))["input_ids"]
        jobs = draw_jobs(text, given.requests, seed=0)
        for draft in given.draft:
            runner.use(draft)
            run(runner, jobs[:1], 1)
            groups, engine = run(runner, jobs, ROWS), run(runner, jobs, len(jobs))
            pairs = zip(groups.requests, engine.requests, strict=True)
            results["drafters"][draft] = {
                "groups": groups.metrics(),
                "engine": engine.metrics(),
                "speedup": groups.seconds / engine.seconds,
                "identical": sum(one.new_tokens == other.new_tokens for one, other in pairs),
            }
            print(draft, record.to_text(results["drafters"][draft]), flush=True)
            if given.out:
                record.write(given.out, results)


if __name__ == "__main__":
    main()
