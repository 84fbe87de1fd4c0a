"""T(n, b, e): the seconds of a step of n nodes for each of b requests, which reads e experts.

The curve is learnt from the steps of a run, so that no token waits for it, and is stored. Decisions
depend on the shape, on how much more n nodes cost than one: when the machine becomes slower or
faster, all sizes follow. Rows are the nodes of all requests.
"""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectool import machine
from spectool.decode.target.base import Target
from spectool.errors import SpectoolError
from spectool.files import read_cache, write_cache
from spectool.model.kernels import precision_of, product_bytes

# The curves' file in the cache folder. Files before format 2 have no batches: they are not read.
FILE, FORMAT = "curves.json", 2
# Nodes of a request that are chosen among.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Where nothing is known, each further row is assumed to cost this share of a row alone.
_SLOPE = 0.25
# Weights of a step's deviation: for all sizes, and at least for its own size, which moves more
# while it has few visits (those of a stored curve count as four). Outliers are clipped to this
# factor.
_DRIFT, _SHAPE, _STORED_VISITS, _CLIP = 0.25, 0.05, 4, 1.5
# A curve has drifted if this many steps in a row found it off by more than this factor.
_BAND, _STEPS = 1.5, 8


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of a layer, those a token is sent to, and their share of what a token reads."""

    count: int
    chosen: int
    share: float

    def reads(self, rows: float) -> float:
        """Return the weights that a pass of some rows reads, relative to those of one row.

        A row leaves out an expert with probability 1 - chosen / count, whatever the others choose.
        """
        left_out: float = (1 - self.chosen / self.count) ** rows
        return 1 - self.share + self.share * self.count / self.chosen * (1 - left_out)


class _Batch:
    """Seconds of steps of one batch size, by nodes per request. `visits` count the steps seen."""

    def __init__(self, points: dict[int, float], visits: int) -> None:
        self.points = points
        self.visits = dict.fromkeys(points, visits)
        self.update()

    def update(self) -> None:
        """Recompute the sorted sizes and their non-decreasing seconds."""
        self.sizes = sorted(self.points)
        falling = itertools.accumulate((self.points[n] for n in reversed(self.sizes)), min)
        self.rising = list(falling)[::-1]


class Curve:
    """Seconds of a step by its nodes per request and its requests.

    `points` are those known, by batch size and nodes. `origin` says where they come from. A curve
    that is not `quiet` was refined while other processes kept processors busy; it holds now, but
    not later.
    """

    def __init__(
        self,
        points: Mapping[int, Mapping[int, float]] | None = None,
        origin: str = "learnt as it runs",
        *,
        experts: Experts | None = None,
    ) -> None:
        known = points or {}
        self.origin = origin
        self.quiet = True
        self._experts = experts
        self._batches = {
            batch: _Batch(dict(known[batch]), _STORED_VISITS) for batch in sorted(known)
        }
        # How all sizes moved since the curve was last believed, and for how many steps too far.
        self._level, self._steps_off = 1.0, 0

    @property
    def points(self) -> dict[int, dict[int, float]]:
        """Return the seconds of sizes that steps were seen of, by batch size and nodes."""
        return {
            batch: {n: known.points[n] for n in known.sizes if known.visits.get(n)}
            for batch, known in self._batches.items()
            if any(known.visits.values())
        }

    def visits(self, nodes: int, batch: int = 1) -> int:
        """Return how many steps of this size were seen."""
        known = self._batches.get(batch)
        return known.visits.get(_nearest(nodes), 0) if known is not None else 0

    def largest(self, batch: int = 1) -> float:
        """Return the most nodes per request that are known: of this batch size, or as many rows."""
        return max(
            (
                n * min(1.0, other / batch)
                for other, known in self._batches.items()
                for n, visits in known.visits.items()
                if visits
            ),
            default=0.0,
        )

    def seconds(self, nodes: float, batch: int = 1) -> float:
        """Return the seconds of a step, interpolated between what is known; more nodes cost more.

        A step costs no more than one of more nodes: so a size that was slow by accident is tried
        again. A batch size that was not seen is between the next smaller one at as many rows, and
        the next larger one at as many nodes.
        """
        if batch in self._batches:
            return self._in_batch(nodes, batch)
        assert self._batches, "no step was seen"
        below = max((other for other in self._batches if other < batch), default=None)
        above = min((other for other in self._batches if other > batch), default=None)
        if below is None:
            assert above is not None
            return self._in_batch(nodes, above)
        low = self._in_batch(nodes * batch / below, below)
        if above is None:
            return low
        high = self._in_batch(nodes, above)
        return low + (batch - below) / (above - below) * max(0.0, high - low)

    def _in_batch(self, nodes: float, batch: int) -> float:
        """Interpolate between the known sizes of a batch, in proportion to the work of rows."""
        known = self._batches[batch]
        sizes, rising = known.sizes, known.rising
        at = bisect_left(sizes, nodes)
        if at < len(sizes) and sizes[at] == nodes:
            return rising[at]
        if len(sizes) == 1:
            return rising[0] * self._work(nodes * batch) / self._work(sizes[0] * batch)
        low = min(max(at - 1, 0), len(sizes) - 2)
        begin, end = self._work(sizes[low] * batch), self._work(sizes[low + 1] * batch)
        slope = (rising[low + 1] - rising[low]) / (end - begin)
        return rising[low] + slope * (self._work(nodes * batch) - begin)

    def _work(self, rows: float) -> float:
        """Return what rows are assumed to cost where nothing is known; one row costs 1."""
        reads = 1.0 if self._experts is None else self._experts.reads(rows)
        return reads + _SLOPE * (rows - 1)

    def refine(self, nodes: int, seconds: float, batch: int = 1) -> None:
        """Take a step into account, at the nearest of the sizes that are chosen among."""
        known = self._batches.get(batch) or self._open(batch, nodes, seconds)
        size = _nearest(nodes)
        visits = known.visits.get(size, 0)
        expected = self.seconds(nodes, batch)
        own = known.points.get(size) or self.seconds(size, batch)
        if size == nodes:
            expected = own
        change = min(max(seconds / expected, 1 / _CLIP), _CLIP) - 1
        # The first step of a size tells about the shape of the curve, not about the machine.
        drift = _DRIFT if visits else 0.0
        for each in self._batches.values():
            for other in each.points:
                each.points[other] *= 1 + drift * change
        self._level *= 1 + drift * change
        known.visits[size] = visits + 1
        if visits == 0 or (visits == 1 and seconds < expected):
            # The first step of a size may include one-off allocations, the second corrects it.
            known.points[size] = own * seconds / expected
        else:
            weight = drift + max(_SHAPE, (1 - drift) / (1 + visits))
            known.points[size] = own * (1 + weight * change)
        for each in self._batches.values():
            each.update()
        is_off = not 1 / _BAND <= self._level <= _BAND
        self._steps_off = self._steps_off + 1 if is_off else 0

    def _open(self, batch: int, nodes: int, seconds: float) -> _Batch:
        """Begin a batch size: as the others promise, at the speed of its first step."""
        if self._batches:
            factor = min(max(seconds / self.seconds(nodes, batch), 1 / _CLIP), _CLIP)
            points = {size: factor * self.seconds(size, batch) for size in SIZES}
        else:
            points = {1: seconds * self._work(batch) / self._work(nodes * batch)}
        self._batches[batch] = _Batch(points, 0)
        return self._batches[batch]

    @property
    def has_drifted(self) -> bool:
        """Return whether steps have long been slower or faster than the curve began with."""
        return self._steps_off >= _STEPS

    def doubt(self) -> None:
        """Take what is known as if it had been seen once: the next steps correct it most of the
        way.
        """
        self._level, self._steps_off = 1.0, 0
        for known in self._batches.values():
            known.visits = {n: min(visits, 1) for n, visits in known.visits.items()}

    def __str__(self) -> str:
        if not self._batches:
            return f"what a token costs is {self.origin}"
        batch = min(self._batches)
        one = self.seconds(1, batch)
        shown = [n for n in (2, 4, 8, 16, 32, 64) if n <= self.largest(batch)]
        ratios = ", ".join(f"{n} at {self.seconds(n, batch) / one:.1f}" for n in shown)
        company = ", ".join(
            f"{other} requests at {self.seconds(1, other) / one:.1f}"
            for other in sorted(self._batches)
            if other > batch
        )
        tokens = "a token takes" if batch == 1 else f"a token for each of {batch} requests takes"
        said = [f"{tokens} {1e3 * one:.1f} ms ({self.origin})"]
        said += [f"{each} times that" for each in (ratios, company) if each]
        return ", ".join(said)


def _nearest(nodes: int) -> int:
    """Return the size to choose among that is nearest to a number of nodes, by its ratio."""
    return min(SIZES, key=lambda size: max(size / nodes, nodes / size))


def find_experts(model: nn.Module) -> Experts | None:
    """Return the experts of a model whose fused layers and configuration tell them, or None."""
    chosen = getattr(model.config, "num_experts_per_tok", None)
    # The attribute is set by transformers' decorator of fused experts.
    fused = [part for part in model.modules() if hasattr(part, "is_transposed")]
    count = max((getattr(part, "num_experts", 0) for part in fused), default=0)
    if not chosen or not count:
        return None
    taken = sum(map(stored_bytes, fused)) * chosen / count
    rest = stored_bytes(model) - taken * count / chosen
    return Experts(count, chosen, taken / (taken + rest))


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights as they are stored."""
    parts = itertools.chain(module.parameters(), module.buffers())
    return product_bytes(module) + sum(part.numel() * part.element_size() for part in parts)


