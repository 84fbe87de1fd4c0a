"""The decode loop: draft, verify, accept, commit. Knows no method and no architecture.

At the start of a step the cache holds every committed token but the last, the pending root. Each
step feeds one tree per row, commits the accepted path in place and makes the rule's token the new
root. Rows progress unequally; a finished one leaves the batch. A step synchronises with the device
once, in `settle`. Suffixes: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Turn, sound
from spectool.decode.target import Target
from spectool.decode.tree import Draft
from spectool.decode.verify import Pairing, settle


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens just committed to a row, and the text they release. Nothing is ever taken back.

    The first `drafted` characters of the text were released by accepted drafts, the rest by the
    rule's own token.
    """

    row: Row
    tokens: list[int]
    text: str
    drafted: int


def decode(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: Sequence[Row],
    pairing: Pairing,
) -> Iterator[Commit]:
    """Complete all rows, yielding what is committed step by step.

    `cache` has a row for each of `rows` and may hold a prefix of its prompt. Stopping to iterate
    leaves every row with what was committed so far.
    """
    alive = [row for row in rows if row.finish_reason is None]
    if len(alive) < len(rows):
        cache.select([i for i, row in enumerate(rows) if row.finish_reason is None])
    if not alive:
        return
    yield from _prompt_pass(target, cache, drafter, alive, pairing)
    alive = _drop_finished(cache, alive)
    while alive:
        yield from _step(target, cache, drafter, alive, pairing)
        alive = _drop_finished(cache, alive)


def _prompt_pass(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: list[Row],
    pairing: Pairing,
) -> list[Commit]:
    """Feed the prompts and commit the first new token of each row: one forward, as plain as any."""
    fresh = [row.tokens[held:] for row, held in zip(rows, cache.lengths, strict=True)]
    drafts = [tree.root(row.tokens[-1]) for row in rows]
    done = target.ingest(cache, fresh, drafter.needs)
    settled = _judge(rows, drafts, done.logits_BV[:, None], pairing)
    commits, prompts = [], []
    for b, (row, (_, token)) in enumerate(zip(rows, settled, strict=True)):
        row.count([0], 0)
        (text,) = row.extend([token])
        commits.append(Commit(row, [token], text, drafted=0))
        prompts.append(Prompt(row=row, logits_V=done.logits_BV[b], features=done.features[b]))
    unfinished = [prompt for prompt in prompts if prompt.row.finish_reason is None]
    if unfinished:
        drafter.begin(unfinished)
    return commits


def _step(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: list[Row],
    pairing: Pairing,
) -> list[Commit]:
    # A node at depth d brings d + 1 tokens: itself, those above it and the rule's own.
    budget = [row.room - 1 for row in rows]
    drafts = drafter.propose(rows, budget)
    assert all(max(d.depths) <= b for d, b in zip(drafts, budget, strict=True)), "over budget"
    done = target.verify(cache, drafts, drafter.needs)
    settled = _judge(rows, drafts, done.logits_BNV, pairing)
    commits, outcomes, paths = [], [], []
    for b, (row, draft, (path, token)) in enumerate(zip(rows, drafts, settled, strict=True)):
        new = [draft.tokens[node] for node in path[1:]] + [token]
        texts = row.extend(new)
        taken = len(texts)
        # Where a token inside the path ended the row, it becomes the root and what follows drops.
        path = path[:taken]
        row.count(draft.depths, min(taken, len(new) - 1))
        drafted = len("".join(texts[: len(new) - 1]))
        commits.append(Commit(row, new[:taken], "".join(texts), drafted))
        paths.append(path)
        nodes = slice(len(draft))
        outcomes.append(
            Outcome(
                row=row,
                draft=draft,
                path=path,
                next_token=new[taken - 1],
                logits_NV=done.logits_BNV[b, nodes] if drafter.needs.logits else None,
                features={name: f_BND[b, nodes] for name, f_BND in done.features.items()},
            )
        )
    cache.commit([draft.tokens for draft in drafts], paths)
    drafter.observe(outcomes)
    return commits


@torch.inference_mode()
def _judge(
    rows: Sequence[Row],
    drafts: Sequence[Draft],
    logits_BNV: Tensor,
    pairing: Pairing,
) -> list[tuple[list[int], int]]:
    laws_BNV = rows[0].control.laws(logits_BNV)
    verdicts = [
        pairing.rule(draft, laws_NV[: len(draft)], Turn(row.draws, len(row.tokens) - 1))
        for row, draft, laws_NV in zip(rows, drafts, laws_BNV, strict=True)
    ]
    return settle(drafts, verdicts, sound(logits_BNV))


def _drop_finished(cache: TreeCache, rows: list[Row]) -> list[Row]:
    alive = [row for row in rows if row.finish_reason is None]
    # The last row stays in the cache when it ends: a later call may continue from it.
    if alive and len(alive) < len(rows):
        cache.select([b for b, row in enumerate(rows) if row.finish_reason is None])
    return alive
