"""How large a tree pays here: the cost of passes, the worth of nodes, and the choice between them.

`Curve` is T(n), the seconds of a pass of n tokens, measured when a model is loaded and refined by
every step. `Tuned` wraps a drafter: it tracks how often nodes of each source and depth stand, and
feeds the tree with the most expected tokens a second, which may be none at all. It decides by past
steps and by where nodes come from, never by the tokens of drawn nodes, so neither greedy output nor
the law of sampled text depends on it; how sampled text comes out under a seed may, for drafts that
are drawn. Suffixes: B rows, N nodes fed for a row, the root included.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from spectool import machine
from spectool.artifact import disk_errors
from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.errors import SpectoolError

# Sizes that are measured and chosen among, and the order of measuring: what matters most first.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ORDER = (1, 8, 2, 32, 4, 16, 3, 64, 12, 6, 24, 48)
# Seconds that measuring may take when a model is loaded; a pass that has begun is finished.
_SECONDS = 0.7
_CONTEXT = 64
_REPEATS = 5
# Where only T(1) is known, a further token is taken to cost this share of it.
_SLOPE = 0.25
# A step's share in what is known of its size; a hiccup counts as no more than so many times that.
_FRESH, _HICCUP = 0.1, 3.0


class Curve:
    """Seconds of a pass by the number of tokens in it. `found` says how it came about."""

    def __init__(self, points: dict[int, float], found: str = "measured") -> None:
        assert 1 in points
        self.points = points
        self.found = found

    def seconds(self, tokens: int) -> float:
        """Interpolated between the sizes that are known, and never falling."""
        sizes = sorted(self.points)
        rising = list(itertools.accumulate((self.points[n] for n in sizes), max))
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return rising[at]
        if len(sizes) == 1:
            return rising[0] * (1 + _SLOPE * (tokens - 1))
        low = min(max(at - 1, 0), len(sizes) - 2)
        slope = (rising[low + 1] - rising[low]) / (sizes[low + 1] - sizes[low])
        return rising[low] + slope * (tokens - sizes[low])

    def refine(self, tokens: int, seconds: float) -> None:
        """Take a step into account. A size that was not measured begins as interpolated."""
        expected = self.seconds(tokens)
        if tokens in SIZES:
            seconds = min(seconds, _HICCUP * expected)
            self.points[tokens] = expected + _FRESH * (seconds - expected)

    def __str__(self) -> str:
        shown = [n for n in (2, 4, 8, 16, 32, 64) if n in self.points]
        ratios = ", ".join(f"{n} at {self.seconds(n) / self.seconds(1):.1f}" for n in shown)
        one = f"a token takes {1e3 * self.seconds(1):.1f} ms ({self.found})"
        return f"{one}, {ratios} times that" if shown else one


@torch.inference_mode()
def measure(target: Target) -> Curve:
    """Passes of growing chains after a short context, the real mask and cache included."""
    vocabulary = target.vocab_size
    length = max(1, min(_CONTEXT, target.context - max(SIZES)))
    cache = target.cache(1)
    target.ingest(cache, [[at % vocabulary for at in range(length)]])
    points: dict[int, float] = {}
    began = time.perf_counter()
    for size in _ORDER:
        if 1 < size > target.context - length:
            continue
        draft = tree.chain([at % vocabulary for at in range(size)], kind="deterministic")
        times = []
        # The first pass of a size pays for what is made once.
        for repeat in range(_REPEATS + 1):
            start = time.perf_counter()
            target.verify(cache, [draft]).logits_BNV[0, 0, 0].item()
            times.append(time.perf_counter() - start)
            if time.perf_counter() - began > _SECONDS and repeat > 0:
                break
        points[size] = min(times[1:])
        if time.perf_counter() - began > _SECONDS:
            break
    return Curve(points, f"measured in {time.perf_counter() - began:.1f} s")


def curve_of(target: Target) -> Curve:
    """The curve that an earlier run left here for such a model, or a measured one, which is left.

    It is kept by architecture and size, dtype, device and threads: what a pass's time depends on.
    """
    known, key = read_curves(), _key(target)
    if key in known:
        return Curve(dict(known[key]), "known from before")
    curve = measure(target)
    keep(target, curve)
    return curve


def keep(target: Target, curve: Curve) -> None:
    """Leave the curve for later runs; one that cannot be left is no reason to fail."""
    path = curves_path()
    known = {**read_curves(), _key(target): {n: s for n, s in curve.points.items() if n in SIZES}}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
    except SpectoolError:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_curves() -> dict[str, dict[int, float]]:
    """All curves kept here, by what they are of; none where the file is absent or damaged."""
    try:
        said: Any = json.loads(curves_path().read_text(encoding="utf-8"))
        return {
            str(key): {int(n): float(seconds) for n, seconds in points.items()}
            for key, points in said.items()
            if min(points.values()) > 0 and "1" in points
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def curves_path() -> Path:
    """Where curves are kept: the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "spectool" / "curves.json"


def _key(target: Target) -> str:
    parts = list(target.model.parameters()) + list(target.model.buffers())
    millions = sum(part.numel() * part.element_size() for part in parts) / 1e6
    dtype = str(target.dtype).removeprefix("torch.")
    where = (
        f"{machine.processor()}, {torch.get_num_threads()} threads"
        if target.device.type == "cpu"
        else torch.cuda.get_device_name(target.device)
    )
    layers = f"{target.num_layers} layers"
    return (
        f"{target.name}, {layers}, {millions:.1f} MB, {dtype}; {where}; torch {torch.__version__}"
    )


