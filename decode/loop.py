"""The decode loop: draft, verify, accept, commit. Knows no method and no architecture.

At the start of a step the cache holds every committed token but the last, the pending root. Each
step feeds one tree per row, commits the accepted path in place and makes the rule's token the new
root. Rows progress unequally; a finished one leaves the batch. A step synchronises with the device
once, in `resolve_paths`. Suffixes: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import StepDraws, is_finite
from spectool.decode.target import Target, top_ids
from spectool.decode.tree import Draft
from spectool.decode.verify import Verification, resolve_paths


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens just committed to a row, and the text they release. Nothing is ever taken back.

    The first `drafted` characters of the text were released by accepted drafts, the rest by the
    rule's own token.
    """

    row: Request
    tokens: list[int]
    text: str
    drafted: int


@dataclass(slots=True)
class Timings:
    """Seconds so far: drafting, prompt passes, and the passes of steps. What is left is ours."""

    draft: float = 0.0
    prompt: float = 0.0
    target: float = 0.0


def decode(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: Sequence[Request],
    verification: Verification,
    timings: Timings,
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
    yield from _prefill(target, cache, drafter, alive, verification, timings)
    alive = _drop_finished(cache, alive)
    while alive:
        yield from _step(target, cache, drafter, alive, verification, timings)
        alive = _drop_finished(cache, alive)


def _prefill(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: list[Request],
    verification: Verification,
    timings: Timings,
) -> list[Commit]:
    """Feed the prompts and commit the first new token of each row: one forward, as plain as any."""
    began = time.perf_counter()
    fresh = [row.tokens[held:] for row, held in zip(rows, cache.lengths, strict=True)]
    drafts = [tree.root(row.tokens[-1]) for row in rows]
    done = target.prefill(cache, fresh, drafter.needs)
    resolved, _, _ = _verify_drafts(rows, drafts, done.logits_BV[:, None], verification)
    timings.prompt += time.perf_counter() - began
    commits, prompts = [], []
    for b, (row, (_, token)) in enumerate(zip(rows, resolved, strict=True)):
        row.count([0], 0)
        (text,) = row.extend([token])
        commits.append(Commit(row, [token], text, drafted=0))
        prompts.append(
            PrefilledPrompt(
                row=row, logits_V=done.logits_BV[b], top=done.top[b], features=done.features[b]
            )
        )
    unfinished = [prompt for prompt in prompts if prompt.row.finish_reason is None]
    if unfinished:
        began = time.perf_counter()
        drafter.begin(unfinished, cache)
        timings.draft += time.perf_counter() - began
    return commits


def _step(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    rows: list[Request],
    verification: Verification,
    timings: Timings,
) -> list[Commit]:
    # A node at depth d brings d + 1 tokens: itself, those above it and the rule's own.
    budget = [row.room - 1 for row in rows]
    began = time.perf_counter()
    drafts = drafter.propose(rows, budget)
    proposed = time.perf_counter()
    assert all(max(d.depths) <= b for d, b in zip(drafts, budget, strict=True)), "over budget"
    needs = drafter.needs
    done = target.verify(cache, drafts, needs)
    fed = time.perf_counter()
    resolved, top, probs_BNV = _verify_drafts(
        rows, drafts, done.logits_BNV, verification, needs.top
    )
    # On a GPU the pass has only been enqueued before its verdict is read.
    passed = fed if target.device.type == "cpu" else time.perf_counter()
    commits, outcomes, paths = [], [], []
    for b, (row, draft, (path, token)) in enumerate(zip(rows, drafts, resolved, strict=True)):
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
                probs_NV=probs_BNV[b, nodes] if needs.probs else None,
                extra_logits_NV=done.logits_BNV[b, len(draft) : draft.num_rows],
                top=top[b][nodes] if needs.top else [],
                features={name: f_BND[b, nodes] for name, f_BND in done.features.items()},
            )
        )
    cache.commit([draft.tokens for draft in drafts], paths)
    committed = time.perf_counter()
    drafter.observe(outcomes)
    timings.draft += proposed - began + time.perf_counter() - committed
    timings.target += passed - proposed
    return commits


@torch.inference_mode()
def _verify_drafts(
    rows: Sequence[Request],
    drafts: Sequence[Draft],
    logits_BNV: Tensor,
    verification: Verification,
    top: int = 0,
) -> tuple[list[tuple[list[int], int]], list[list[list[int]]], Tensor]:
    """Every row's path and next token, the `top` likeliest ids after each node, and the laws."""
    control = rows[0].control
    probs_BNV = control.probs(_controlled(rows, drafts, logits_BNV))
    verdicts = [
        verification.verifier(
            draft, probs_NV[: len(draft)], StepDraws(row.draws, len(row.tokens) - 1)
        )
        for row, draft, probs_NV in zip(rows, drafts, probs_BNV, strict=True)
    ]
    top_BNK = top_ids(logits_BNV, top) if top else None
    resolved, ids = resolve_paths(
        drafts, verdicts, all_finite=is_finite(logits_BNV), top_BNK=top_BNK
    )
    if top_BNK is None:
        return resolved, [], probs_BNV
    _, num_nodes, top = top_BNK.shape
    listed = [ids[start : start + top] for start in range(0, len(ids), top)]
    by_row = [listed[b * num_nodes : (b + 1) * num_nodes] for b in range(len(rows))]
    return resolved, by_row, probs_BNV


def _controlled(rows: Sequence[Request], drafts: Sequence[Draft], logits_BNV: Tensor) -> Tensor:
    """Return the logits as each request's controls change them, in fp32 where there are any."""
    if not any(row.controls for row in rows):
        return logits_BNV
    logits_BNV = logits_BNV.to(torch.float32, copy=True)
    for row, draft, logits_NV in zip(rows, drafts, logits_BNV, strict=True):
        if row.controls:
            nodes = row.control_states().along(draft.tokens, draft.parents)
            for node, states in enumerate(nodes):
                logits_NV[node] = states.process(logits_NV[node])
    return logits_BNV


def _drop_finished(cache: TreeCache, rows: list[Request]) -> list[Request]:
    alive = [row for row in rows if row.finish_reason is None]
    # The last row stays in the cache when it ends: a later call may continue from it.
    if alive and len(alive) < len(rows):
        cache.select([b for b, row in enumerate(rows) if row.finish_reason is None])
    return alive
