"""Texts as the target itself would write them: for training on its own words, and to measure on.

Every taught stretch of a sample is written anew by the target, after what stands before it. Works
on token ids, so that any chat template will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spectool.decode.generate import Runner, loop_start
from spectool.distill.data.samples import SHORTEST, Sample


def regenerate(
    runner: Runner,
    samples: Sequence[Sample],
    *,
    seq_len: int,
    temperature: float,
    seed: int,
    batch_size: int,
    most: int | None = None,
    cut_loops: bool = False,
) -> list[Sample]:
    """The samples with their taught stretches written by the runner's target.

    At most `seq_len` tokens each and `most` new ones a stretch. A sample ends with a stretch that
    does not end by itself; with `cut_loops` also where one begins to repeat itself, since loops are
    easy to guess.
    """
    tokens: list[list[int]] = [[] for _ in samples]
    loss_mask: list[list[bool]] = [[] for _ in samples]
    stretches = [list(_stretches(sample)) for sample in samples]
    for turn in range(max(len(each) for each in stretches)):
        asked, limits = [], []
        for index, each in enumerate(stretches):
            if turn >= len(each):
                continue
            before, answer = each[turn]
            tokens[index] += before
            loss_mask[index] += [False] * len(before)
            room = seq_len - len(tokens[index])
            if room >= 1 and answer and tokens[index]:
                asked.append(index)
                limits.append(room if most is None else min(most, room))
        written = runner.generate(
            [tokens[index] for index in asked],
            max_new_tokens=limits,
            temperature=temperature,
            seed=1000 * seed + turn,
            batch_size=batch_size,
            eos=[samples[index].ends for index in asked],
        )
        for index, result in zip(asked, written, strict=True):
            new = result.token_ids
            if cut_loops:
                new = new[: loop_start(new)]
            tokens[index] += new
            loss_mask[index] += [True] * len(new)
            if result.finish_reason != "eos" or len(new) < len(result.token_ids):
                stretches[index] = stretches[index][: turn + 1]
                continue
            # What the template writes after the end of a turn, a line break say.
            answer = stretches[index][turn][1]
            closing = runner.end_ids() | samples[index].ends
            ends = [place for place, token in enumerate(answer) if token in closing]
            after = answer[ends[-1] + 1 :] if ends else []
            tokens[index] += after
            loss_mask[index] += [False] * len(after)
    made = [
        Sample(ids[:seq_len], marks[:seq_len]) for ids, marks in zip(tokens, loss_mask, strict=True)
    ]
    return [sample for sample in made if sum(sample.loss_mask) >= SHORTEST]


def _stretches(sample: Sample) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of a stretch that is not taught and the taught one after it, in order."""
    loss_mask = [False] * sample.given + sample.loss_mask[sample.given :]
    before: list[int] = []
    start = 0
    for in_loss, marks in itertools.groupby(loss_mask):
        end = start + len(list(marks))
        if in_loss:
            yield before, sample.tokens[start:end]
            before = []
        else:
            before = sample.tokens[start:end]
        start = end
    if before:
        yield before, []
