"""Trees sized by what pays on this machine: the probability of nodes against the cost of passes.

`Tuned` wraps a drafter: it tracks how often nodes of each source and depth are accepted, and feeds
the tree with the most expected tokens per second, which may be none at all. It decides by past
steps and by the sources of nodes, never by the tokens of drawn nodes, so neither greedy output nor
the distribution of sampled text depends on it; the sampled text under one seed may, for drafts that
are drawn. Suffixes: B requests, N nodes fed for a request, the root included.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Sequence

from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.options import SamplingParams
from spectool.decode.policy import curve as curves
from spectool.decode.policy.curve import SIZES, Curve
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.processors import Waiting

# Prior acceptance rates: of a node from an untried source, with its weight in trials; of a later
# sibling, which can only be accepted if the first is rejected; and of a level. That of a level is
# high, or good drafters with expensive levels would never be tried.
_PRIOR, _PRIOR_WEIGHT, _SIBLING_PRIOR, _LEVEL_PRIOR = 0.4, 2.0, 0.15, 0.8
# Rounds after which the trials of a source count half: texts change.
_HALF_LIFE = 400.0
# Weight of the latest draft in the moving average of a level's cost.
_FRESH = 0.1
# Drafting must promise this factor over plain decoding: costs are known no better than that.
_MARGIN = 1.03
# If nothing seems to pay, a tree of this many nodes is fed every this many rounds all the same; and
# some rounds are plain, since plain decoding is the yardstick.
_PROBE_EVERY, _PROBE_NODES = 32, 4
_PLAIN_ROUNDS = {4**power for power in range(1, 12)}
# Credit for drafting, in plain steps: its start, its limit, what a step without a draft earns, and
# the amount at which drafting resumes after the credit ran out. Gains of drafting add to it, losses
# are paid from it, so drafting cannot cost more than the start and the earnings.
_START_CREDIT, _MAX_CREDIT, _STEP_CREDIT, _RESUME_CREDIT = 2.0, 16.0, 0.02, 0.5


class Rates:
    """The acceptance rates of nodes by source and depth, given that the parent was accepted."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[float, float, int]] = {}

    def estimate(self, key: Hashable, now: int, prior: float = _PRIOR) -> float:
        """Estimate a rate from discounted trials and a prior."""
        accepted, trials, then = self._known.get(key, (0.0, 0.0, now))
        discount: float = 0.5 ** ((now - then) / _HALF_LIFE)
        return (discount * accepted + _PRIOR_WEIGHT * prior) / (discount * trials + _PRIOR_WEIGHT)

    def update(self, key: Hashable, was_accepted: bool, now: int) -> None:
        """Count a trial in round `now`."""
        accepted, trials, then = self._known.get(key, (0.0, 0.0, now))
        discount = 0.5 ** ((now - then) / _HALF_LIFE)
        self._known[key] = (discount * accepted + was_accepted, discount * trials + 1, now)


