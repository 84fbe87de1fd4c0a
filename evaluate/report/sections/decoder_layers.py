"""Errors that decoder layers add: a heat map of the layers of all checkpoints."""

from __future__ import annotations

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
    number_of,
    text_of,
)
from spectool.evaluate.report.curves import short
from spectool.evaluate.report.heat import Square, draw_heat
from spectool.evaluate.report.runs import Run

Layers = Sequence[Mapping[str, Any]]

# Columns with a name at most.
_NAMED = 16
_TEXT = (
    "The distance of what a layer makes of the reference's hidden state from what the reference's "
    "layer makes of it, relative to the change that that layer makes. The layer in full colour "
    "adds the largest error of the map, those of the palest colour a tenth of it or less."
)
_HEADINGS = {
    "error": "Error",
    "hidden_error": "Error with the layers before",
    "hidden_cosine": "Cosine",
    "attention.change": "Change of attention's entropy",
    "attention.collapsed": "Collapsed heads",
    "attention.overloaded": "Overloaded heads",
    "gates.agreement": "Gates of equal sign",
}


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from the `decoder_layers` of `eval`: a row of the map for each result, a
    square for each layer whose error is a number."""
    found: dict[str, Layers] = {}
    for run in runs:
        if layers := run.data.get("decoder_layers"):
            place = run.data.get("model") or run.name
            # One checkpoint on two texts has two results.
            found[f"{place}, {run.name}" if place in found else place] = layers
    if not found:
        return None
    errors = [
        (value, layer["name"], place)
        for place, layers in found.items()
        for layer in layers
        if (value := number_of(layer["error"])) is not None
    ]
    pictures = []
    if errors:
        value, name, place = max(errors)
        title = (
            f"Error that each decoder layer adds by itself; the largest is {text_of(value)}, "
            f"{name} of {place}"
        )
        draw = partial(_draw, found)
        pictures = [Picture(name="decoder-layers", title=title, draw=draw)]
    return Section(
        name="decoder-layers",
        title="Decoder layers",
        text=[_TEXT],
        pictures=pictures,
        tables=[_table(place, layers) for place, layers in found.items()],
    )


def _draw(found: Mapping[str, Layers], hints: dict[str, str]) -> Any:
    depth = max(map(len, found.values()))
    step = -(-depth // _NAMED)
    squares = [
        Square(row, column, value, f"{layer['name']} of {place}: {figure(layer['error']).text}")
        for row, (place, layers) in enumerate(found.items())
        for column, layer in enumerate(layers)
        if (value := number_of(layer["error"])) is not None
    ]
    return draw_heat(
        squares,
        hints,
        rows=[short(place) for place in found],
        columns=[str(at) if at % step == 0 else "" for at in range(depth)],
        labels={"x": "decoder layer"},
    )


def _table(place: str, layers: Layers) -> Table:
    rows = [
        [Cell(layer["name"], code=True), *(figure(_get(layer, name)) for name in _HEADINGS)]
        for layer in layers
    ]
    headings = ["Layer", *_HEADINGS.values()]
    caption = f"Decoder layers of {place}"
    return filled(Table(caption=caption, headings=headings, rows=rows, folded=True))


def _get(layer: Mapping[str, Any], name: str) -> Any:
    """Return the figure of a dotted name, None where the layer has no such part."""
    value: Any = layer
    for part in name.split("."):
        value = (value or {}).get(part)
    return value
