"""Trees sized by what pays on this machine: the probability of nodes against the cost of passes.

`Tuned` tracks how often nodes of each source and depth are accepted, and feeds the tree with the
most expected tokens per second, which may be none at all. The sampled text under one seed may
depend on it, for drafts that are drawn. Suffixes: B requests, N nodes fed for a request, the root
included.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

from spectool.decode.cache import BatchCache
from spectool.decode.policy import curve as curves
from spectool.decode.policy.base import Policy
from spectool.decode.policy.curve import SIZES, Curve
from spectool.decode.protocol import Outcome
from spectool.decode.request import Request
from spectool.decode.target.base import Target
from spectool.decode.tree import Draft
from spectool.processors import Waiting

# Prior acceptance rates: of a node from an untried source, with its weight in trials; of a later
# sibling, which can only be accepted if the first is rejected; and of a level. That of a level is
# high, or good drafters with expensive levels would never be tried.
_PRIOR, _PRIOR_WEIGHT, _SIBLING_PRIOR, _LEVEL_PRIOR = 0.4, 2.0, 0.15, 0.8
# Rounds after which the trials of a source count half: texts change.
_HALF_LIFE = 400.0
# A level's cost is the median of this many drafts.
_LATEST = 5
# Drafting must promise this factor over plain decoding: costs are known no better than that.
_MARGIN = 1.03
# If nothing seems to pay, a tree of this many nodes is fed every this many rounds all the same; and
# some rounds are plain, since plain decoding is the yardstick.
_PROBE_EVERY, _PROBE_NODES = 32, 4
_PLAIN_ROUNDS = {4**power for power in range(1, 12)}
# Credit for drafting, in plain steps: its start, its limit, what a step without a draft earns, and
# the amount at which drafting resumes after the credit ran out. Gains of drafting add to it, losses
# are paid from it, so drafting cannot cost more than the start and the earnings. What observing
# costs is not counted: it is paid in every step. A debt has a limit, or drafting would never be
# tried again after costs that have long gone.
_START_CREDIT, _MAX_CREDIT, _STEP_CREDIT, _RESUME_CREDIT = 2.0, 16.0, 0.02, 0.5
_MAX_DEBT = 64.0


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


class Tuned(Policy):
    """Cuts trees to what pays, or without `cuts` chooses their depth.

    The rates outlive requests; the curve may be shared.
    """

    tunes = True

    def __init__(self, target: Target[Any], curve: Curve, *, cuts: bool) -> None:
        self.curve = curve
        self.rates = Rates()
        self._target, self._cuts = target, cuts
        self._round = 0
        self._credit = _START_CREDIT
        self._resting = False
        # Latest seconds and nodes per level, for drafters whose depth is chosen.
        self._level_seconds: deque[float] = deque(maxlen=_LATEST)
        self._level_nodes = 1.0
        # When this round began, whether it asks for drafts, and requests and nodes that it feeds.
        self._began, self._asks, self._fed = 0.0, False, (1, 1)
        # Seconds of the latest draft and of the one before.
        self._drafting, self._last_drafting = 0.0, 0.0
        # Since the policy was made.
        self._waiting = Waiting()

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        self._began = time.perf_counter()
        self._round += 1
        if self._resting or self._round in _PLAIN_ROUNDS:
            budgets = [0] * len(requests)
        elif not self._cuts:
            depth = self._best_depth(len(requests))
            budgets = [min(depth, most) for most in budgets]
        self._asks = any(budgets)
        return budgets

    def shape(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        if not self._cuts:
            self._update_level_cost(drafts, time.perf_counter() - self._began)
        elif any(len(draft) > 1 for draft in drafts):
            drafts = self._cut(drafts)
        self._drafting = time.perf_counter() - self._began
        self._fed = (len(drafts), max(draft.num_rows for draft in drafts))
        return drafts

    def learn(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        num_requests, nodes = self._fed
        self.curve.refine(num_requests * nodes, seconds)
        for outcome in outcomes:
            self._update_rates(outcome)
        plain, gain = self.curve.seconds(num_requests), _STEP_CREDIT
        if nodes > 1:
            tokens = sum(len(outcome.path) for outcome in outcomes) / num_requests
            gain = tokens - self.curve.seconds(num_requests * nodes) / plain
        if self._asks:
            # A single disturbance is no cost of drafting: the cheaper of two rounds is charged.
            gain -= min(self._drafting, self._last_drafting) / plain
            self._last_drafting = self._drafting
        self._credit = max(min(self._credit + gain, _MAX_CREDIT), -_MAX_DEBT)
        self._resting = self._credit < (_RESUME_CREDIT if self._resting else 0.0)

    def close(self) -> None:
        if self._waiting.share() > curves.BUSY:
            self.curve.quiet = False
        curves.store_curve(self._target, self.curve)

    def _update_rates(self, outcome: Outcome) -> None:
        """Update the rates by the nodes whose parent was accepted."""
        draft, path = outcome.draft, set(outcome.path)
        if self._cuts:
            for node in range(1, len(draft)):
                if draft.parents[node] in path:
                    self.rates.update(_rate_key(draft, node), node in path, self._round)
        else:
            for depth in range(1, 1 + min(max(draft.depths), len(path))):
                self.rates.update(depth, depth < len(path), self._round)

    def _update_level_cost(self, drafts: Sequence[Draft], seconds: float) -> None:
        """Update the seconds and nodes per level."""
        if deepest := max(max(draft.depths) for draft in drafts):
            self._level_seconds.append(seconds / deepest)
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

    def _cut(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Cut each tree to its likeliest nodes, at the size with the most tokens per second."""
        probs = [self._estimate_probs(draft) for draft in drafts]
        # Probabilities fall along paths and the sort is stable: parents stay before children.
        orders = [sorted(range(len(w)), key=lambda node: -w[node]) for w in probs]
        sums = [
            list(itertools.accumulate(w[node] for node in order))
            for w, order in zip(probs, orders, strict=True)
        ]
        drafting = time.perf_counter() - self._began
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
        return [d.keep(sorted(o[:best])) for d, o in zip(drafts, orders, strict=True)]

    def _best_depth(self, num_requests: int) -> int:
        """Return how deep to draft, for drafters that propose chains or whole levels."""
        if not self._level_seconds:
            # One level, to measure its cost.
            return 1
        level = statistics.median_low(self._level_seconds)
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
        # As in `_cut`: what a level costs and brings would stay what it was.
        return best or int(self._round % _PROBE_EVERY == 0)


def _rate_key(draft: Draft, node: int) -> Hashable:
    """Return the key of a node in `Rates`."""
    return None if draft.sources is None else draft.sources[node], draft.depths[node]
