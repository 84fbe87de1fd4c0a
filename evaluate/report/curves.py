"""Pictures of figures over figures: curves and points, with their intervals, beside grey peers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spectool.picture import COLOURS, MARKERS, MUTED, make_figure

WIDTH, HEIGHT = 4.6, 3.3
# A figure whose largest value is more than so many times the smallest has a logarithmic axis.
_WIDE = 8.0
# Peers drawn at most, and the length of a name at an axis and in a legend.
_PEERS, LONGEST, _LONGEST_IN_LEGEND = 8, 30, 56
# A legend's line in inches, and the lines that HEIGHT has room for.
_LINE, _LINES = 0.16, 3
# Numbers of each power of ten on a logarithmic axis.
_TICKS = (1.0, 2.0, 5.0)
_DASHES = ("-", "--", ":", "-.")


class Spot(NamedTuple):
    """A point of a curve, the text to show at it, and the ends of its interval."""

    x: float
    y: float
    hint: str
    ends: tuple[float, float] | None = None


Curves = Mapping[str, Sequence[Spot]]


def draw_curves(
    curves: Curves,
    hints: dict[str, str],
    *,
    labels: tuple[str, str],
    beside: Curves | None = None,
    joined: bool = True,
) -> Any:
    """Draw each curve with a colour and a marker of its own, and thin grey ones beside them.

    `labels`: of both axes. `joined`: points of a curve are joined by lines. `hints` gets the texts
    of the points, by gid.
    """
    shown = dict(list((beside or {}).items())[:_PEERS])
    names = [*map(_in_legend, curves), *map(_of_peer, shown)]
    longest = max(map(len, names))
    columns = 3 if longest <= 16 else 2 if longest <= 24 else 1
    lines = math.ceil(len(names) / columns)
    whole = make_figure(WIDTH, HEIGHT + _LINE * max(0, lines - _LINES))
    panel = whole.subplots()
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    for number, (name, spots) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        # The second round of colours has other markers.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        look = {"color": colour, "marker": marker}
        line = "-" if joined else "none"
        panel.plot(*_columns(spots), label=_in_legend(name), linestyle=line, zorder=3, **look)
        for place, spot in enumerate(spots):
            gid = f"spot-{number}-{place}"
            hints[gid] = spot.hint
            # Over the marker, larger and unseen, so that a pointer finds it.
            panel.plot([spot.x], [spot.y], "o", color=colour, alpha=0, markersize=12, gid=gid)
            if spot.ends is not None:
                panel.vlines(spot.x, *spot.ends, color=colour, linewidth=1, zorder=2)
    _draw_beside(panel, shown)
    _scale(panel, [spot for spots in (*shown.values(), *curves.values()) for spot in spots])
    if all(isinstance(spot.x, int) for spots in curves.values() for spot in spots):
        panel.locator_params(axis="x", integer=True)
    panel.set_xlabel(labels[0])
    panel.set_ylabel(labels[1])
    whole.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
    return whole


def _draw_beside(panel: Any, curves: Curves) -> None:
    for number, (name, spots) in enumerate(curves.items()):
        line = {"color": MUTED, "alpha": 0.75, "linewidth": 0.8, "zorder": 1.5}
        dots = {"marker": MARKERS[number % len(MARKERS)], "markersize": 3, "fillstyle": "none"}
        dash = _DASHES[number % len(_DASHES)]
        panel.plot(*_columns(spots), dash, label=_of_peer(name), **line, **dots)


def _in_legend(name: str) -> str:
    return short(name, _LONGEST_IN_LEGEND)


def _of_peer(name: str) -> str:
    return f"{_in_legend(name)} (peer)"


def short(name: str, longest: int = LONGEST) -> str:
    """Return a name that fits in a legend or at an axis, by its end."""
    return name if len(name) <= longest else "..." + name[3 - longest :]


def _columns(spots: Sequence[Spot]) -> tuple[list[float], list[float]]:
    return [spot.x for spot in spots], [spot.y for spot in spots]


def _scale(panel: Any, spots: Sequence[Spot]) -> None:
    """Choose a logarithmic axis where figures lie far apart, with plain numbers on it."""
    from matplotlib.ticker import LogLocator

    values = [spot.y for spot in spots]
    if min(values) > 0 and max(values) / min(values) > _WIDE:
        panel.set_yscale("log", subs=[])
        panel.yaxis.set_major_locator(LogLocator(subs=_TICKS))
        panel.yaxis.set_major_formatter("{x:g}")
