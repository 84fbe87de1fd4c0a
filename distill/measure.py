"""Held-out figures of decoding, by the decode loop's own code."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.decode.generate import Runner
from spectool.decode.result import Result, loop_start
from spectool.distill.data.trajectories import Prompt

# Largest number of tokens generated after each held-out prompt.
MEASURED_TOKENS = 64


def measure(runner: Runner, prompts: Sequence[Prompt], most: int) -> tuple[float, Sequence[Result]]:
    """Return greedy tokens per forward of the runner's drafter after these prompts, up to loops.

    Returns the whole texts too, of at most `most` tokens each.
    """
    taken: list[list[int]] = [[] for _ in prompts]
    results = runner.generate(
        [prompt.tokens for prompt in prompts],
        max_new_tokens=most,
        eos=[prompt.ends for prompt in prompts],
        batch_size=8,
        on_tokens=lambda index, tokens, text, drafted: taken[index].append(len(tokens)),
    )
    tokens = forwards = 0
    for result, counts in zip(results, taken, strict=True):
        end, done = loop_start(result.token_ids), 0
        for count in counts:
            if done < end:
                done += count
                forwards += 1
        tokens += done
    return tokens / forwards, results
