"""The engine: requests that share the passes of a target, and join and leave between steps.

A step feeds one chunk of waiting prompts, or drafts, verifies and commits once for every running
request. Before its draft is fed, the cache holds all committed tokens of a request but the last,
the pending root; the accepted path is committed in place, and the verifier's token is the new root.
The engine knows no method and no architecture. Drafting apart, a step synchronises with the device
once, in `resolve_paths`. Suffixes: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request, apply_controls, no_token_left
from spectool.decode.sampling import StepDraws, not_finite_logits, probs_by_row
from spectool.decode.target.base import Pass, PrefillOutput, Target, top_ids
from spectool.decode.tree import Draft
from spectool.decode.verify import accept_judged, resolve_paths

# Prompt tokens of a step, padding included: running requests wait for no more than these.
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Event:
    """Result of a step for a request: the tokens just committed, and the text they release.

    No commit is ever undone. The first `drafted` characters of the text were released by accepted
    drafts, the rest by the verifier's own token. `error` ended the request, and no other.
    """

    request: Request
    tokens: list[int]
    text: str
    drafted: int
    error: Exception | None = None


@dataclass(slots=True)
class Timings:
    """Seconds so far: drafting, prompt passes, and the passes of steps.

    The rest of the elapsed time is the engine's own overhead.
    """

    draft: float = 0.0
    prompt: float = 0.0
    target: float = 0.0


@dataclass(slots=True)
class _Joining:
    """Requests whose prompts are being fed, a row of `cache` each; `done` are the passes so far.

    `after`: the ended request whose row they continue.
    """

    requests: list[Request]
    cache: BatchCache
    after: Request | None
    done: list[PrefillOutput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Verified:
    """The accepted path of a request's draft, the token after it, and what the drafter may need.

    There is no token where the request's controls exclude all after the path.
    """

    path: list[int]
    token: int | None
    top: list[list[int]]
    probs_NV: Tensor


class Engine:
    """Decodes requests, at most `batch_size` at a time, in the order in which they were submitted.

    `timings` are added to. Requests of different contexts (`Target.span`) do not share passes.
    """

    def __init__(self, target: Target[Any], drafter: Drafter, timings: Timings) -> None:
        self.target, self.drafter, self.timings = target, drafter, timings
        self.batch_size = 1
        self.cache = target.cache(0)
        self._ids = itertools.count()
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._joining: _Joining | None = None
        self._running: list[Request] = []
        # Whether the last step fed prompts.
        self._fed = False
        # The request that ended last stays in the cache: the next one may continue it.
        self._kept: Request | None = None
        # Text that cancelled requests released, by their ids.
        self._released: dict[int, str] = {}

    @property
    def busy(self) -> bool:
        """Return whether a step has something to do."""
        return bool(self._waiting or self._joining or self._running)

    def submit(self, request: Request, *, continues: bool = False) -> int:
        """Add a request; return its id, for `cancel`.

        With `continues`, what the request that ended last left in the cache is used as far as it is
        a prefix of the prompt.
        """
        request.id = next(self._ids)
        self._waiting.append((request, continues))
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request where it is: the next step says so, and takes it out of the batch."""
        for request in self._list_requests():
            if request.id == request_id and request.finish_reason is None:
                before = "" if request.text is None else request.text.text
                request.interrupt()
                after = "" if request.text is None else request.text.text
                self._released[request_id] = after[len(before) :]

    def step(self) -> list[Event]:
        """Feed a chunk of prompts, or decode once; return what was committed, ends and errors.

        The two take turns while there is work for both.
        """
        events = self._sweep()
        if self._running and self._fed:
            self._fed = False
            return events + self._decode()
        self._admit()
        if self._joining is not None:
            self._fed = True
            return events + self._prefill(self._joining)
        return events + (self._decode() if self._running else [])

    def close(self) -> None:
        """Forget all requests, also in the drafter; needed after an error inside a step."""
        for request in [*self._list_requests(), *([self._kept] if self._kept else [])]:
            self.drafter.remove(request)
        self._waiting.clear()
        self._released.clear()
        self._running, self._joining, self._kept = [], None, None
        self.cache = self.target.cache(0)

    def _list_requests(self) -> list[Request]:
        """Return all requests that have not left."""
        joining = self._joining.requests if self._joining is not None else []
        return [*(request for request, _ in self._waiting), *joining, *self._running]

    def _sweep(self) -> list[Event]:
        """Remove requests that ended outside a step: cancelled ones, and prompts without room."""
        ended = [request for request in self._list_requests() if request.finish_reason is not None]
        if ended:
            left = [entry for entry in self._waiting if entry[0] not in ended]
            self._waiting = deque(left)
            # Several prompts never take more than a step.
            if self._joining is not None and self._joining.requests[0] in ended:
                self._joining = None
            self._drop([request for request in self._running if request in ended])
        return [Event(request, [], self._released.pop(request.id, ""), 0) for request in ended]

    def _admit(self) -> None:
        """Begin to feed waiting requests that fit.

        Short prompts pass together, as many as a chunk holds with their padding.
        """
        room = (self.batch_size if self.target.state_in_cache else 1) - len(self._running)
        if self._joining is not None or not self._waiting or room < 1:
            return
        first, continues = self._waiting[0]
        if self._running and first.context != self.cache.context:
            return
        follows = continues and self.target.state_in_cache and self.cache.context == first.context
        after = self._kept if follows else None
        requests: list[Request] = []
        while self._waiting and len(requests) < (room if after is None else 1):
            request = self._waiting[0][0]
            longest = max(len(each.text_tokens) for each in (*requests, request))
            apart = request.context != first.context or (len(requests) + 1) * longest > CHUNK
            if requests and apart:
                break
            requests.append(self._waiting.popleft()[0])
        cache = self.cache
        if after is None:
            cache = self.target.cache(len(requests), first.context)
            if self._kept is not None:
                self.drafter.remove(self._kept)
                self._kept = None
        cache.keep_prefix([request.tokens for request in requests])
        self._joining = _Joining(requests, cache, after)

    def _prefill(self, joining: _Joining) -> list[Event]:
        """Feed the next chunk of prompts; where they are complete, commit their first tokens.

        These tokens are never drafted.
        """
        began = time.perf_counter()
        # Where passes of several tokens after others are wrong, the first one takes the prompt.
        size = CHUNK if self.target.takes_drafts else self.target.context
        requests, held = joining.requests, joining.cache.lengths
        if not joining.done:
            self.target.begin(joining.cache, [request.source for request in requests])
        pairs = zip(requests, held, strict=True)
        parts = [request.tokens[start : start + size] for request, start in pairs]
        joining.done.append(self.target.prefill(joining.cache, parts, self.drafter.needs))
        if joining.cache.lengths[0] < len(requests[0].tokens):
            self.timings.prompt += time.perf_counter() - began
            return []
        drafts = [tree.root(request.tokens[-1]) for request in requests]
        observe = functools.partial(self.target.observe, requests, joining.cache)
        verified = _verify(requests, drafts, joining.done[-1].logits_BV[:, None], observe)
        self.timings.prompt += time.perf_counter() - began
        events, prompts = [], []
        for b, (request, found) in enumerate(zip(requests, verified, strict=True)):
            if found is None or found.token is None:
                events.append(Event(request, [], "", 0, request.error))
                continue
            request.count([0], 0, 1)
            (text,) = request.extend([found.token])
            events.append(Event(request, [found.token], text, 0))
            if request.finish_reason is None:
                prompts.append(_describe_prompt(joining, b))
        self._join(joining, prompts)
        return events

    def _join(self, joining: _Joining, prompts: list[PrefilledPrompt]) -> None:
        """Let requests run whose prompts were fed; `prompts` are those that did not end at once."""
        began = time.perf_counter()
        if self._running:
            self.cache.join(joining.cache)
        self.cache = self.cache if self._running else joining.cache
        self._running += joining.requests
        # It may also have ended while other prompts were fed, which do not continue it.
        kept, self._joining, self._kept = self._kept, None, None
        going = {prompt.request for prompt in prompts}
        self._drop([request for request in joining.requests if request not in going])
        if prompts:
            self.drafter.add(prompts, self.cache)
        if kept is not None:
            self.drafter.remove(kept)
        self.timings.draft += time.perf_counter() - began

    def _decode(self) -> list[Event]:
        """Draft, verify and commit once for every running request."""
        with self.target.limit_torch():
            return self._draft_and_commit()

    def _draft_and_commit(self) -> list[Event]:
        requests, needs = list(self._running), self.drafter.needs
        began = time.perf_counter()
        drafts = self._draft(requests)
        proposed = time.perf_counter()
        done = self.target.verify(self.cache, drafts, needs)
        fed = time.perf_counter()
        observe = functools.partial(self.target.observe, requests, self.cache)
        judged = self.drafter.judge(drafts, done.features)
        verified = _verify(requests, drafts, done.logits_BNV, observe, needs.top, judged)
        # On a GPU the pass has only been enqueued before its verdict is read.
        passed = fed if self.target.device.type == "cpu" else time.perf_counter()
        events: list[Event] = []
        outcomes: list[Outcome] = []
        paths: list[list[int]] = []
        for b, (request, draft, found) in enumerate(zip(requests, drafts, verified, strict=True)):
            if found is None:
                events.append(Event(request, [], "", 0, request.error))
                paths.append([])
                continue
            event, outcome = self._commit(request, draft, found, done, b)
            events.append(event)
            if outcome is not None:
                outcomes.append(outcome)
            paths.append([] if outcome is None else outcome.path)
        self.cache.commit([draft.tokens for draft in drafts], paths)
        self._drop([event.request for event in events if event.error is not None])
        committed = time.perf_counter()
        if outcomes:
            self.drafter.observe(outcomes)
            for policy in self.drafter.policies:
                policy.learn(outcomes, committed - proposed)
        self.timings.draft += proposed - began + time.perf_counter() - committed
        self.timings.target += passed - proposed
        self._drop([request for request in self._running if request.finish_reason is not None])
        return events

    def _draft(self, requests: Sequence[Request]) -> Sequence[Draft]:
        """Return a draft per request, as the drafter's policies size it."""
        # A node at depth d brings d + 1 tokens: itself, those above it and the verifier's own.
        budgets: Sequence[int] = [request.num_left - 1 for request in requests]
        for policy in self.drafter.policies:
            budgets = policy.limit(requests, budgets, self.cache)
        drafts: Sequence[Draft] = [tree.root(request.tokens[-1]) for request in requests]
        if any(budgets):
            drafts = self.drafter.propose(requests, budgets)
        for policy in self.drafter.policies:
            drafts = policy.shape(drafts)
        assert all(max(d.depths) <= b for d, b in zip(drafts, budgets, strict=True)), "over budget"
        return drafts

    def _commit(
        self, request: Request, draft: Draft, found: _Verified, done: Pass, row: int
    ) -> tuple[Event, Outcome | None]:
        """Commit a request's accepted path and the token after it; no outcome where it failed."""
        new = [draft.tokens[node] for node in found.path[1:]]
        num_drafted = len(new)
        if found.token is not None:
            new.append(found.token)
        texts = request.extend(new)
        taken = len(texts)
        request.count(draft.depths, min(taken, num_drafted), taken)
        if found.token is None and request.finish_reason is None:
            request.error = no_token_left(request)
        drafted = len("".join(texts[:num_drafted]))
        event = Event(request, new[:taken], "".join(texts), drafted, request.error)
        if request.error is not None:
            return event, None
        # Where a token inside the path ended the request, it becomes the root; later ones drop.
        path, needs, nodes = found.path[:taken], self.drafter.needs, slice(len(draft))
        outcome = Outcome(
            request=request,
            draft=draft,
            path=path,
            next_token=new[taken - 1],
            probs_NV=found.probs_NV[nodes] if needs.probs else None,
            extra_logits_NV=done.logits_BNV[row, len(draft) : draft.num_rows],
            top=found.top[nodes] if needs.top else [],
            features={name: f_BND[row, nodes] for name, f_BND in done.features.items()},
        )
        return event, outcome

    def _drop(self, ended: Sequence[Request]) -> None:
        """Take requests that ended out of the batch; the last one's row stays to be continued."""
        left = [request for request in self._running if request not in ended]
        stays = left
        if ended and not left and self._running[-1].error is None:
            self._kept = self._running[-1]
            stays = [self._kept]
        if len(stays) < len(self._running):
            self.cache.select([self._running.index(request) for request in stays])
        for request in ended:
            if request is not self._kept:
                self.drafter.remove(request)
        self._running = left


