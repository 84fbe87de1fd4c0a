"""Content of a report as data: sections with tables and pictures, and figures as texts.

A figure in JSON is a number, or an object with `value` and perhaps `lower` and `upper`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from spectool.files import size


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table. `value`: the number it shows, in full. `good`: a verdict, if it is one.

    `code`: the text is a command, a gate or a name of a matrix.
    """

    text: str
    value: float | None = None
    good: bool | None = None
    code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table whose first cell of a row names the row. `folded`: shown on demand."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture of a page. `name`: of its files. `title`: what it shows, in a sentence.

    `draw` returns a figure of matplotlib, and adds to its argument the texts to show at artists, by
    gid. It is called inside `picture.style`.
    """

    name: str
    title: str
    draw: Callable[[dict[str, str]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    name: str
    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = field(default_factory=list)


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_of(figure: Any) -> float | None:
    """Return the number of a figure; None if there is none."""
    if isinstance(figure, Mapping):
        figure = figure.get("value")
    return figure if is_number(figure) else None


def interval_of(figure: Any) -> tuple[float, float] | None:
    """Return the ends of a figure's interval; None if it has none."""
    if not isinstance(figure, Mapping):
        return None
    lower, upper = figure.get("lower"), figure.get("upper")
    return (lower, upper) if is_number(lower) and is_number(upper) else None  # type: ignore[return-value]


def text_of(value: float) -> str:
    """Format a number with four significant digits, a count with all."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e15 else f"{value:.3e}"
    if value == 0:
        return "0"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def figure(value: Any, *, percent: bool = False, missing: str = "-") -> Cell:
    """Return the cell of a figure, with its interval if it has one."""
    number = number_of(value)
    if number is None:
        return Cell(missing)

    def shown(one: float) -> str:
        return f"{one:.1%}" if percent else text_of(one)

    ends = interval_of(value)
    text = shown(number)
    if ends is not None:
        text += f" [{shown(ends[0])}, {shown(ends[1])}]"
    return Cell(text, number)


def bytes_of(value: Any) -> Cell:
    """Return the cell of a number of bytes."""
    return Cell(size(value), value) if is_number(value) else Cell("-")


def tell_apart(paths: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each path that no other of the paths has."""
    parts = {path: PurePath(path).parts for path in paths}
    names = {}
    for path, own in parts.items():
        ends = (own[-count:] for count in range(1, len(own)))
        alone = (
            end for end in ends if sum(each[-len(end) :] == end for each in parts.values()) == 1
        )
        names[path] = str(PurePath(*next(alone, own)))
    return names


def slug(text: str) -> str:
    """Return a name for files and ids."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def filled(table: Table) -> Table:
    """Return a table without the columns that no row has anything in."""
    kept = [
        index
        for index in range(len(table.headings))
        if index == 0 or any(row[index].text not in ("", "-") for row in table.rows)
    ]
    return Table(
        caption=table.caption,
        headings=[table.headings[index] for index in kept],
        rows=[[row[index] for index in kept] for row in table.rows],
        folded=table.folded,
    )
