"""Speed of decoding with each drafter, against tokens per forward."""

from __future__ import annotations

from collections import Counter
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
    slug,
    tell_apart,
    text_of,
)
from spectool.evaluate.report.curves import Spot, draw_curves
from spectool.evaluate.report.runs import Run

_TEXT = (
    "Tokens per forward: new tokens over passes of the model, the token that each pass yields by "
    "itself included; plain decoding has 1. Speed is measured with the same prompts and limits in "
    "turns, and holds for this machine. Speed-up is over plain decoding in the same run."
)


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from what `bench` printed, and the measure `speed` of `eval`."""
    measured = list(measured_in(runs))
    if not measured:
        return None
    models = tell_apart(each["model"] for each in measured)
    shared = Counter(model for model, _ in {(each["model"], each["runtime"]) for each in measured})
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for each in measured:
        model = models[each["model"]]
        # A quantized checkpoint may be run both packed and dense.
        name = f"{model}, {each['runtime']}" if shared[each["model"]] > 1 else model
        by_model.setdefault(name, []).append(each)
    pictures = [
        Picture(
            name=slug(f"speed-{name}"),
            title=f"Tokens per second against tokens per forward: {name}",
            draw=partial(
                draw_curves,
                _curves(each),
                labels=("tokens per forward", "tokens per second"),
                joined=False,
            ),
        )
        for name, each in by_model.items()
    ]
    tables = [_table(measured, models)]
    if any(len(each.get("categories", ())) > 1 for each in measured):
        tables.append(_categories(measured, models))
    return Section(name="speed", title="Speed", text=[_TEXT], pictures=pictures, tables=tables)


def measured_in(runs: Sequence[Run]) -> Iterator[Mapping[str, Any]]:
    """Yield each comparison: a model in a runtime at a batch size."""
    for run in runs:
        if {"baseline", "drafters", "runtime"} <= run.data.keys():
            yield {key: value for key, value in run.data.items() if key != "other_runs"}
            yield from run.data.get("other_runs", ())


def _rows(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part["baseline"], *part["drafters"], *part.get("baselines", ())]


def _curves(measured: Sequence[Mapping[str, Any]]) -> dict[str, list[Spot]]:
    curves: dict[str, list[Spot]] = {}
    for each in measured:
        for row in _rows(each):
            hint = (
                f"{row['name']}, batch size {each['batch_size']}: "
                f"{text_of(row['tokens_per_second'])} tokens per second, "
                f"{text_of(row['tokens_per_forward'])} tokens per forward"
            )
            name = "plain" if row["name"] == "none" else row["name"]
            spot = Spot(row["tokens_per_forward"], row["tokens_per_second"], hint)
            curves.setdefault(name, []).append(spot)
    return curves


def _table(measured: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> Table:
    rows = [
        [
            Cell("plain" if row["name"] == "none" else row["name"]),
            Cell(models[each["model"]]),
            Cell(each["runtime"]),
            figure(each["batch_size"]),
            figure(row["tokens_per_second"]),
            figure(row["speedup"]),
            figure(row["tokens_per_forward"]),
            _accepted(row),
            _identical(row),
            Cell("" if row["lossless"] else "lossy"),
        ]
        for each in measured
        for row in _rows(each)
    ]
    headings = [
        "Drafter", "Model", "Runtime", "Batch", "Tokens/s", "Speed-up", "Tokens per forward",
        "Accepted", "Texts as plain", "Output",
    ]  # fmt: skip
    return filled(Table(caption="Drafters on all prompts", headings=headings, rows=rows))


def _accepted(row: Mapping[str, Any]) -> Cell:
    """Return the share of the drafted tokens that were accepted."""
    if not row["drafted"]:
        return Cell("-")
    share = row["accepted"] / row["drafted"]
    return Cell(f"{share:.1%}", share)


def _identical(row: Mapping[str, Any]) -> Cell:
    count = row.get("identical")
    if count is None:
        return Cell("-")
    whole = count == row["prompts"]
    return Cell(f"{count} of {row['prompts']}", count / row["prompts"], good=whole or None)


def _categories(measured: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> Table:
    rows = [
        [
            Cell(part["category"]),
            Cell(row["name"]),
            Cell(models[each["model"]]),
            Cell(each["runtime"]),
            figure(each["batch_size"]),
            figure(row["tokens_per_second"]),
            figure(row["speedup"]),
            figure(row["tokens_per_forward"]),
        ]
        for each in measured
        for part in each.get("categories", ())
        for row in _rows(part)[1:]
    ]
    headings = [
        "Category", "Drafter", "Model", "Runtime", "Batch", "Tokens/s", "Speed-up",
        "Tokens per forward",
    ]  # fmt: skip
    caption = "Drafters by category of prompts"
    return Table(caption=caption, headings=headings, rows=rows, folded=True)