def load_curve(target: Target[Any], threads: int) -> Curve:
    """Return the curve stored for such a model on this machine, or one of which nothing is known.

    Curves are stored by architecture and size, dtype, device and threads, which decide the time of
    a pass.
    """
    experts = find_experts(target.model)
    stored = read_curves().get(machine_key(target, threads))
    if stored is None:
        return Curve(experts=experts)
    return Curve(stored, "known from before", experts=experts)


def store_curve(target: Target[Any], threads: int, curve: Curve) -> None:
    """Store a quiet curve for later runs, as the newest one.

    A failure to write is ignored.
    """
    points = {batch: known for batch, known in curve.points.items() if 1 in known}
    if not curve.quiet or not points:
        return
    stored, key = read_curves(), machine_key(target, threads)
    stored.pop(key, None)
    stored[key] = points
    with contextlib.suppress(SpectoolError):
        write_cache(FILE, {"format": FORMAT, "curves": stored})


def read_curves() -> dict[str, dict[int, dict[int, float]]]:
    """Read all stored curves by `machine_key`, the newest last: seconds by batch size and nodes.

    There are none if the file is damaged or of another format.
    """
    file = read_cache(FILE)
    try:
        if file["format"] != FORMAT:
            return {}
        found = {
            key: {
                int(batch): {int(n): float(seconds) for n, seconds in points.items()}
                for batch, points in batches.items()
            }
            for key, batches in file["curves"].items()
        }
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}
    return {key: batches for key, batches in found.items() if _is_curve(batches)}


def _is_curve(batches: dict[int, dict[int, float]]) -> bool:
    """Return whether stored points can be those of a curve."""
    return bool(batches) and all(
        batch > 0 and 1 in points and set(points) <= set(SIZES) and min(points.values()) > 0
        for batch, points in batches.items()
    )


def machine_key(target: Target[Any], threads: int | None = None) -> str:
    """Describe model and machine as far as the time of a pass depends on them.

    `threads`: of the processor, as many as torch has by default.
    """
    millions = stored_bytes(target.model) / 1e6
    dtype = str(target.dtype).removeprefix("torch.")
    if product_bytes(target.model):
        dtype += f", {precision_of(target.model)} products"
    where = (
        f"{machine.processor()}, {threads or torch.get_num_threads()} threads"
        if target.device.type == "cpu"
        else torch.cuda.get_device_name(target.device)
    )
    layers = f"{target.num_layers} layers"
    return (
        f"{target.name}, {layers}, {millions:.1f} MB, {dtype}; {where}; torch {torch.__version__}"
    )
