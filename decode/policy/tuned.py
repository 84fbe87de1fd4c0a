"""How large a tree pays here: the worth of nodes, and the choice by it and by the cost of passes.

`Tuned` wraps a drafter: it tracks how often nodes of each source and depth stand, and feeds the
tree with the most expected tokens a second, which may be none at all. It decides by past steps and
by where nodes come from, never by the tokens of drawn nodes, so neither greedy output nor the law
of sampled text depends on it; how sampled text comes out under a seed may, for drafts that are
drawn. Suffixes: B rows, N nodes fed for a row, the root included.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Sequence

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.policy import curve as curves
from spectool.decode.policy.curve import SIZES, Curve
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.processors import Waiting

# What is assumed of a node of a source that was never tried, and how many trials that is worth; of
# a younger sibling, which can only stand where the elder falls; and of a level. Of a level it is
# much, for good drafters whose levels are dear would never be tried otherwise.
_PRIOR, _WEIGHT, _YOUNGER, _LEVEL = 0.4, 2.0, 0.15, 0.8
# Rounds after which half of what is known of a source is forgotten: texts change.
_HALF_LIFE = 400.0
# A draft's share in what is known of a level's cost.
_FRESH = 0.1
# Drafting must promise so much more than plain decoding: costs are known no better than that.
_MARGIN = 1.03
# Where nothing seems to pay, a small tree is fed every so many rounds all the same; and in some
# rounds nothing, for all is measured against that.
_PROBED, _PROBE = 32, 4
_PLAIN = {4**power for power in range(1, 12)}
# Trying is paid for in plain steps: out of what drafting has gained so far, up to a limit, of a
# start, and of a share of the steps that did not draft. What is spent is earned anew up to some
# amount before drafting goes on, so drafting cannot cost more than start and share.
_START, _MOST, _SHARE, _AGAIN = 2.0, 16.0, 0.02, 0.5


class Rates:
    """How often a node of a source and depth stands when its parent does."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[float, float, int]] = {}

    def of(self, key: Hashable, now: int, prior: float = _PRIOR) -> float:
        """Between what was seen and what is assumed of the unseen."""
        hits, trials, then = self._known.get(key, (0.0, 0.0, now))
        kept: float = 0.5 ** ((now - then) / _HALF_LIFE)
        return (kept * hits + _WEIGHT * prior) / (kept * trials + _WEIGHT)

    def learn(self, key: Hashable, stood: bool, now: int) -> None:
        hits, trials, then = self._known.get(key, (0.0, 0.0, now))
        kept = 0.5 ** ((now - then) / _HALF_LIFE)
        self._known[key] = (kept * hits + stood, kept * trials + 1, now)


