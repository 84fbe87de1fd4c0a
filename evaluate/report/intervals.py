"""Pictures of figures with their intervals, a line for each name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spectool.evaluate.report.curves import WIDTH, short
from spectool.picture import COLOURS, INK, MARKERS, make_figure


class Whisker(NamedTuple):
    """A figure of `name` with the ends of its interval, in a series, and the text to show at it."""

    name: str
    series: str
    value: float
    ends: tuple[float, float]
    hint: str


def draw_intervals(
    whiskers: Sequence[Whisker], hints: dict[str, str], *, label: str, zero: bool = False
) -> Any:
    """Draw a line for each name, with the figures of all series on it.

    `zero`: draw a line at 0 as well. `hints` gets the texts of the points, by gid.
    """
    names = list(dict.fromkeys(each.name for each in whiskers))
    series = list(dict.fromkeys(each.series for each in whiskers))
    whole = make_figure(WIDTH, 1.0 + 0.3 * len(names) * max(1.0, len(series) / 3))
    panel = whole.subplots()
    panel.grid(axis="x")
    panel.set_axisbelow(True)
    if zero:
        panel.axvline(0, color=INK, linewidth=0.8)
    labelled = set[str]()
    for number, each in enumerate(whiskers):
        index = series.index(each.series)
        height = names.index(each.name) + 0.7 * ((index + 0.5) / len(series) - 0.5)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        panel.hlines(height, *each.ends, color=colour, linewidth=1.2)
        once = None if each.series in labelled else short(each.series)
        labelled.add(each.series)
        gid = f"whisker-{number}"
        hints[gid] = each.hint
        panel.plot([each.value], [height], marker, color=colour, label=once, gid=gid)
    panel.set_yticks(range(len(names)), [short(name) for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(label)
    if len(series) > 1:
        whole.legend(loc="outside upper left", ncols=2, handlelength=1.2)
    return whole
