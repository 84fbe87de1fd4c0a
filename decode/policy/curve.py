"""T(n), the seconds of a pass of n tokens: measured when a model is loaded, refined by every step.

What decides is the shape, how much more n tokens cost than one: all sizes are measured in turns,
under the same conditions, and when the machine becomes slower or faster, all of them follow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spectool import machine
from spectool.decode import tree
from spectool.decode.target import Target
from spectool.errors import SpectoolError
from spectool.files import cache_folder, disk_errors, replacing
from spectool.processors import Waiting

# Sizes that are measured and chosen among, and the order of measuring: what matters most first.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_ORDER = (1, 8, 2, 32, 4, 16, 3, 64, 12, 6, 24, 48)
# Seconds that measuring may take when a model is loaded, and finding out how many sizes that is
# enough for; a pass that has begun is finished.
_SECONDS, _TRIED = 0.7, 0.3
_CONTEXT = 64
_REPEATS = 5
# Where a thread waits for a processor for a larger part of the time than this, others compute.
BUSY = 0.1
# A known curve is believed if T(1) is within this factor of what is seen at one of some passes
# after a few tokens. Long contexts may have doubled it; two busy processes beside make it 10 times.
_DOUBTFUL, _GLANCE, _GLANCES = 3.0, 8, 3
# Where only T(1) is known, a further token is taken to cost this share of it.
_SLOPE = 0.25
# What a step says of all sizes, and what of its own at least: more while that is little known, as
# if measuring had been four steps. A hiccup counts as no more than so many times what was expected.
_DRIFT, _SHAPE, _MEASURED, _OUTLIER = 0.25, 0.05, 4, 1.5


class Curve:
    """Seconds of a pass by the number of tokens in it. `found` says how it came about.

    One that is not `quiet` was measured or refined while other processes took processors away; it
    is right now, and wrong later.
    """

    def __init__(
        self, points: dict[int, float], found: str = "measured", *, quiet: bool = True
    ) -> None:
        assert 1 in points
        self.points = points
        self.found = found
        self.quiet = quiet
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
        change = min(max(seconds / expected, 1 / _OUTLIER), _OUTLIER) - 1
        for size in self.points:
            self.points[size] *= 1 + _DRIFT * change
        visits = self._visits.get(tokens, 0)
        self._visits[tokens] = visits + 1
        own = _DRIFT + max(_SHAPE, (1 - _DRIFT) / (1 + visits))
        self.points[tokens] = expected * (1 + own * change)
        self._settle()

    def __str__(self) -> str:
        shown = [n for n in (2, 4, 8, 16, 32, 64) if n in self.points]
        ratios = ", ".join(f"{n} at {self.seconds(n) / self.seconds(1):.1f}" for n in shown)
        one = f"a token takes {1e3 * self.seconds(1):.1f} ms ({self.found})"
        return f"{one}, {ratios} times that" if shown else one


def _passes(target: Target, length: int) -> Callable[[int], float]:
    """After a context of so many tokens: the seconds of a pass of a chain of some size."""
    vocabulary = target.vocab_size
    cache = target.cache(1)
    target.prefill(cache, [[at % vocabulary for at in range(length)]])

    def run(size: int) -> float:
        draft = tree.chain([at % vocabulary for at in range(size)], kind="deterministic")
        start = time.perf_counter()
        target.verify(cache, [draft]).logits_BNV[0, 0, 0].item()
        return time.perf_counter() - start

    return run


@torch.inference_mode()
def measure(target: Target) -> Curve:
    """Passes of chains after a short context, the real mask and cache included, sizes in turns."""
    length = max(1, min(_CONTEXT, target.context - max(SIZES)))
    run = _passes(target, length)
    waiting = Waiting()
    began = time.perf_counter()

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
    found = f"measured in {time.perf_counter() - began:.1f} s"
    quiet = waiting.share() <= BUSY
    return Curve(points, found if quiet else f"{found} beside other processes", quiet=quiet)


@torch.inference_mode()
def _agrees(target: Target, seconds: float) -> bool:
    """Whether a pass of one token takes about so long now. The first one pays for what is made
    once, and a slow one may be an accident."""
    run = _passes(target, max(1, min(_GLANCE, target.context - 1)))
    tries = (run(1) for _ in range(_GLANCES))
    return any(seconds / _DOUBTFUL <= now <= seconds * _DOUBTFUL for now in tries)


def curve_of(target: Target) -> Curve:
    """The curve that an earlier run left here for such a model, or a measured one, which is left.

    It is kept by architecture and size, dtype, device and threads: what a pass's time depends on.
    One that is far from what is seen now is measured again.
    """
    known, key = read_curves(), machine_key(target)
    if key in known and _agrees(target, known[key][1]):
        return Curve(dict(known[key]), "known from before")
    curve = measure(target)
    keep(target, curve)
    return curve


def keep(target: Target, curve: Curve) -> None:
    """Leave a quiet curve for later runs, behind those that were left before; one that cannot be
    left is no reason to fail."""
    if not curve.quiet:
        return
    path, key = curves_path(), machine_key(target)
    known = read_curves()
    known.pop(key, None)
    known[key] = {n: s for n, s in curve.points.items() if n in SIZES}
    with contextlib.suppress(SpectoolError), disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def read_curves() -> dict[str, dict[int, float]]:
    """All curves kept here, by what they are of, the newest last; none where the file is absent or
    damaged."""
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
    return cache_folder() / "curves.json"


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
