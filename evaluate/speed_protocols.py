"""Published protocols of measuring drafters: how questions are asked, and what is averaged.

Both ask every turn of a question after the model's own answer to the turn before. They differ in
what a mean is taken over, so one run gives different figures by them, and by the sums of `bench`:

`spec-bench` (Xia et al. 2024, arXiv:2401.07851; its evaluation/speed.py): greedy, up to 1024 new
tokens a turn. The speed of a question is its tokens by its seconds; the speed-up is the mean speed
over that of plain decoding; the accepted length is the mean over all steps after the prefills.

`speed-bench` (Abramovich et al. 2026, arXiv:2604.09557; NVIDIA's specdec_bench): up to 4096 new
tokens a turn. The speed is that of all output together; the accepted length of a question is the
mean over its steps, without each turn's prefill and last step, which may be cut, and the
figure is the mean over questions. The qualitative split has 11 categories; the throughput splits
are files of one input length and three classes of entropy, meant for several batch sizes.

A question's seconds leave out the writing of prompts and the reading of answers. Questions that
are decoded together count as one question of all their tokens and seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from spectool.decode.options import SamplingParams
from spectool.decode.result import Result
from spectool.errors import UsageError
from spectool.evaluate.intervals import Interval, bootstrap

# Most new tokens of a prompt where no protocol says how many.
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of a batch, each with the results of its turns, and the seconds of all."""

    questions: Sequence[Sequence[Result]]
    seconds: float

    @property
    def new_tokens(self) -> int:
        turns = itertools.chain(*self.questions)
        return sum(len(result.token_ids) for result in turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The figures of a way to decode, as a protocol computes them.

    `accepted_length`: Spec-Bench's "mean accepted tokens", SPEED-Bench's "acceptance length"; the
    token that the model adds to accepted ones counts. None where there were no steps to average,
    as in the baselines, whose steps are not known. Intervals resample the batches.
    """

    tokens_per_second: float
    speedup: Interval
    accepted_length: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A protocol: its bounds, and the words for what it averages."""

    max_new_tokens: int
    greedy: bool
    definition: str


PROTOCOLS: dict[str, Protocol] = {
    "spec-bench": Protocol(
        max_new_tokens=1024,
        greedy=True,
        definition="speed: mean over questions of a question's tokens by its seconds; accepted "
        "length: tokens a step, mean over all steps after the prefills",
    ),
    "speed-bench": Protocol(
        max_new_tokens=4096,
        greedy=False,
        definition="speed: all tokens by all seconds; accepted length: tokens a step, mean over "
        "questions of the mean over a question's steps, without the prefills and last steps",
    ),
}


def most_new_tokens(name: str | None) -> int:
    """Return the most new tokens of a turn by a protocol, or of a prompt without one."""
    return MAX_NEW_TOKENS if name is None else PROTOCOLS[name].max_new_tokens


def check_sampling(name: str, sampling: SamplingParams) -> None:
    """Check that a protocol allows this sampling.

    Raises:
        UsageError: it is for greedy decoding.
    """
    if PROTOCOLS[name].greedy and not sampling.greedy:
        raise UsageError(f"--protocol {name} decodes greedily; leave --temperature out")


def score(name: str, asked: Sequence[Asked], plain: Sequence[Asked]) -> Scores:
    """Compute a protocol's figures of a way to decode, next to plain decoding of the same batches.

    `plain` has the same batches in the same order.
    """
    if name == "spec-bench":
        # Rows are questions; their mean is that of speeds, and then of steps and step tokens.
        rows = [(one.new_tokens / one.seconds, two.new_tokens / two.seconds)
                for one, two in zip(asked, plain, strict=True)]  # fmt: skip
        return Scores(
            tokens_per_second=sum(speed for speed, _ in rows) / len(rows),
            speedup=_ratio(rows),
            accepted_length=_pooled_length(asked),
        )
    # The ratio of two speeds, of which each is a ratio of means.
    rows4 = [(one.new_tokens, one.seconds, two.new_tokens, two.seconds)
             for one, two in zip(asked, plain, strict=True)]  # fmt: skip
    table = torch.tensor(rows4, dtype=torch.float64)
    return Scores(
        tokens_per_second=float(table[:, 0].sum() / table[:, 1].sum()),
        speedup=bootstrap(table, lambda m: m[:, 0] / m[:, 1] * m[:, 3] / m[:, 2]),
        accepted_length=_mean_length(asked),
    )


def _ratio(rows: Sequence[tuple[float, float]]) -> Interval:
    """Return the ratio of the means of two columns."""
    return bootstrap(torch.tensor(rows, dtype=torch.float64), lambda m: m[:, 0] / m[:, 1])


def _pooled_length(asked: Sequence[Asked]) -> Interval | None:
    """Return the tokens a step over all steps after prefills, or None without any."""
    rows = []
    for each in asked:
        turns = itertools.chain(*each.questions)
        steps = [length for result in turns for length in result.committed[1:]]
        rows.append((float(sum(steps)), float(len(steps))))
    # Batches without a step would leave resamples of nothing.
    rows = [row for row in rows if row[1]]
    return _ratio(rows) if rows else None


def _mean_length(asked: Sequence[Asked]) -> Interval | None:
    """Return the mean over questions of their steps' mean tokens, or None without any step."""
    means = []
    for question in itertools.chain(*(each.questions for each in asked)):
        turns = [_trim(result.committed) for result in question if result.committed]
        steps = list(itertools.chain(*turns))
        if steps:
            means.append(sum(steps) / len(steps))
    if not means:
        return None
    return bootstrap(torch.tensor(means, dtype=torch.float64)[:, None], lambda m: m[:, 0])


def _trim(committed: Sequence[int]) -> Iterable[int]:
    """Leave out a turn's prefill and last step; what has no other step counts as one of 1."""
    return committed[1:-1] or [1]