class Tuned(Drafter):
    """A drafter whose trees are cut to what pays, or its depth where the trees may not be cut.

    Knowledge of rates outlives batches; the curve may be shared.
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
        self._credit = _START
        self._rests = False
        # What a level costs to draft and holds, for drafters whose depth is chosen.
        self._level_seconds: float | None = None
        self._level_nodes = 1.0
        self._drafting = 0.0
        self._handed_over = 0.0
        self._fed = (1, 1)
        # Since the batch began.
        self._waiting = Waiting()

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return self.drafter.kinds(control)

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._waiting = Waiting()
        self.drafter.begin(prompts, cache)

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        began = time.perf_counter()
        self._round += 1
        drafts = [tree.root(row.tokens[-1]) for row in rows]
        if not self._rests and self._round not in _PLAIN:
            if self.drafter.combines:
                drafts = self._cut(self.drafter.propose(rows, budget), began)
            elif depth := self._best_depth(len(rows)):
                drafts = self.drafter.propose(rows, [min(depth, most) for most in budget])
                self._learn_level(drafts, time.perf_counter() - began)
        self._handed_over = time.perf_counter()
        self._drafting = self._handed_over - began
        self._fed = (len(rows), max(draft.num_rows for draft in drafts))
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        began = time.perf_counter()
        rows, nodes = self._fed
        self.curve.refine(rows * nodes, began - self._handed_over)
        for outcome in outcomes:
            self._learn(outcome)
        self.drafter.observe(outcomes)
        plain = self.curve.seconds(rows)
        timings = self._drafting + time.perf_counter() - began
        gained = -timings / plain
        if nodes > 1:
            tokens = sum(len(outcome.path) for outcome in outcomes) / rows
            gained += tokens - self.curve.seconds(rows * nodes) / plain
        else:
            gained += _SHARE
        self._credit = min(self._credit + gained, _MOST)
        self._rests = self._credit < (_AGAIN if self._rests else 0.0)

    def close(self) -> None:
        if self._waiting.share() > curves.BUSY:
            self.curve.quiet = False
        curves.keep(self._target, self.curve)
        self.drafter.close()

    def _learn(self, outcome: Outcome) -> None:
        draft, path = outcome.draft, set(outcome.path)
        if self.drafter.combines:
            for node in range(1, len(draft)):
                if draft.parents[node] in path:
                    self.rates.learn(_source(draft, node), node in path, self._round)
        else:
            for depth in range(1, 1 + min(max(draft.depths), len(path))):
                self.rates.learn(depth, depth < len(path), self._round)

    def _learn_level(self, drafts: Sequence[Draft], seconds: float) -> None:
        deepest = max(max(draft.depths) for draft in drafts)
        if deepest:
            known = self._level_seconds
            each = seconds / deepest
            self._level_seconds = each if known is None else known + _FRESH * (each - known)
            self._level_nodes = (max(draft.num_rows for draft in drafts) - 1) / deepest

    def _worth(self, draft: Draft) -> list[float]:
        """The probability that each node stands, as far as is known; 1 for the root."""
        worth, rates, elder = [1.0], [_PRIOR], {0}
        for node in range(1, len(draft)):
            parent = draft.parents[node]
            # An untried first child is taken to stand as often as its parent did.
            prior = rates[parent] if parent in elder else _YOUNGER
            elder.discard(parent)
            elder.add(node)
            rates.append(self.rates.of(_source(draft, node), self._round, prior))
            worth.append(worth[parent] * rates[node])
        return worth

    def _cut(self, drafts: list[Draft], began: float) -> list[Draft]:
        """Of each tree the likeliest nodes, as many of all as bring the most tokens a second."""
        worths = [self._worth(draft) for draft in drafts]
        # Worth falls along paths and the sort is stable, so parents stay before their children.
        orders = [sorted(range(len(w)), key=lambda node: -w[node]) for w in worths]
        sums = [
            list(itertools.accumulate(w[node] for node in order))
            for w, order in zip(worths, orders, strict=True)
        ]
        drafting = time.perf_counter() - began
        largest = max(map(len, drafts))
        best, best_rate = 1, 0.0
        for size in SIZES:
            # A size between two of these is fed as it is.
            size = min(size, largest)
            tokens = sum(total[min(size, len(total)) - 1] for total in sums)
            rate = tokens / (self.curve.seconds(len(drafts) * size) + drafting)
            if rate > best_rate:
                best, best_rate = size, rate * (_MARGIN if size == 1 else 1)
            if size == largest:
                break
        if best == 1 and self._round % _PROBED == 0:
            # Or what was never fed would never be known.
            best = min(_PROBE, largest)
        return [_kept(d, sorted(o[:best])) for d, o in zip(drafts, orders, strict=True)]

    def _best_depth(self, rows: int) -> int:
        """How deep to draft, where nodes of one depth are alike: chains, or levels of a tree."""
        level = self._level_seconds
        if level is None:
            # What a level costs is to be seen.
            return 1
        best, best_rate = 0, _MARGIN / self.curve.seconds(rows)
        tokens, standing, rate = 1.0, 1.0, _LEVEL
        for depth in range(1, max(SIZES)):
            # A level that was never reached is taken to stand as often as the one before.
            rate = self.rates.of(depth, self._round, rate)
            standing *= rate
            tokens += standing
            nodes = 1 + depth * self._level_nodes
            seconds = self.curve.seconds(round(rows * nodes)) + depth * level
            if tokens / seconds > best_rate:
                best, best_rate = depth, tokens / seconds
        return best


def _source(draft: Draft, node: int) -> Hashable:
    return None if draft.sources is None else draft.sources[node], draft.depths[node]


def _kept(draft: Draft, nodes: Sequence[int]) -> Draft:
    """The tree of these nodes alone, in their order; the root is among them."""
    places = {node: place for place, node in enumerate(nodes)}
    sources = draft.sources
    return Draft(
        [draft.tokens[node] for node in nodes],
        [-1, *(places[draft.parents[node]] for node in nodes[1:])],
        [draft.kinds[node] for node in nodes],
        sources=None if sources is None else [sources[node] for node in nodes],
    )
