"""Laws: whether sampled texts of a drafter are distributed as plain sampling's.

Both sample many short continuations of the same prompts, with different seeds, since looked-up
drafts with the same seed give the same text. The counts of whole continuations are compared by
Pearson's chi-square test of homogeneity, prompt by prompt; the statistics and degrees of freedom
of the prompts are summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams, VerifyOptions

# Tokens of a continuation. The first comes from the prompt's pass, drafts reach the others.
LENGTH = 3
# Few tokens to choose from, so that most continuations are seen often enough to be compared.
SAMPLING = SamplingParams(temperature=1.0, top_k=3)
# Continuations that both samples together have less often are counted as one.
LEAST = 10
# Tokens of a prompt that are read, its last ones: each of many samples reads them again.
PROMPT_TOKENS = 4
# Below this probability, divided by the number of tests, a law counts as another one.
LEVEL = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """The law of a drafter's first tokens beside plain sampling's: Pearson's chi-square.

    `samples` of each, over all prompts. `p_value`: how probable a statistic as large is where the
    laws are equal; 1 without degrees of freedom. `drafter` "none": plain sampling with another
    seed, which tests the test.
    """

    forward: str
    drafter: str
    lossless: bool
    prompts: int
    samples: int
    accepted: int
    statistic: float
    degrees: int
    p_value: float


def compare_laws(
    runner: Runner,
    drafts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    batch_size: int,
    sampling: SamplingParams,
    verification: VerifyOptions,
    forward: str,
) -> Iterator[Law]:
    """Compare the law of each drafter with plain sampling's, `samples` texts of each prompt.

    Raises:
        InputError: a drafter that cannot be opened for this model.
    """
    short = [list(prompt[-PROMPT_TOKENS:]) for prompt in prompts]

    def sample(draft: str, seed: int) -> tuple[list[Counter[tuple[int, ...]]], bool, int]:
        runner.use(draft)
        how = {**verification.as_dict(), "seed": verification.seed + seed}
        if draft == "none":
            how = {"seed": how["seed"]}
        found = runner.generate(
            [prompt for prompt in short for _ in range(samples)],
            max_new_tokens=LENGTH,
            batch_size=batch_size,
            **how,
            **sampling.as_dict(),
        )
        texts = [tuple(each.token_ids) for each in found]
        counts = [Counter(texts[at * samples :][:samples]) for at in range(len(short))]
        return counts, all(each.lossless for each in found), sum(each.accepted for each in found)

    plain, _, _ = sample("none", 0)
    for number, draft in enumerate(["none", *drafts], start=1):
        drafted, lossless, accepted = sample(draft, number)
        parts = [_test(*pair) for pair in zip(plain, drafted, strict=True)]
        statistic, degrees = (sum(each) for each in zip(*parts, strict=True))
        yield Law(
            forward=forward,
            drafter=draft,
            lossless=lossless,
            prompts=len(short),
            samples=samples * len(short),
            accepted=accepted,
            statistic=statistic,
            degrees=int(degrees),
            p_value=compute_p(statistic, int(degrees)),
        )


def _test(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """Return chi-square and degrees of freedom of two samples of equal size."""
    cells, rest = [], [0, 0]
    for text in one.keys() | other.keys():
        pair = one[text], other[text]
        if sum(pair) >= LEAST:
            cells.append(pair)
        else:
            rest = [rest[0] + pair[0], rest[1] + pair[1]]
    if sum(rest) >= LEAST:
        cells.append((rest[0], rest[1]))
    # Sums in a fixed order: sets of tuples are not ordered alike in every process.
    statistic = sum(sorted((own - its) ** 2 / (own + its) for own, its in cells))
    return statistic, max(0, len(cells) - 1)


def compute_p(statistic: float, degrees: int) -> float:
    """Return the probability of a chi-square at least this large; 1 without degrees of freedom."""
    if not degrees:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