# What is assumed of a node of a source that was never tried, and how many trials that is worth.
_PRIOR, _WEIGHT = 0.4, 2.0
# Rounds after which half of what is known of a source is forgotten: texts change.
_HALF_LIFE = 400.0
# Where nothing seems to pay, a small tree is fed every so many rounds all the same.
_PROBED, _PROBE = 32, 4
# Drafting goes on while it brings this much of plain decoding's speed; it is judged by its latest
# rounds, rests when it brings less, and is tried again after ever longer rests.
_WORTH, _JUDGED, _REST, _LONGEST_REST = 1.0, 12, 16, 256


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
        self._resting = 0
        self._rests = False
        self._rest = _REST
        # Tokens and seconds of the rounds that drafted since the last rest, and how many they were.
        self._drafted: list[tuple[float, float]] = []
        # What a level costs to draft and holds, for drafters whose depth is chosen.
        self._level_seconds = 0.0
        self._level_nodes = 1.0
        # Of plain steps, by the rows of the batch.
        self._plain_seconds: dict[int, float] = {}
        self._proposing = 0.0
        self._handed_over = 0.0
        self._fed = (1, 1)

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return self.drafter.kinds(control)

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)

    def begin(self, prompts: Sequence[Prompt], cache: TreeCache) -> None:
        self.drafter.begin(prompts, cache)

    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        began = time.perf_counter()
        self._round += 1
        self._rests = self._resting > 0
        if self._rests:
            self._resting -= 1
            drafts = [tree.root(row.tokens[-1]) for row in rows]
        elif self.drafter.combines:
            drafts = self._cut(self.drafter.propose(rows, budget), began)
        else:
            depth = self._best_depth(len(rows))
            drafts = [tree.root(row.tokens[-1]) for row in rows]
            if depth:
                drafts = self.drafter.propose(rows, [min(depth, most) for most in budget])
                deepest = max(max(draft.depths) for draft in drafts)
                if deepest:
                    spent = (time.perf_counter() - began) / deepest
                    fresh = _FRESH if self._level_seconds else 1.0
                    self._level_seconds += fresh * (spent - self._level_seconds)
                    self._level_nodes = (max(map(len, drafts)) - 1) / deepest
        self._handed_over = time.perf_counter()
        self._proposing = self._handed_over - began
        self._fed = (len(rows), max(map(len, drafts)))
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        seconds = time.perf_counter() - self._handed_over
        rows, nodes = self._fed
        self.curve.refine(rows * nodes, seconds)
        if nodes == 1:
            known = self._plain_seconds.get(rows, seconds)
            self._plain_seconds[rows] = known + _FRESH * (seconds - known)
        for outcome in outcomes:
            self._learn(outcome)
        if not self._rests:
            tokens = sum(len(outcome.path) for outcome in outcomes)
            self._judge(tokens / rows, seconds + self._proposing)
        self.drafter.observe(outcomes)

    def close(self) -> None:
        keep(self._target, self.curve)
        self.drafter.close()

    def _judge(self, tokens: float, seconds: float) -> None:
        """Rest if the latest rounds brought less than plain decoding would have."""
        self._drafted.append((tokens, seconds))
        if len(self._drafted) < _JUDGED:
            return
        tokens = sum(pair[0] for pair in self._drafted)
        seconds = sum(pair[1] for pair in self._drafted)
        self._drafted.clear()
        rows = self._fed[0]
        plain = self._plain_seconds.get(rows) or self.curve.seconds(rows)
        if tokens * plain < _WORTH * seconds:
            self._resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
        else:
            self._rest = _REST

    def _learn(self, outcome: Outcome) -> None:
        draft, path = outcome.draft, set(outcome.path)
        if self.drafter.combines:
            for node in range(1, len(draft)):
                if draft.parents[node] in path:
                    self.rates.learn(_source(draft, node), node in path, self._round)
        else:
            for depth in range(1, 1 + min(max(draft.depths), len(path))):
                self.rates.learn(depth, depth < len(path), self._round)

    def _worth(self, draft: Draft) -> list[float]:
        """The probability that each node stands, as far as is known; 1 for the root."""
        worth, rates, elder = [1.0], [_PRIOR], {0}
        for node in range(1, len(draft)):
            parent = draft.parents[node]
            # An untried first child is taken to stand as often as its parent did.
            prior = rates[parent] if parent in elder else _PRIOR
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
                best, best_rate = size, rate
            if size == largest:
                break
        if best == 1 and self._round % _PROBED == 0:
            # Or what was never fed would never be known.
            best = min(_PROBE, largest)
        return [_kept(d, sorted(o[:best])) for d, o in zip(drafts, orders, strict=True)]

    def _best_depth(self, rows: int) -> int:
        """How deep to draft, where nodes of one depth are alike: chains, or levels of a tree."""
        best, best_rate, tokens, standing, rate = 0, 1 / self.curve.seconds(rows), 1.0, 1.0, _PRIOR
        for depth in range(1, max(SIZES)):
            # A level that was never reached is taken to stand as often as the one before.
            rate = self.rates.of(depth, self._round, rate)
            standing *= rate
            tokens += standing
            nodes = 1 + depth * self._level_nodes
            seconds = self.curve.seconds(round(rows * nodes)) + depth * self._level_seconds
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
