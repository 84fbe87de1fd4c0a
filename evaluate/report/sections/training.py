"""Trainings: what held-out figures were before and after."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.evaluate.report.content import Cell, Section, Table, figure, is_number
from spectool.evaluate.report.runs import Run

# Of the step that was best, which is no figure of its text.
_NO_FIGURES = ("step", "score")


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from what `distill` and `train-heads` printed."""
    rows = []
    for run in runs:
        data = run.data
        pairs = {}
        if isinstance(data.get("best"), dict) and isinstance(data.get("initial"), dict):
            pairs = {
                name.replace("_", " "): (data["initial"].get(name), value)
                for name, value in data["best"].items()
                if name not in _NO_FIGURES and is_number(value)
            }
        elif "tokens_per_forward_estimate" in data:
            before, after = data["untrained_estimate"], data["tokens_per_forward_estimate"]
            pairs = {"tokens per forward, estimated": (before, after)}
        rows += [
            [
                Cell(data["out"]),
                Cell(data["method"]),
                Cell(name),
                figure(before),
                figure(after),
                figure(data["steps"]),
                figure(data["seconds"]),
            ]
            for name, (before, after) in pairs.items()
        ]
    if not rows:
        return None
    headings = ["Trained", "Method", "Held-out figure", "Before", "After", "Steps", "Seconds"]
    caption = "Held-out figures before and after training"
    table = Table(caption=caption, headings=headings, rows=rows)
    return Section(name="training", title="Training", tables=[table])
