"""Audits of trust: what changed in the answers, by dimension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from spectool.evaluate.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    figure,
    interval_of,
    number_of,
)
from spectool.evaluate.report.intervals import Whisker, draw_intervals
from spectool.evaluate.report.runs import Run

_VERDICTS = {"pass": True, "fail": False}


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from what `audit trust` printed."""
    audits = [run for run in runs if "dimensions" in run.data]
    if not audits:
        return None
    found = [(run, *each) for run in audits for each in run.data["dimensions"].items()]
    rows = [
        [
            Cell(name),
            Cell(each["verdict"], good=_VERDICTS.get(each["verdict"])),
            figure(each["reference"]),
            figure(each["model"]),
            figure(each["delta"]),
            figure(each["p_holm"]),
            figure(each["items"]),
            figure(each["unscored"]),
            Cell(run.name),
        ]
        for run, name, each in found
    ]
    headings = [
        "Dimension", "Verdict", "Reference", "Model", "Change in points", "Holm's p", "Items",
        "Not scored", "Result",
    ]  # fmt: skip
    whiskers = [
        Whisker(name, run.name, value, ends, f"{name}, {run.name}: {figure(each['delta']).text}")
        for run, name, each in found
        if (ends := interval_of(each["delta"])) and (value := number_of(each["delta"])) is not None
    ]
    pictures = []
    if whiskers:
        draw = partial(draw_intervals, whiskers, label="change, in points of 100", zero=True)
        title = "Change of each dimension from the reference, with intervals of 95%"
        pictures = [Picture(name="trust", title=title, draw=draw)]
    return Section(
        name="trust",
        title="Trust",
        text=[text for run in audits for text in _texts(run)],
        pictures=pictures,
        tables=[Table(caption="Dimensions of trust", headings=headings, rows=rows)],
    )


def _texts(run: Run) -> list[str]:
    """Say what the audit could not measure, and what its figures do not mean."""
    missing = [f"{name} ({why})" for name, why in run.data["not_measured"].items()]
    not_measured = [f"{run.name}: not measured: {'; '.join(missing)}."] if missing else []
    return [f"{run.name}: {run.data['limits']}", *not_measured]
