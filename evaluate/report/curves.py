"""Pictures of figures over figures: curves and points, with their intervals, beside grey peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spectool.picture import COLOURS, MARKERS, MUTED, make_figure

WIDTH, HEIGHT = 4.6, 3.3
# A figure whose largest value is more than so many times the smallest has a logarithmic axis.
_WIDE = 8.0
# Peers drawn at most, and the length of a name in a legend.
_PEERS, LONGEST = 8, 30
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
    whole = make_figure(WIDTH, HEIGHT)
    panel = whole.subplots()
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    for number, (name, spots) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        # The second round of colours has other markers.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        look = {"color": colour, "marker": marker}
        line = "-" if joined else "none"
        panel.plot(*_columns(spots), label=short(name), linestyle=line, zorder=3, **look)
        for place, spot in enumerate(spots):
            gid = f"spot-{number}-{place}"
            hints[gid] = spot.hint
            # Over the marker, larger and unseen, so that a pointer finds it.
            panel.plot([spot.x], [spot.y], "o", color=colour, alpha=0, markersize=12, gid=gid)
            if spot.ends is not None:
                panel.vlines(spot.x, *spot.ends, color=colour, linewidth=1, zorder=2)
    shown = dict(list((beside or {}).items())[:_PEERS])
    _draw_beside(panel, shown)
    _scale(panel, [spot for spots in (*shown.values(), *curves.values()) for spot in spots])
    if all(isinstance(spot.x, int) for spots in curves.values() for spot in spots):
        panel.locator_params(axis="x", integer=True)
    panel.set_xlabel(labels[0])
    panel.set_ylabel(labels[1])
    longest = max(len(name) for name in panel.get_legend_handles_labels()[1])
    columns = 3 if longest <= 16 else 2 if longest <= 24 else 1
    whole.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
    return whole


def _draw_beside(panel: Any, curves: Curves) -> None:
    for number, (name, spots) in enumerate(curves.items()):
        line = {"color": MUTED, "alpha": 0.75, "linewidth": 0.8, "zorder": 1.5}
        dots = {"marker": MARKERS[number % len(MARKERS)], "markersize": 3, "fillstyle": "none"}
        dash = _DASHES[number % len(_DASHES)]
        panel.plot(*_columns(spots), dash, label=f"{short(name)} (peer)", **line, **dots)


def short(name: str, longest: int = LONGEST) -> str:
    """Return a name that fits in a legend or at an axis, by its end."""
    return name if len(name) <= longest else "..." + name[3 - longest :]


def _columns(spots: Sequence[Spot]) -> tuple[list[float], list[float]]:
    return [spot.x for spot in spots], [spot.y for spot in spots]


def _scale(panel: Any, spots: Sequence[Spot]) -> None:
    """Choose a logarithmic axis where figures lie far apart, with plain numbers on it."""
    values = [spot.y for spot in spots]
    if min(values) > 0 and max(values) / min(values) > _WIDE:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
