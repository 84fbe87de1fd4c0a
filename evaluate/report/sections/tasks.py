"""Tasks: scores with their intervals, beside the reference's."""

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
from spectool.evaluate.report.curves import WIDTH, short
from spectool.evaluate.report.runs import Run
from spectool.picture import COLOURS, MARKERS, make_figure

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
    headings = ["Task", *(key.replace("_", " ").capitalize() for key in columns), "Result"]
    drawn = next(filter(None, (_first_interval(scores) for _, _, scores in found)), None)
    pictures = []
    if drawn is not None:
        label = drawn.replace("_", " ")
        pictures = [
            Picture(
                name="tasks",
                title=f"{label.capitalize()} of each task, with intervals of 95%",
                draw=partial(_draw, found, drawn, label),
            )
        ]
    table = filled(Table(caption="Scores of tasks", headings=headings, rows=rows))
    return Section(name="tasks", title="Tasks", pictures=pictures, tables=[table])


def _tasks(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each task's name and figures."""
    tasks = run.data.get("tasks", ())
    named = tasks.items() if isinstance(tasks, Mapping) else ((None, each) for each in tasks)
    for name, each in named:
        scores = {key: value for key, value in each.items() if number_of(value) is not None}
        yield name or next(str(each[key]) for key in _NAMES if key in each), scores


def _first_interval(scores: Mapping[str, Any]) -> str | None:
    return next((key for key, value in scores.items() if interval_of(value)), None)


def _draw(
    found: Sequence[tuple[Run, str, Mapping[str, Any]]],
    drawn: str,
    label: str,
    hints: dict[str, str],
) -> Any:
    """Draw a line for each task, with the scores of all results on it."""
    tasks = list(dict.fromkeys(name for _, name, _ in found))
    names = list(dict.fromkeys(run.name for run, _, _ in found))
    whole = make_figure(WIDTH, 1.0 + 0.3 * len(tasks) * max(1.0, len(names) / 3))
    panel = whole.subplots()
    panel.grid(axis="x")
    panel.set_axisbelow(True)
    labelled = set()
    for number, (run, name, scores) in enumerate(found):
        value, ends = number_of(scores.get(drawn)), interval_of(scores.get(drawn))
        if value is None or ends is None:
            continue
        index = names.index(run.name)
        height = tasks.index(name) + 0.7 * ((index + 0.5) / len(names) - 0.5)
        colour = COLOURS[index % len(COLOURS)]
        panel.hlines(height, *ends, color=colour, linewidth=1.2)
        once = None if run.name in labelled else short(run.name)
        labelled.add(run.name)
        gid = f"score-{number}"
        hints[gid] = f"{name}, {run.name}: {figure(scores[drawn]).text}"
        look = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
        panel.plot([value], [height], gid=gid, label=once, **look)
    panel.set_yticks(range(len(tasks)), [short(name) for name in tasks])
    panel.set_ylim(len(tasks) - 0.5, -0.5)
    panel.set_xlabel(label)
    whole.legend(loc="outside upper left", ncols=2, handlelength=1.2)
    return whole
