"""Texts: whether greedy texts of a drafter are plain decoding's, token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectool.decode.generate import Runner
from spectool.decode.options import VerifyOptions
from spectool.decode.result import Result
from spectool.decode.target.base import Target
from spectool.evaluate.certify.rows import feed, read_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where a text leaves plain decoding's: the tokens of both, None where a text has ended.

    `gap`: how much larger plain decoding's logit of its own token is than that of the other token;
    None where a text has ended.
    """

    prompt: int
    position: int
    plain: int | None
    drafted: int | None
    gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The texts of one drafter beside plain decoding's, which runs at batch size 1.

    `tokens` counts those compared, up to each text's first difference; `identical` the whole texts
    that are equal. `lossless`: the verifier promises plain decoding's text.
    """

    forward: str
    drafter: str
    batch_size: int
    lossless: bool
    prompts: int
    tokens: int
    identical: int
    partings: list[Parting]


def compare_texts(
    runner: Runner,
    drafts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    *,
    batch_sizes: Sequence[int],
    max_new_tokens: int,
    verification: VerifyOptions,
    forward: str,
) -> Iterator[Texts]:
    """Compare the greedy texts of plain decoding in batches, and of each drafter, with plain ones.

    Raises:
        InputError: a drafter that cannot be opened for this model.
    """
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=max_new_tokens)
    for draft in ["none", *drafts]:
        for size in batch_sizes:
            if (draft, size) == ("none", 1):
                continue
            runner.use(draft)
            how = verification.as_dict() if draft != "none" else {}
            found = runner.generate(prompts, max_new_tokens=max_new_tokens, batch_size=size, **how)
            pairs = list(zip(plain, found, strict=True))
            yield Texts(
                forward=forward,
                drafter=draft,
                batch_size=size,
                lossless=all(each.lossless for each in found),
                prompts=len(prompts),
                tokens=sum(count_equal(*pair) for pair in pairs),
                identical=sum(one.token_ids == other.token_ids for one, other in pairs),
                partings=[
                    _find_parting(runner.target, index, prompts[index], *pair)
                    for index, pair in enumerate(pairs)
                    if pair[0].token_ids != pair[1].token_ids
                ],
            )


def count_equal(one: Result, other: Result) -> int:
    """Return the number of tokens before the first difference."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    shorter = min(len(one.token_ids), len(other.token_ids))
    return next((at for at, (own, its) in enumerate(pairs) if own != its), shorter)


def _find_parting(
    target: Target[Any], index: int, prompt: Sequence[int], plain: Result, found: Result
) -> Parting:
    at = count_equal(plain, found)
    own, its = (each.token_ids[at] if at < len(each.token_ids) else None for each in (plain, found))
    gap = None
    if own is not None and its is not None:
        gap = measure_gap(target, prompt, plain.token_ids[:at], own, its)
    return Parting(prompt=index, position=at, plain=own, drafted=its, gap=gap)


@torch.inference_mode()
def measure_gap(
    target: Target[Any], prompt: Sequence[int], written: Sequence[int], own: int, its: int
) -> float:
    """Return the logit of `own` minus that of `its` after the tokens written, one by one."""
    cache, logits_V = read_prompt(target, prompt)
    for token in written:
        logits_V = feed(target, cache, token)
    return float(logits_V[own].float() - logits_V[its].float())