class Tuned(Drafter):
    """A drafter whose trees are cut to what pays, or its depth where the trees may not be cut.

    The rates outlive batches; the curve may be shared.
    """

    combines = False

    def __init__(self, drafter: Drafter, target: Target, curve: Curve) -> None:
        self.drafter = drafter
        self.name = drafter.name
        self.needs = drafter.needs
        self.curve = curve
        self.rates = Rates()
        self._target = target
        self._round = 0
        self._credit = _START_CREDIT
        self._resting = False
        # Seconds and nodes per level, for drafters whose depth is chosen.
        self._level_seconds: float | None = None
        self._level_nodes = 1.0
        self._drafting = 0.0
        self._proposed_at = 0.0
        self._last_shape = (1, 1)
        # Since the batch began.
        self._waiting = Waiting()

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return self.drafter.kinds(sampling)

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        self._waiting = Waiting()
        self.drafter.add(prompts, cache)

    def remove(self, request: Request) -> None:
        self.drafter.remove(request)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        began = time.perf_counter()
        self._round += 1
        drafts = [tree.root(request.tokens[-1]) for request in requests]
        if not self._resting and self._round not in _PLAIN_ROUNDS:
            if self.drafter.combines:
                drafts = self._cut(self.drafter.propose(requests, budget), began)
            elif depth := self._best_depth(len(requests)):
                drafts = self.drafter.propose(requests, [min(depth, most) for most in budget])
                self._update_level_cost(drafts, time.perf_counter() - began)
        self._proposed_at = time.perf_counter()
        self._drafting = self._proposed_at - began
        self._last_shape = (len(requests), max(draft.num_rows for draft in drafts))
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        began = time.perf_counter()
        num_requests, nodes = self._last_shape
        self.curve.refine(num_requests * nodes, began - self._proposed_at)
        for outcome in outcomes:
            self._update_rates(outcome)
        self.drafter.observe(outcomes)
        plain = self.curve.seconds(num_requests)
        timings = self._drafting + time.perf_counter() - began
        gain = -timings / plain
        if nodes > 1:
            tokens = sum(len(outcome.path) for outcome in outcomes) / num_requests
            gain += tokens - self.curve.seconds(num_requests * nodes) / plain
        else:
            gain += _STEP_CREDIT
        self._credit = min(self._credit + gain, _MAX_CREDIT)
        self._resting = self._credit < (_RESUME_CREDIT if self._resting else 0.0)

    def close(self) -> None:
        if self._waiting.share() > curves.BUSY:
            self.curve.quiet = False
        curves.store_curve(self._target, self.curve)
        self.drafter.close()

    def _update_rates(self, outcome: Outcome) -> None:
        """Update the rates by the nodes whose parent was accepted."""
        draft, path = outcome.draft, set(outcome.path)
        if self.drafter.combines:
            for node in range(1, len(draft)):
                if draft.parents[node] in path:
                    self.rates.update(_rate_key(draft, node), node in path, self._round)
        else:
            for depth in range(1, 1 + min(max(draft.depths), len(path))):
                self.rates.update(depth, depth < len(path), self._round)

    def _update_level_cost(self, drafts: Sequence[Draft], seconds: float) -> None:
        """Update the seconds and nodes per level."""
        deepest = max(max(draft.depths) for draft in drafts)
        if deepest:
            average = self._level_seconds
            latest = seconds / deepest
            self._level_seconds = (
                latest if average is None else average + _FRESH * (latest - average)
            )
            self._level_nodes = (max(draft.num_rows for draft in drafts) - 1) / deepest

    def _estimate_probs(self, draft: Draft) -> list[float]:
        """Return the estimated probability that each node is accepted; 1 for the root."""
        probs, rates, childless = [1.0], [_PRIOR], {0}
        for node in range(1, len(draft)):
            parent = draft.parents[node]
            # Prior of a first child: the rate of its parent.
            prior = rates[parent] if parent in childless else _SIBLING_PRIOR
            childless.discard(parent)
            childless.add(node)
            rates.append(self.rates.estimate(_rate_key(draft, node), self._round, prior))
            probs.append(probs[parent] * rates[node])
        return probs

    def _cut(self, drafts: list[Draft], began: float) -> list[Draft]:
        """Cut each tree to its likeliest nodes, at the size with the most tokens per second."""
        probs = [self._estimate_probs(draft) for draft in drafts]
        # Probabilities fall along paths and the sort is stable: parents stay before children.
        orders = [sorted(range(len(w)), key=lambda node: -w[node]) for w in probs]
        sums = [
            list(itertools.accumulate(w[node] for node in order))
            for w, order in zip(probs, orders, strict=True)
        ]
        drafting = time.perf_counter() - began
        largest = max(map(len, drafts))
        best, best_rate = 1, 0.0
        for size in SIZES:
            # The largest tree need not be one of SIZES.
            size = min(size, largest)
            tokens = sum(total[min(size, len(total)) - 1] for total in sums)
            rate = tokens / (self.curve.seconds(len(drafts) * size) + drafting)
            if rate > best_rate:
                best, best_rate = size, rate * (_MARGIN if size == 1 else 1)
            if size == largest:
                break
        if best == 1 and self._round % _PROBE_EVERY == 0:
            # Otherwise the rates of nodes that were never fed would stay unknown.
            best = min(_PROBE_NODES, largest)
        return [_keep_nodes(d, sorted(o[:best])) for d, o in zip(drafts, orders, strict=True)]

    def _best_depth(self, num_requests: int) -> int:
        """Return how deep to draft, for drafters that propose chains or whole levels."""
        level = self._level_seconds
        if level is None:
            # One level, to measure its cost.
            return 1
        best, best_rate = 0, _MARGIN / self.curve.seconds(num_requests)
        tokens, reached, rate = 1.0, 1.0, _LEVEL_PRIOR
        for depth in range(1, max(SIZES)):
            # Prior of a level: the rate of the one before.
            rate = self.rates.estimate(depth, self._round, rate)
            reached *= rate
            tokens += reached
            nodes = 1 + depth * self._level_nodes
            seconds = self.curve.seconds(round(num_requests * nodes)) + depth * level
            if tokens / seconds > best_rate:
                best, best_rate = depth, tokens / seconds
        return best


def _rate_key(draft: Draft, node: int) -> Hashable:
    """Return the key of a node in `Rates`."""
    return None if draft.sources is None else draft.sources[node], draft.depths[node]


def _keep_nodes(draft: Draft, nodes: Sequence[int]) -> Draft:
    """Return the tree of these nodes in ascending order, the root among them."""
    index_of = {node: index for index, node in enumerate(nodes)}
    sources = draft.sources
    return Draft(
        [draft.tokens[node] for node in nodes],
        [-1, *(index_of[draft.parents[node]] for node in nodes[1:])],
        [draft.kinds[node] for node in nodes],
        sources=None if sources is None else [sources[node] for node in nodes],
    )
