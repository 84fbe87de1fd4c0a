"""T(n), the seconds of a pass of n tokens: measured when a model is loaded, refined by every step.

What decides is the shape, how much more n tokens cost than one: all sizes are measured in turns,
under the same conditions, and when the machine becomes slower or faster, all of them follow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch

from spectool import machine
from spectool.artifact import disk_errors
from spectool.decode import tree
from spectool.decode.target import Target
from spectool.errors import SpectoolError

# Sizes that are measured and chosen among, and the order of measuring: what matters most first.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ORDER = (1, 8, 2, 32, 4, 16, 3, 64, 12, 6, 24, 48)
# Seconds that measuring may take when a model is loaded, and finding out how many sizes that is
# enough for; a pass that has begun is finished.
_SECONDS, _TRIED = 0.7, 0.3
_CONTEXT = 64
_REPEATS = 5
# Where only T(1) is known, a further token is taken to cost this share of it.
_SLOPE = 0.25
# What a step says of all sizes, and what of its own at least: more while that is little known, as
# if measuring had been four steps. A hiccup counts as no more than so many times what was expected.
_MOOD, _SHAPE, _MEASURED, _HICCUP = 0.25, 0.05, 4, 1.5


class Curve:
    """Seconds of a pass by the number of tokens in it. `found` says how it came about."""

    def __init__(self, points: dict[int, float], found: str = "measured") -> None:
        assert 1 in points
        self.points = points
        self.found = found
        self._visits = dict.fromkeys(points, _MEASURED)
        self._settle()

    def _settle(self) -> None:
        self._sizes = sorted(self.points)
        falling = itertools.accumulate((self.points[n] for n in reversed(self._sizes)), min)
        self._rising = list(falling)[::-1]

    def seconds(self, tokens: int) -> float:
        """Interpolated between the sizes that are known, and never falling.

        A pass costs no more than one of more tokens: so what was measured too high by accident is
        tried again.
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
        """Take a step into account. A size that was not measured begins as interpolated."""
        if tokens not in SIZES:
            return
        expected = self.points.get(tokens) or self.seconds(tokens)
        change = min(max(seconds / expected, 1 / _HICCUP), _HICCUP) - 1
        for size in self.points:
            self.points[size] *= 1 + _MOOD * change
        visits = self._visits.get(tokens, 0)
        self._visits[tokens] = visits + 1
        own = _MOOD + max(_SHAPE, (1 - _MOOD) / (1 + visits))
        self.points[tokens] = expected * (1 + own * change)
        self._settle()

    def __str__(self) -> str:
        shown = [n for n in (2, 4, 8, 16, 32, 64) if n in self.points]
        ratios = ", ".join(f"{n} at {self.seconds(n) / self.seconds(1):.1f}" for n in shown)
        one = f"a token takes {1e3 * self.seconds(1):.1f} ms ({self.found})"
        return f"{one}, {ratios} times that" if shown else one


@torch.inference_mode()
def measure(target: Target) -> Curve:
    """Passes of chains after a short context, the real mask and cache included, sizes in turns."""
    vocabulary = target.vocab_size
    length = max(1, min(_CONTEXT, target.context - max(SIZES)))
    cache = target.cache(1)
    target.ingest(cache, [[at % vocabulary for at in range(length)]])
    began = time.perf_counter()

    def run(size: int) -> float:
        draft = tree.chain([at % vocabulary for at in range(size)], kind="deterministic")
        start = time.perf_counter()
        target.verify(cache, [draft]).logits_BNV[0, 0, 0].item()
        return time.perf_counter() - start

    def late(limit: float) -> bool:
        return time.perf_counter() - began > limit

    sizes = [size for size in _ORDER if size == 1 or size <= target.context - length]
    # The first pass of a size pays for what is made once.
    for tried, size in enumerate(sizes, start=1):
        run(size)
        if late(_TRIED):
            sizes = sizes[:tried]
            break
    points = {1: run(1)}
    for size in itertools.chain(sizes[1:], *[sizes] * (_REPEATS - 1)):
        if late(_SECONDS):
            break
        points[size] = min(run(size), points.get(size, math.inf))
    return Curve(points, f"measured in {time.perf_counter() - began:.1f} s")


def curve_of(target: Target) -> Curve:
    """The curve that an earlier run left here for such a model, or a measured one, which is left.

    It is kept by architecture and size, dtype, device and threads: what a pass's time depends on.
    """
    known, key = read_curves(), machine_key(target)
    if key in known:
        return Curve(dict(known[key]), "known from before")
    curve = measure(target)
    keep(target, curve)
    return curve


def keep(target: Target, curve: Curve) -> None:
    """Leave the curve for later runs; one that cannot be left is no reason to fail."""
    path = curves_path()
    known = {
        **read_curves(),
        machine_key(target): {n: s for n, s in curve.points.items() if n in SIZES},
    }
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


def machine_key(target: Target) -> str:
    """Model and machine as far as the time of a pass depends on them."""
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
