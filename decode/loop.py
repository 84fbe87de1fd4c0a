"""The decode loop: draft, verify, accept, commit. Knows no method and no architecture.

At the start of a step the cache holds every committed token but the last, the pending root. Each
step feeds one tree per request, commits the accepted path in place and makes the verifier's token
the new root. Requests progress unequally; a finished one leaves the batch. A step synchronises with
the device once, in `resolve_paths`. Suffixes: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.control.base import ControlStates, apply_controls
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import StepDraws, is_finite, probs_by_row
from spectool.decode.target import Target, top_ids
from spectool.decode.tree import Draft
from spectool.decode.verify import Verification, resolve_paths


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens just committed to a request, and the text they release. No commit is ever undone.

    The first `drafted` characters of the text were released by accepted drafts, the rest by the
    verifier's own token.
    """

    request: Request
    tokens: list[int]
    text: str
    drafted: int


@dataclass(slots=True)
class Timings:
    """Seconds so far: drafting, prompt passes, and the passes of steps.

    The rest of the elapsed time is the loop's own overhead.
    """

    draft: float = 0.0
    prompt: float = 0.0
    target: float = 0.0


def decode(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    requests: Sequence[Request],
    verification: Verification,
    timings: Timings,
    after: Request | None = None,
) -> Iterator[Commit]:
    """Complete all requests, yielding what is committed step by step.

    `cache` has a row for each of `requests` and may hold a prefix of its prompt, which it has from
    the request `after`. If iteration stops early, every request keeps what was committed so far.
    """
    alive = [request for request in requests if request.finish_reason is None]
    if len(alive) < len(requests):
        cache.select([i for i, request in enumerate(requests) if request.finish_reason is None])
    if not alive:
        return
    yield from _prefill(target, cache, drafter, alive, verification, timings, after)
    alive = _drop_finished(cache, drafter, alive)
    while alive:
        yield from _step(target, cache, drafter, alive, verification, timings)
        alive = _drop_finished(cache, drafter, alive)


def _prefill(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    requests: list[Request],
    verification: Verification,
    timings: Timings,
    after: Request | None,
) -> list[Commit]:
    """Feed the prompts in one forward and commit the first new token of each request.

    This step is never drafted.
    """
    began = time.perf_counter()
    fresh = [request.tokens[held:] for request, held in zip(requests, cache.lengths, strict=True)]
    drafts = [tree.root(request.tokens[-1]) for request in requests]
    done = target.prefill(cache, fresh, drafter.needs)
    resolved, _, _ = _verify_drafts(requests, drafts, done.logits_BV[:, None], verification)
    timings.prompt += time.perf_counter() - began
    commits, prompts = [], []
    for b, (request, (_, token)) in enumerate(zip(requests, resolved, strict=True)):
        request.count([0], 0)
        (text,) = request.extend([token])
        commits.append(Commit(request, [token], text, drafted=0))
        prompts.append(
            PrefilledPrompt(
                request=request,
                logits_V=done.logits_BV[b],
                top=done.top[b],
                features=done.features[b],
                after=after,
            )
        )
    unfinished = [prompt for prompt in prompts if prompt.request.finish_reason is None]
    if unfinished:
        began = time.perf_counter()
        drafter.add(unfinished, cache)
        if after is not None:
            drafter.remove(after)
        timings.draft += time.perf_counter() - began
    return commits


def _step(
    target: Target,
    cache: TreeCache,
    drafter: Drafter,
    requests: list[Request],
    verification: Verification,
    timings: Timings,
) -> list[Commit]:
    """Draft, verify and commit once for every request of the batch."""
    # A node at depth d brings d + 1 tokens: itself, those above it and the verifier's own.
    budget = [request.num_left - 1 for request in requests]
    began = time.perf_counter()
    drafts = drafter.propose(requests, budget)
    proposed = time.perf_counter()
    assert all(max(d.depths) <= b for d, b in zip(drafts, budget, strict=True)), "over budget"
    needs = drafter.needs
    done = target.verify(cache, drafts, needs)
    fed = time.perf_counter()
    resolved, top, probs = _verify_drafts(
        requests, drafts, done.logits_BNV, verification, needs.top
    )
    # On a GPU the pass has only been enqueued before its verdict is read.
    passed = fed if target.device.type == "cpu" else time.perf_counter()
    commits, outcomes, paths = [], [], []
    for b, (request, draft, (path, token)) in enumerate(
        zip(requests, drafts, resolved, strict=True)
    ):
        new = [draft.tokens[node] for node in path[1:]] + [token]
        texts = request.extend(new)
        taken = len(texts)
        # Where a token inside the path ended the request, it becomes the root; later ones drop.
        path = path[:taken]
        request.count(draft.depths, min(taken, len(new) - 1))
        drafted = len("".join(texts[: len(new) - 1]))
        commits.append(Commit(request, new[:taken], "".join(texts), drafted))
        paths.append(path)
        nodes = slice(len(draft))
        outcomes.append(
            Outcome(
                request=request,
                draft=draft,
                path=path,
                next_token=new[taken - 1],
                probs_NV=probs[b][nodes] if needs.probs else None,
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
    requests: Sequence[Request],
    drafts: Sequence[Draft],
    logits_BNV: Tensor,
    verification: Verification,
    top: int = 0,
) -> tuple[list[tuple[list[int], int]], list[list[list[int]]], list[Tensor]]:
    """Run the verifier on every request's draft.

    Returns each request's path and next token, the `top` likeliest ids after each node [B][N][K],
    and each request's probabilities [N, V].
    """
    controlled_BNV = apply_controls(logits_BNV, _list_states(requests, drafts))
    probs = probs_by_row([request.sampling for request in requests], controlled_BNV)
    verdicts = [
        verification.verifier(
            draft, probs_NV[: len(draft)], StepDraws(request.draws, len(request.tokens) - 1)
        )
        for request, draft, probs_NV in zip(requests, drafts, probs, strict=True)
    ]
    top_BNK = top_ids(logits_BNV, top) if top else None
    resolved, ids = resolve_paths(
        drafts, verdicts, all_finite=is_finite(logits_BNV), top_BNK=top_BNK
    )
    if top_BNK is None:
        return resolved, [], probs
    _, num_nodes, top = top_BNK.shape
    listed = [ids[start : start + top] for start in range(0, len(ids), top)]
    by_request = [listed[b * num_nodes : (b + 1) * num_nodes] for b in range(len(requests))]
    return resolved, by_request, probs


def _list_states(requests: Sequence[Request], drafts: Sequence[Draft]) -> list[list[ControlStates]]:
    """Return the control states at each node of each draft; none of requests without controls."""
    return [
        list(request.control_states().along(draft.tokens, draft.parents))
        if request.controls
        else []
        for request, draft in zip(requests, drafts, strict=True)
    ]


def _drop_finished(cache: TreeCache, drafter: Drafter, requests: list[Request]) -> list[Request]:
    """Remove finished requests from cache and drafter; return the others."""
    alive = [request for request in requests if request.finish_reason is None]
    # The last request stays in the cache when it ends: a later call may continue from it.
    if alive and len(alive) < len(requests):
        cache.select([b for b, request in enumerate(requests) if request.finish_reason is None])
        for request in requests:
            if request.finish_reason is not None:
                drafter.remove(request)
    return alive
