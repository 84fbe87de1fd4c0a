"""T(n), the seconds of a pass of n tokens: measured when a model is loaded, refined by every step.

Decisions depend on the shape, on how much more n tokens cost than one: all sizes are measured in
turns, under the same conditions, and when the machine becomes slower or faster, all of them follow.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from spectool import machine
from spectool.decode import tree
from spectool.decode.target.base import Target
from spectool.errors import SpectoolError
from spectool.files import read_cache, write_cache
from spectool.model.kernels import precision_of, product_bytes
from spectool.processors import Waiting

# The curves' file in the cache folder.
FILE = "curves.json"
# Sizes that are measured and chosen among, and the order of measuring, most important first.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ORDER = (1, 8, 2, 32, 4, 16, 3, 64, 12, 6, 24, 48)
# Seconds for measuring when a model is loaded, and of these for the first pass of each size, which
# decides how many sizes are measured. A pass that has begun is finished.
_SECONDS, _FIRST_SECONDS = 0.7, 0.3
_CONTEXT = 64
_REPEATS = 5
# If a thread waits for a processor for a larger share of the time, the machine is busy.
BUSY = 0.1
# A stored curve is trusted if T(1) is within this factor of one of a few passes after a few tokens.
# Long contexts may double T(1); two other busy processes make it 10 times as long.
_TRUSTED, _CHECK_TOKENS, _CHECK_PASSES = 3.0, 8, 3
# If only T(1) is known, each further token is assumed to cost this share of it.
_SLOPE = 0.25
# Weights of a step's deviation: for all sizes, and at least for its own size, which moves more
# while it has few visits (measuring counts as four). Outliers are clipped to this factor.
_DRIFT, _SHAPE, _MEASURED_VISITS, _CLIP = 0.25, 0.05, 4, 1.5


class Curve:
    """Seconds of a pass by its number of tokens. `origin` says where the numbers come from.

    A curve that is not `quiet` was measured or refined while other processes kept processors busy;
    it holds now, but not later.
    """

    def __init__(
        self, points: dict[int, float], origin: str = "measured", *, quiet: bool = True
    ) -> None:
        assert 1 in points
        self.points = points
        self.origin = origin
        self.quiet = quiet
        self._visits = dict.fromkeys(points, _MEASURED_VISITS)
        self._update_shape()

    def _update_shape(self) -> None:
        """Recompute the sorted sizes and their non-decreasing seconds."""
        self._sizes = sorted(self.points)
        falling = itertools.accumulate((self.points[n] for n in reversed(self._sizes)), min)
        self._rising = list(falling)[::-1]

    def seconds(self, tokens: int) -> float:
        """Return the seconds of a pass, interpolated between the known sizes and never decreasing.

        A pass costs no more than one of more tokens: so a size that was measured too high by
        accident is tried again.
        """
        sizes, rising = self._sizes, self._rising
        at = bisect_left(sizes, tokens)
        if at < len(sizes) and sizes[at] == tokens:
            return rising[at]
        if len(sizes) == 1:
            return rising[0] * (1 + _SLOPE * (tokens - 1))
        low = min(max(at - 1, 0), len(sizes) - 2)
        slope = (rising[low + 1] - rising[low]) / (sizes[low + 1] - sizes[low])
        return rising[low] + slope * (tokens - sizes[low])

    def refine(self, tokens: int, seconds: float) -> None:
        """Take a step into account. A size that was not measured starts as interpolated."""
        if tokens not in SIZES:
            return
        expected = self.points.get(tokens) or self.seconds(tokens)
        change = min(max(seconds / expected, 1 / _CLIP), _CLIP) - 1
        for size in self.points:
            self.points[size] *= 1 + _DRIFT * change
        visits = self._visits.get(tokens, 0)
        self._visits[tokens] = visits + 1
        weight = _DRIFT + max(_SHAPE, (1 - _DRIFT) / (1 + visits))
        self.points[tokens] = expected * (1 + weight * change)
        self._update_shape()

    def __str__(self) -> str:
        shown = [n for n in (2, 4, 8, 16, 32, 64) if n in self.points]
        ratios = ", ".join(f"{n} at {self.seconds(n) / self.seconds(1):.1f}" for n in shown)
        one = f"a token takes {1e3 * self.seconds(1):.1f} ms ({self.origin})"
        return f"{one}, {ratios} times that" if shown else one


def _make_timer(target: Target[Any], length: int) -> Callable[[int], float]:
    """Return a function that times a pass of a chain of some size after `length` tokens."""
    vocabulary = target.vocab_size
    cache = target.cache(1)
    text = [at % vocabulary for at in range(length)]
    target.begin(cache, [text])
    target.prefill(cache, [text])

    def run(size: int) -> float:
        draft = tree.chain([at % vocabulary for at in range(size)], kind="deterministic")
        start = time.perf_counter()
        target.verify(cache, [draft]).logits_BNV[0, 0, 0].item()
        return time.perf_counter() - start

    return run


@torch.inference_mode()
def measure(target: Target[Any]) -> Curve:
    """Measure passes of chains after a short context, with real mask and cache, sizes in turns."""
    length = max(1, min(_CONTEXT, target.context - max(SIZES)))
    run = _make_timer(target, length)
    waiting = Waiting()
    began = time.perf_counter()

    def is_over(limit: float) -> bool:
        return time.perf_counter() - began > limit

    sizes = [size for size in _ORDER if size == 1 or size <= target.context - length]
    # The first pass of a size includes one-off allocations: it is not counted.
    for count, size in enumerate(sizes, start=1):
        run(size)
        if is_over(_FIRST_SECONDS):
            sizes = sizes[:count]
            break
    points = {1: run(1)}
    for size in itertools.chain(sizes[1:], *[sizes] * (_REPEATS - 1)):
        if is_over(_SECONDS):
            break
        points[size] = min(run(size), points.get(size, math.inf))
    origin = f"measured in {time.perf_counter() - began:.1f} s"
    quiet = waiting.share() <= BUSY
    return Curve(points, origin if quiet else f"{origin} while other processes ran", quiet=quiet)


@torch.inference_mode()
def _is_current(target: Target[Any], seconds: float) -> bool:
    """Return whether a pass of one token takes about `seconds` now.

    One of several tries is enough: the first includes one-off allocations, and others may be slow
    by accident.
    """
    run = _make_timer(target, max(1, min(_CHECK_TOKENS, target.context - 1)))
    tries = (run(1) for _ in range(_CHECK_PASSES))
    return any(seconds / _TRUSTED <= now <= seconds * _TRUSTED for now in tries)


def load_or_measure(target: Target[Any]) -> Curve:
    """Return the curve stored for such a model on this machine, else measure and store one.

    Curves are stored by architecture and size, dtype, device and threads, which decide the time of
    a pass. A stored curve that is far from a few passes now is measured again.
    """
    stored, key = read_curves(), machine_key(target)
    if key in stored and _is_current(target, stored[key][1]):
        return Curve(dict(stored[key]), "known from before")
    curve = measure(target)
    store_curve(target, curve)
    return curve


def store_curve(target: Target[Any], curve: Curve) -> None:
    """Store a quiet curve for later runs, as the newest one.

    A failure to write is ignored.
    """
    if not curve.quiet:
        return
    stored, key = read_curves(), machine_key(target)
    stored.pop(key, None)
    stored[key] = {n: s for n, s in curve.points.items() if n in SIZES}
    with contextlib.suppress(SpectoolError):
        write_cache(FILE, stored)


def read_curves() -> dict[str, dict[int, float]]:
    """Read all stored curves by `machine_key`, the newest last; none if the file is damaged."""
    try:
        return {
            key: {int(n): float(seconds) for n, seconds in points.items()}
            for key, points in read_cache(FILE).items()
            if min(points.values()) > 0 and "1" in points
        }
    except (ValueError, AttributeError, TypeError):
        return {}


def machine_key(target: Target[Any]) -> str:
    """Describe model and machine as far as the time of a pass depends on them."""
    parts = list(target.model.parameters()) + list(target.model.buffers())
    packed = product_bytes(target.model)
    millions = (packed + sum(part.numel() * part.element_size() for part in parts)) / 1e6
    dtype = str(target.dtype).removeprefix("torch.")
    if packed:
        dtype += f", {precision_of(target.model)} products"
    where = (
        f"{machine.processor()}, {torch.get_num_threads()} threads"
        if target.device.type == "cpu"
        else torch.cuda.get_device_name(target.device)
    )
    layers = f"{target.num_layers} layers"
    return (
        f"{target.name}, {layers}, {millions:.1f} MB, {dtype}; {where}; torch {torch.__version__}"
    )
