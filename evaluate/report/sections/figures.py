"""All figures of every result, under the names that gates use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spectool.evaluate.report.content import (
    Cell,
    Section,
    Table,
    figure,
    filled,
    interval_of,
    is_number,
    number_of,
)
from spectool.evaluate.report.runs import Run

# Shown elsewhere on the page, or no figures.
_ELSEWHERE = (
    "schema_version", "format_version", "machine", "read", "gates", "engine", "other_runs",
    "layers", "decoder_layers", "categories", "dimensions", "not_measured", "limits",
)  # fmt: skip
_INTERVAL = ("value", "lower", "upper")
# Numbers of a list that are shown.
_MANY = 12
_TEXT = "What each result holds besides the tables above, under the names that `--gate` takes."


def make(runs: Sequence[Run]) -> Section | None:
    """Make a table of the numbers of each result, and one of each list of objects in it."""
    tables = []
    for run in runs:
        if run.is_peers:
            continue
        data = {key: value for key, value in run.data.items() if key not in _ELSEWHERE}
        if rows := [[Cell(name, code=True), cell] for name, cell in _flatten(data)]:
            headings = ["Figure", "Value"]
            tables.append(Table(caption=run.name, headings=headings, rows=rows, folded=True))
        tables += [
            table
            for name, values in _lists(data)
            if (table := _list(f"{run.name}: {name}", values)).headings
        ]
    if not tables:
        return None
    return Section(name="figures", title="All figures", text=[_TEXT], tables=tables)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Cell]]:
    """Yield the dotted name and the cell of each number, short text and short list of numbers."""
    for key, value in data.items():
        name = prefix + key
        if number_of(value) is not None and (is_number(value) or interval_of(value)):
            yield name, figure(value)
            if isinstance(value, Mapping):
                rest = {key: each for key, each in value.items() if key not in _INTERVAL}
                yield from _flatten(rest, f"{name}.")
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, bool):
            yield name, Cell("yes" if value else "no")
        elif isinstance(value, str) and key != "command":
            yield name, Cell(value)
        elif isinstance(value, list) and value and all(map(is_number, value)):
            shown = ", ".join(figure(each).text for each in value[:_MANY])
            yield name, Cell(shown + (", ..." if len(value) > _MANY else ""))


def _lists(
    data: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield each list of objects, with its dotted name."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            yield prefix + key, value


def _list(caption: str, values: Sequence[Mapping[str, Any]]) -> Table:
    flat = [dict(_flatten(value)) for value in values]
    headings = list(dict.fromkeys(name for row in flat for name in row))
    rows = [[row.get(name, Cell("-")) for name in headings] for row in flat]
    table = Table(caption=caption, headings=headings, rows=rows, folded=True)
    return filled(table) if headings else table
