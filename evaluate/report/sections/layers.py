"""Errors of packed matrices: a heat map by block and matrix."""

from __future__ import annotations

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
from spectool.evaluate.report.heat import Square, draw_heat
from spectool.evaluate.report.runs import Run

# Heat maps drawn at most: those with the largest errors.
_MAPS = 8

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
    squares = []
    for (block, name), error in cells.items():
        hint = f"block {block}, {name}: {text_of(error)}" if block >= 0 else name
        squares.append(Square(blocks.index(block), names.index(name), error, hint))
    ends = [name.rpartition(".")[2] for name in names]
    return draw_heat(
        squares,
        hints,
        rows=[block if block >= 0 else "outside" for block in blocks],
        columns=ends if len(set(ends)) == len(ends) else names,
        labels={"y": "block"},
    )
