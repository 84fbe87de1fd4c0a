"""Tasks: scores with their intervals, of all checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from spectool.evaluate.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    figure,
    filled,
    interval_of,
    number_of,
)
from spectool.evaluate.report.intervals import Whisker, draw_intervals
from spectool.evaluate.report.runs import Run

_NAMES = ("task", "name")


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from the `tasks` of all results: objects by name, or a list of them."""
    found = [(run, name, scores) for run in runs for name, scores in _tasks(run)]
    if not found:
        return None
    columns = list(dict.fromkeys(key for _, _, scores in found for key in scores))
    rows = [
        [Cell(name), *(figure(scores.get(key)) for key in columns), Cell(run.name)]
        for run, name, scores in found
    ]
    headings = ["Task", *(_words(key) for key in columns), "Result"]
    table = filled(Table(caption="Scores of tasks", headings=headings, rows=rows))
    drawn = next((key for _, _, scores in found for key in scores if interval_of(scores[key])), "")
    whiskers = [
        Whisker(name, run.name, value, ends, f"{name}, {run.name}: {figure(scores[drawn]).text}")
        for run, name, scores in found
        if (ends := interval_of(scores.get(drawn)))
        and (value := number_of(scores[drawn])) is not None
    ]
    pictures = []
    if whiskers:
        title = f"{_words(drawn)} of each task, with intervals of 95%"
        draw = partial(draw_intervals, whiskers, label=_words(drawn).lower())
        pictures = [Picture(name="tasks", title=title, draw=draw)]
    return Section(name="tasks", title="Tasks", pictures=pictures, tables=[table])


def _tasks(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each task's name and figures."""
    tasks = run.data.get("tasks", ())
    named = tasks.items() if isinstance(tasks, Mapping) else ((None, each) for each in tasks)
    for name, each in named:
        # A metric's figure stands beside those of the reference.
        figures = {
            key: value.get("score", value) if isinstance(value, Mapping) else value
            for key, value in each.items()
        }
        scores = {key: value for key, value in figures.items() if number_of(value) is not None}
        yield name or next(str(each[key]) for key in _NAMES if key in each), scores


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()