def _describe_prompt(joined: _Joining, row: int) -> PrefilledPrompt:
    """Return what the drafter may know of a prompt that was fed, in one chunk or several."""
    done = joined.done
    return PrefilledPrompt(
        request=joined.requests[row],
        logits_V=done[-1].logits_BV[row],
        top=lambda: [ids for part in done for ids in part.top[row]()],
        features={
            name: torch.cat([part.features[row][name] for part in done])
            for name in done[0].features[row]
        },
        after=joined.after,
    )


@torch.inference_mode()
def _verify(
    requests: Sequence[Request],
    drafts: Sequence[Draft],
    logits_BNV: Tensor,
    observe: Callable[[Tensor], None],
    top: int = 0,
    judged: Sequence[Tensor] | None = None,
) -> list[_Verified | None]:
    """Run each request's verifier on its draft; `top` likeliest ids are listed after each node.

    `observe` is given the logits as the controls left them. `judged` are the nodes that the drafter
    accepts besides (`Drafter.judge`). None stands for a request that failed; its `error` is set.
    """
    drafted = list(zip(requests, drafts, strict=True))
    controlled_BNV = apply_controls(
        requests,
        logits_BNV,
        lambda b: drafted[b][0].control_states().along(drafts[b].tokens, drafts[b].parents),
    )
    observe(controlled_BNV)
    probs = probs_by_row([request.sampling for request in requests], controlled_BNV)
    verdicts = [
        request.verification.verifier(
            draft, probs_NV[: len(draft)], StepDraws(request.draws, len(request.tokens) - 1)
        )
        for (request, draft), probs_NV in zip(drafted, probs, strict=True)
    ]
    if judged is not None:
        verdicts = list(map(accept_judged, drafts, verdicts, judged))
    top_BNK = top_ids(logits_BNV, top) if top else logits_BNV.new_zeros(0, dtype=torch.long)
    best_BN = logits_BNV.amax(-1)
    allowed_BN = best_BN if controlled_BNV is logits_BNV else controlled_BNV.amax(-1)
    flags = [best_BN.isfinite().all(-1), (allowed_BN > -torch.inf).flatten(), top_BNK.flatten()]
    resolved, extra = resolve_paths(drafts, verdicts, torch.cat(flags))
    num_nodes, num_ids = logits_BNV.shape[1], top_BNK.shape[-1]
    finite, allowed = extra[: len(requests)], extra[len(requests) :][: allowed_BN.numel()]
    ids = extra[len(requests) + len(allowed) :]
    # One list a node of the padded batch; all are empty where nothing was asked for.
    found: list[_Verified | None] = []
    for b, request in enumerate(requests):
        nodes = range(b * num_nodes, (b + 1) * num_nodes)
        path, token = _cut_path(*resolved[b], allowed[nodes.start : nodes.stop])
        if request.error is None:
            if not finite[b]:
                request.error = not_finite_logits("the model")
            elif token is None and path == [0]:
                request.error = no_token_left(request)
        by_node = [ids[node * num_ids : (node + 1) * num_ids] for node in nodes]
        failed = request.error is not None
        found.append(None if failed else _Verified(path, token, by_node, probs[b]))
    return found


def _cut_path(path: list[int], token: int, allowed: Sequence[int]) -> tuple[list[int], int | None]:
    """Cut a path after its first node that no token is allowed to follow."""
    for taken, node in enumerate(path, start=1):
        if not allowed[node]:
            return path[:taken], None
    return path, token
