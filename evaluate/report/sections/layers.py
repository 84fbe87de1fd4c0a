"""Errors of packed matrices: a heat map by block and matrix."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from spectool.evaluate.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    figure,
    filled,
    is_number,
    slug,
    text_of,
)
from spectool.evaluate.report.curves import WIDTH, short
from spectool.evaluate.report.runs import Run
from spectool.picture import HEAT, INK, LINE, make_figure

# Heat maps drawn at most: those with the largest errors.
_MAPS = 8
_PALEST = 0.05

Layers = Sequence[Mapping[str, Any]]


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from the `layers` of `quantize` and `eval`, once for each checkpoint."""
    found: dict[str, Layers] = {}
    for run in runs:
        layers = run.data.get("layers")
        if layers and all(is_number(layer["error"]) for layer in layers):
            # `eval` measures what was written, and so comes before `quantize`.
            place = os.path.normpath(run.data.get("model") or run.data.get("out") or run.name)
            if "model" in run.data or place not in found:
                found[place] = layers
    if not found:
        return None
    by_worst = sorted(found.items(), key=lambda each: -max(layer["error"] for layer in each[1]))
    worst = {place: max(layers, key=lambda each: each["error"]) for place, layers in by_worst}
    pictures = [
        Picture(
            name=slug(f"layers-{place}"),
            title=(
                f"Error of each matrix of {place}; the largest is "
                f"{text_of(worst[place]['error'])}, {worst[place]['name']}"
            ),
            draw=partial(_draw, layers),
        )
        for place, layers in by_worst[:_MAPS]
    ]
    text = (
        "The squared error of each packed matrix relative to the squares of its weights. The "
        "matrix in full colour has the largest error of its map, those of the palest colour a "
        "tenth of it or less."
    )
    left_out = [place for place, _ in by_worst[_MAPS:]]
    if left_out:
        text += f" Without a map, having smaller errors: {', '.join(left_out)}."
    tables = [_table(place, layers) for place, layers in by_worst]
    return Section(name="layers", title="Layers", text=[text], pictures=pictures, tables=tables)


def _table(place: str, layers: Layers) -> Table:
    rows = [
        [Cell(layer["name"], code=True), figure(layer.get("bits")), figure(layer["error"])]
        for layer in layers
    ]
    headings = ["Matrix", "Bits", "Relative squared error"]
    return filled(Table(caption=f"Matrices of {place}", headings=headings, rows=rows, folded=True))


def _split(name: str) -> tuple[int, str]:
    """Return a matrix's block, -1 outside of them, and its name there; experts share a name."""
    found = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
    if found is None:
        return -1, name
    return int(found[1]), re.sub(r"\.\d+", ".*", found[2])


def _draw(layers: Layers, hints: dict[str, str]) -> Any:
    """Draw a row for each block and a column for each of its matrices."""
    cells: dict[tuple[int, str], float] = {}
    for layer in layers:
        place = _split(layer["name"])
        cells[place] = max(layer["error"], cells.get(place, 0.0))
    blocks = sorted({block for block, _ in cells})
    names = list(dict.fromkeys(name for _, name in cells))
    whole = make_figure(WIDTH, 1.0 + 0.17 * max(3, len(blocks)))
    panel = whole.subplots()
    worst = max(cells, key=lambda place: cells[place])
    for number, ((block, name), error) in enumerate(cells.items()):
        share = max(0.0, 1 + math.log10(error / cells[worst])) if error > 0 else 0.0
        corner = names.index(name), blocks.index(block)
        gid = f"cell-{number}"
        hints[gid] = f"block {block}, {name}: {text_of(error)}" if block >= 0 else name
        alpha = _PALEST + (1 - _PALEST) * share
        _fill(panel, *corner, facecolor=HEAT, alpha=alpha, linewidth=0, gid=gid)
        if (block, name) == worst:
            _fill(panel, *corner, facecolor="none", edgecolor=INK)
    panel.set_xlim(0, len(names))
    panel.set_ylim(len(blocks), 0)
    ends = [name.rpartition(".")[2] for name in names]
    labels = [short(name, 20) for name in (ends if len(set(ends)) == len(ends) else names)]
    panel.set_xticks([at + 0.47 for at in range(len(names))], labels, rotation=35, ha="right")
    step = math.ceil(len(blocks) / 24)
    shown = list(enumerate(blocks))[::step]
    panel.set_yticks([at + 0.45 for at, _ in shown], [b if b >= 0 else "outside" for _, b in shown])
    panel.set_ylabel("block")
    panel.tick_params(length=0)
    panel.spines[:].set_color(LINE)
    return whole


def _fill(panel: Any, column: int, row: int, **look: Any) -> None:
    panel.barh(row + 0.45, 0.94, 0.9, left=column, **look)
