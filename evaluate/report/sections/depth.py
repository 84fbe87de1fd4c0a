"""Acceptance by depth: how often a draft is right up to its first, second, ... token."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from spectool.evaluate.report.content import Cell, Picture, Section, Table, figure, tell_apart
from spectool.evaluate.report.curves import Spot, draw_curves
from spectool.evaluate.report.runs import Run
from spectool.evaluate.report.sections.speed import measured_in

_TEXT = (
    "The share of steps in which the first tokens of a draft, up to each depth, are all accepted: "
    "of drafters, among the steps that draft so deep; of heads, held out from training, the "
    "accuracy of each head given that earlier ones were right, multiplied. Chains are what most "
    "servers verify: drafts cut to their first path, and that to 1, 2, ... tokens."
)


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from what `bench` and `train-heads` printed of drafters and heads."""
    shares, chains = dict(_shares(runs)), dict(_chains(runs))
    if not shares and not chains:
        return None
    pictures, tables = [], []
    for name, found, percent, title, caption, label in (
        ("depth", shares, True, "Share of steps that accept a draft up to each depth",
         "Drafts accepted up to each depth", "share of steps that accept them all"),
        ("chains", chains, False, "Tokens per forward with drafts cut to chains",
         "Tokens per forward with chains of each length", "tokens per forward"),
    ):  # fmt: skip
        if not found:
            continue
        curves = {
            drafter: [
                Spot(depth, value, f"{drafter}, {depth}: {figure(value, percent=percent).text}")
                for depth, value in enumerate(values, start=1)
            ]
            for drafter, values in found.items()
        }
        labels = "tokens of the draft", label
        draw = partial(draw_curves, curves, labels=labels)
        pictures.append(Picture(name=name, title=title, draw=draw))
        tables.append(_table(caption, found, percent=percent))
    return Section(
        name="depth", title="Acceptance by depth", text=[_TEXT], pictures=pictures, tables=tables
    )


def _table(caption: str, found: Mapping[str, Sequence[float]], *, percent: bool) -> Table:
    deepest = max(map(len, found.values()))
    rows = [
        [Cell(name), *(figure(value, percent=percent) for value in values)]
        + [Cell("-")] * (deepest - len(values))
        for name, values in found.items()
    ]
    headings = ["Drafter", *map(str, range(1, deepest + 1))]
    return Table(caption=caption, headings=headings, rows=rows)


def _shares(runs: Sequence[Run]) -> Iterator[tuple[str, Sequence[float]]]:
    trained = [run.data for run in runs if "conditional" in run.data]
    names = tell_apart(data["out"] for data in trained)
    for data in trained:
        name = f"{names[data['out']]} ({data['method']}, held out)"
        yield name, list(itertools.accumulate(data["conditional"], operator.mul))
    yield from _of_drafters(runs, "acceptance_by_depth")


def _chains(runs: Sequence[Run]) -> Iterator[tuple[str, Sequence[float]]]:
    return _of_drafters(runs, "chain")


def _of_drafters(runs: Sequence[Run], field: str) -> Iterator[tuple[str, Sequence[float]]]:
    models = tell_apart(measured["model"] for measured in measured_in(runs))
    for measured in measured_in(runs):
        for row in measured["drafters"]:
            if row.get(field):
                size = measured["batch_size"]
                batch = f", batch size {size}" if size > 1 else ""
                yield f"{row['name']} on {models[measured['model']]}{batch}", row[field]
