"""Trees sized by what pays on this machine: the probability of nodes against the cost of passes.

`Tuned` tracks how often nodes of each source and depth are accepted, and feeds the trees with the
most expected tokens per second of all requests, which may be none at all. The sampled text under
one seed may depend on it, for drafts that are drawn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from spectool.decode.cache import BatchCache
from spectool.decode.policy.base import Policy
from spectool.decode.policy.costs import Costs
from spectool.decode.policy.curve import SIZES, Curve
from spectool.decode.protocol import Outcome
from spectool.decode.request import Request
from spectool.decode.tree import Draft

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
# A larger tree than the one that seems best is fed every this many rounds, and sooner where its
# cost was never seen; some rounds are plain, since plain decoding is the yardstick.
_PROBE_EVERY, _PROBE_UNSEEN_EVERY = 32, 8
_PLAIN_ROUNDS = {4**power for power in range(1, 12)}
# Plain steps of a batch size that come before its first drafts.
_PLAIN_FIRST = 2
# Credit for drafting, in plain steps: its start, its limit, what a step without a draft earns, and
# the amount at which drafting resumes after the credit ran out. Gains of drafting add to it, losses
# are paid from it, and no tree is fed that could lose more than is left, so that drafting cannot
# cost more than the start and the earnings. What observing costs is not counted: it is paid in
# every step. A debt, left by a draft that took long to make, has a limit, or drafting would never
# be tried again after costs that have long gone.
_START_CREDIT, _MAX_CREDIT, _STEP_CREDIT, _RESUME_CREDIT = 1.0, 16.0, 0.01, 0.5
_MAX_DEBT = 32.0


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


@dataclass(slots=True)
class _Account:
    """The rounds of batches of about one size, and the credit for drafting in them."""

    rounds: int = 0
    credit: float = _START_CREDIT
    resting: bool = False

    def pay(self, gain: float) -> None:
        """Add a gain, or a loss, of some plain steps."""
        self.credit = max(min(self.credit + gain, _MAX_CREDIT), -_MAX_DEBT)
        self.resting = self.credit < (_RESUME_CREDIT if self.resting else 0.0)


class Tuned(Policy):
    """Cuts trees to what pays, or without `cuts` chooses their depth.

    The rates outlive requests; the costs may be shared.
    """

    tunes = True

    def __init__(self, costs: Costs, *, cuts: bool) -> None:
        self.rates = Rates()
        self._costs, self._cuts = costs, cuts
        self._round = 0
        # By the number of binary digits of the batch size: what pays for one request may not for 8.
        self._accounts: defaultdict[int, _Account] = defaultdict(_Account)
        # Latest seconds and nodes per level, for drafters whose depth is chosen.
        self._level_seconds: deque[float] = deque(maxlen=_LATEST)
        self._level_nodes = 1.0
        # When this round began, whether it asks for drafts, and requests and nodes that it feeds.
        self._began, self._asks, self._fed = 0.0, False, (1, 1)
        # Seconds of the latest draft and of the one before.
        self._drafting, self._last_drafting = 0.0, 0.0

    @property
    def _curve(self) -> Curve:
        return self._costs.curve

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        self._began = time.perf_counter()
        self._costs.begin()
        batch = len(requests)
        account = self._accounts[batch.bit_length()]
        self._round += 1
        account.rounds += 1
        is_new = self._curve.visits(1, batch) < _PLAIN_FIRST
        if account.resting or is_new or account.rounds in _PLAIN_ROUNDS:
            budgets = [0] * batch
        elif not self._cuts:
            depth = self._best_depth(batch, account)
            budgets = [min(depth, most) for most in budgets]
        self._asks = any(budgets)
        return budgets

    def shape(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        if not self._cuts:
            self._update_level_cost(drafts, time.perf_counter() - self._began)
        elif any(len(draft) > 1 for draft in drafts):
            drafts = self._cut(drafts, self._accounts[len(drafts).bit_length()])
        self._drafting = time.perf_counter() - self._began
        self._fed = (len(drafts), max(draft.num_rows for draft in drafts))
        return drafts

    def learn(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        batch, nodes = self._fed
        curve = self._curve
        self._costs.learn(nodes, seconds, batch)
        for outcome in outcomes:
            self._update_rates(outcome)
        plain, gain = curve.seconds(1, batch), _STEP_CREDIT
        if nodes > 1:
            tokens = sum(len(outcome.path) for outcome in outcomes) / batch
            gain = tokens - curve.seconds(nodes, batch) / plain
        if self._asks:
            # A single disturbance is no cost of drafting: the cheaper of two rounds is charged.
            gain -= min(self._drafting, self._last_drafting) / plain
            self._last_drafting = self._drafting
        self._accounts[batch.bit_length()].pay(gain)

    def close(self) -> None:
        self._costs.close()

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

    def _cut(self, drafts: Sequence[Draft], account: _Account) -> list[Draft]:
        """Cut each tree to its likeliest nodes, at the size with the most tokens per second.

        Smaller trees of a pass are padded to the largest, so all may have as many nodes.
        """
        probs = [self._estimate_probs(draft) for draft in drafts]
        # Probabilities fall along paths and the sort is stable: parents stay before children.
        orders = [sorted(range(len(w)), key=lambda node: -w[node]) for w in probs]
        sums = [
            list(itertools.accumulate(w[node] for node in order))
            for w, order in zip(probs, orders, strict=True)
        ]
        drafting = time.perf_counter() - self._began
        curve, batch, largest = self._curve, len(drafts), max(map(len, drafts))
        # The largest tree need not be one of SIZES.
        sizes = [size for size in SIZES if size < largest] + [largest]
        rates = [
            sum(total[min(size, len(total)) - 1] for total in sums)
            / (curve.seconds(size, batch) + drafting)
            for size in sizes
        ]
        rates[0] *= _MARGIN
        best = self._choose(sizes, rates, batch, account)
        return [d.keep(sorted(o[:best])) for d, o in zip(drafts, orders, strict=True)]

    def _choose(
        self, sizes: Sequence[int], rates: Sequence[float], batch: int, account: _Account
    ) -> int:
        """Return the size of the best rate, or now and then the next larger one.

        Otherwise the rates of nodes that were never fed would stay unknown, and so would costs. No
        tree is more than twice as large as those of which the cost was seen, or the smallest, and
        none could lose more than the credit.
        """
        curve = self._curve
        most = max(sizes[1], 2 * curve.largest(batch))
        limit = (1 + max(0.0, account.credit)) * curve.seconds(1, batch)
        allowed = [0]
        for index, size in enumerate(sizes[1:], start=1):
            if size > most or curve.seconds(size, batch) > limit:
                break
            allowed.append(index)
        best = max(allowed, key=lambda index: rates[index])
        if best < allowed[-1]:
            is_seen = curve.visits(sizes[best + 1], batch) > 0
            if account.rounds % (_PROBE_EVERY if is_seen else _PROBE_UNSEEN_EVERY) == 0:
                best += 1
        return sizes[best]

    def _best_depth(self, batch: int, account: _Account) -> int:
        """Return how deep to draft, for drafters that propose chains or whole levels."""
        if not self._level_seconds:
            # One level, to measure its cost.
            return 1
        level, nodes = statistics.median_low(self._level_seconds), self._level_nodes
        depths, rates = [0], [_MARGIN / self._curve.seconds(1, batch)]
        tokens, reached, rate = 1.0, 1.0, _LEVEL_PRIOR
        for depth in range(1, max(SIZES)):
            # Prior of a level: the rate of the one before.
            rate = self.rates.estimate(depth, self._round, rate)
            reached *= rate
            tokens += reached
            seconds = self._curve.seconds(1 + depth * nodes, batch) + depth * level
            depths.append(depth)
            rates.append(tokens / seconds)
        sizes = [round(1 + depth * nodes) for depth in depths]
        best = self._choose(sizes, rates, batch, account)
        return depths[sizes.index(best)]


def _rate_key(draft: Draft, node: int) -> Hashable:
    """Return the key of a node in `Rates`."""
    return None if draft.sources is None else draft.sources[node], draft.depths[node]
