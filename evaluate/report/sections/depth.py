"""Acceptance by depth: how often a draft is right up to its first, second, ... token."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePath

from spectool.evaluate.report.content import Cell, Picture, Section, Table, figure
from spectool.evaluate.report.curves import Spot, draw_curves
from spectool.evaluate.report.runs import Run

_TEXT = (
    "The share of passes in which the first tokens of a draft, up to each depth, are all accepted: "
    "from `bench --chain-lengths`, the tokens per forward that a chain gains by one more token; "
    "from training, the held-out accuracy of each head given that earlier ones were right, "
    "multiplied."
)


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from drafters with `chain`, and from trained heads with `conditional`."""
    shares = dict(_shares(runs))
    if not shares:
        return None
    curves = {
        name: [
            Spot(depth, share, f"{name}, {depth} tokens: {share:.1%}")
            for depth, share in enumerate(each, start=1)
        ]
        for name, each in shares.items()
    }
    deepest = max(map(len, shares.values()))
    rows = [
        [Cell(name), *(figure(share, percent=True) for share in each)]
        + [Cell("-")] * (deepest - len(each))
        for name, each in shares.items()
    ]
    labels = "tokens of the draft", "share of passes that accept them all"
    return Section(
        name="depth",
        title="Acceptance by depth",
        text=[_TEXT],
        pictures=[
            Picture(
                name="depth",
                title="Share of passes that accept a draft up to each depth",
                draw=partial(draw_curves, curves, labels=labels),
            )
        ],
        tables=[
            Table(
                caption="Drafts accepted up to each depth",
                headings=["Drafter", *map(str, range(1, deepest + 1))],
                rows=rows,
            )
        ],
    )


def _shares(runs: Sequence[Run]) -> Iterator[tuple[str, list[float]]]:
    for run in runs:
        if "conditional" in run.data:
            name = f"{PurePath(run.data['out']).name} ({run.data['method']}, held out)"
            yield name, list(itertools.accumulate(run.data["conditional"], operator.mul))
        for measured in (run.data, *run.data.get("other_runs", ())):
            for row in measured.get("drafters", ()):
                if row.get("chain"):
                    rates = [1.0, *row["chain"]]
                    model = PurePath(measured["model"]).name
                    yield (
                        f"{row['name']} on {model}",
                        [after - before for before, after in itertools.pairwise(rates)],
                    )
