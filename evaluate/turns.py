"""Answers of one contender to a batch of prompts, turn by turn, and the time that they took."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectool.data.text import Prompt
from spectool.decode.generate import Runner
from spectool.decode.prompts import encode
from spectool.decode.result import Result
from spectool.evaluate.baselines import Decode, Job

# A prompt is left out if the context has room for fewer new tokens than this, or than requested.
LEAST_ROOM = 16


class Timed(NamedTuple):
    """Results of some prompts, and the seconds in all and by part, as the runner measured them.

    `answers` has the results of each prompt, one for every turn.
    """

    answers: list[list[Result]]
    seconds: float
    draft: float
    prompt: float
    target: float

    @property
    def results(self) -> list[Result]:
        return list(itertools.chain(*self.answers))

    def count(self, name: str) -> int:
        """Return the sum of a number of the results."""
        return sum(int(getattr(result, name)) for result in self.results)

    @property
    def new_tokens(self) -> int:
        return sum(len(result.token_ids) for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        return self.new_tokens / max(1, self.count("forwards"))

    @property
    def step_speed(self) -> float:
        """Tokens per second without the prefill and the first token, which prefill yields."""
        # At least 1, in case every output has a single token.
        return max(self.new_tokens - len(self.results), 1) / (self.seconds - self.prompt)


def make_job(prompt: Prompt, tokens: Sequence[int], max_new_tokens: int) -> Job:
    """Make the job of continuing a prompt, of these tokens, by at most so many."""
    return Job(
        tokens=tokens,
        limit=max_new_tokens,
        ends=prompt.ends,
        category=prompt.category,
        prompt=prompt,
    )


def time_batch(runner: Runner, decode: Decode, batch: Sequence[Job]) -> Timed:
    """Let a contender answer a batch, and the turns that follow; time the decoding alone."""
    answers: list[list[Result]] = [[] for _ in batch]
    seconds = [0.0, 0.0, 0.0, 0.0]
    going = list(enumerate(batch))
    while going:
        before = dataclasses.replace(runner.timings)
        start = time.perf_counter()
        results = decode([job for _, job in going])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[0] += time.perf_counter() - start
        seconds[1] += runner.timings.draft - before.draft
        seconds[2] += runner.timings.prompt - before.prompt
        seconds[3] += runner.timings.target - before.target
        following = []
        for (index, job), result in zip(going, results, strict=True):
            answers[index].append(result)
            after = _follow(runner, job, result)
            following += [(index, after)] if after is not None else []
        going = following
    return Timed(answers, *seconds)


def _follow(runner: Runner, job: Job, result: Result) -> Job | None:
    """Return the next turn after an answer; None where there is none, or no room for it."""
    if job.prompt is None or job.prompt.follow is None:
        return None
    assert runner.tokenizer is not None
    answer = str(runner.tokenizer.decode(result.token_ids, skip_special_tokens=True)).strip()
    after = job.prompt.follow(answer)
    tokens = encode(after.given, runner.tokenizer)
    has_room = len(tokens) + min(LEAST_ROOM, job.limit) <= runner.target.context
    return make_job(after, tokens, job.limit) if has_room else None


def add_times(parts: Sequence[Timed]) -> Timed:
    """Join the results of several batches, and add their seconds."""
    answers, *seconds = zip(*parts, strict=True)
    return Timed(list(itertools.chain(*answers)), *map(sum, seconds))
