"""Heat maps: how large each figure of a grid is beside the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spectool.evaluate.report.curves import WIDTH, short
from spectool.picture import HEAT, INK, LINE, make_figure

_PALEST = 0.05
# Rows with a name at most, and the length of a column's name.
_NAMED_ROWS, _LONGEST = 24, 20


class Square(NamedTuple):
    """A cell of a grid: its row, its column, its figure from 0 on, and the text to show at it."""

    row: int
    column: int
    value: float
    hint: str


def draw_heat(
    squares: Sequence[Square],
    hints: dict[str, str],
    *,
    rows: Sequence[object],
    columns: Sequence[str],
    labels: Mapping[str, str],
) -> Any:
    """Draw cells whose colour is full for the largest figure and palest for a tenth of it or less.

    The largest has an outline. `labels`: of the axes `x` and `y`, where they have one. `hints` gets
    the texts of the cells, by gid.
    """
    whole = make_figure(WIDTH, 1.0 + 0.17 * max(3, len(rows)))
    panel = whole.subplots()
    worst = max(squares, key=lambda square: square.value)
    for number, square in enumerate(squares):
        share = max(0.0, 1 + math.log10(square.value / worst.value)) if square.value > 0 else 0.0
        gid = f"cell-{number}"
        hints[gid] = square.hint
        alpha = _PALEST + (1 - _PALEST) * share
        _fill(panel, square, facecolor=HEAT, alpha=alpha, linewidth=0, gid=gid)
    _fill(panel, worst, facecolor="none", edgecolor=INK)
    panel.set_xlim(0, len(columns))
    panel.set_ylim(len(rows), 0)
    short_columns = [short(name, _LONGEST) for name in columns]
    slanted = {"rotation": 35, "ha": "right"} if max(map(len, short_columns)) > 3 else {}
    panel.set_xticks([at + 0.47 for at in range(len(columns))], short_columns, **slanted)
    shown = list(enumerate(rows))[:: math.ceil(len(rows) / _NAMED_ROWS)]
    panel.set_yticks([at + 0.45 for at, _ in shown], [name for _, name in shown])
    panel.set(**{f"{axis}label": text for axis, text in labels.items()})
    panel.tick_params(length=0)
    panel.spines[:].set_color(LINE)
    return whole


def _fill(panel: Any, square: Square, **look: Any) -> None:
    panel.barh(square.row + 0.45, 0.94, 0.9, left=square.column, **look)
