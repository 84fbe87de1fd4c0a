"""Gates, with their outcome."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.evaluate.report.content import Cell, Section, Table, figure
from spectool.evaluate.report.runs import Run


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from the `gates` of all results, those that do not hold first."""
    gates = [(gate, run) for run in runs for gate in run.data.get("gates", ())]
    if not gates:
        return None
    rows = [
        [
            Cell("holds" if gate["holds"] else "does not hold", good=gate["holds"]),
            Cell(gate["expression"], code=True),
            figure(gate["value"], missing="not a number"),
            Cell(run.name),
        ]
        for gate, run in sorted(gates, key=lambda each: bool(each[0]["holds"]))
    ]
    table = Table(
        caption="What was demanded, and what was measured",
        headings=["Outcome", "Gate", "Measured", "Result"],
        rows=rows,
    )
    return Section(name="gates", title="Gates", tables=[table])
