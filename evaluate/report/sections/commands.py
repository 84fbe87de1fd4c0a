"""Commands that made the results, with their outcome, and the machines that they ran on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spectool.evaluate.report.content import Cell, Section, Table, bytes_of, figure, filled
from spectool.evaluate.report.runs import Run

_OUTCOMES = {0: "done", 3: "a gate does not hold", 130: "interrupted"}


def make(runs: Sequence[Run]) -> Section:
    """Make the section that says how to make the results again."""
    rows = [
        [
            Cell(run.name),
            _outcome(run),
            figure(run.stage.get("seconds")),
            Cell(run.command or "not recorded", code=bool(run.command)),
        ]
        for run in runs
    ]
    headings = ["Result", "Outcome", "Seconds", "Command"]
    commands = filled(Table(caption="Commands", headings=headings, rows=rows))
    return Section(name="commands", title="How it was made", tables=[commands, *_machines(runs)])


def _outcome(run: Run) -> Cell:
    error = run.data.get("error")
    if error:
        return Cell(f"failed: {error['message']}", good=False)
    gates = [gate["holds"] for gate in run.data.get("gates", ())]
    code = run.stage.get("exit_code", 0 if all(gates) else 3)
    return Cell(_OUTCOMES.get(code, f"failed, exit code {code}"), good=code == 0)


def _machines(runs: Sequence[Run]) -> list[Table]:
    """Return a table with a column for each machine; none where no result says it."""
    machines: dict[str, Mapping[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for run in runs:
        machine = run.data.get("machine") or run.stage.get("machine")
        if machine:
            key = json.dumps(machine, sort_keys=True)
            machines[key] = machine
            names.setdefault(key, []).append(run.name)
    if not machines:
        return []
    found = list(machines.values())
    rows = [
        [Cell("Processor"), *(Cell(each["processor"]) for each in found)],
        [Cell("GPU"), *(Cell(each.get("gpu", "-")) for each in found)],
        [Cell("Cores"), *(figure(each.get("cores")) for each in found)],
        [Cell("Threads"), *(_threads(each) for each in found)],
        [Cell("Memory"), *(bytes_of(each.get("memory_bytes")) for each in found)],
        [Cell("System"), *(Cell(each.get("system", "-")) for each in found)],
        [Cell("Python"), *(Cell(each.get("python", "-")) for each in found)],
        [Cell("Versions"), *(Cell(_versions(each)) for each in found)],
    ]
    if len(found) > 1:
        rows.append([Cell("Results"), *(Cell(", ".join(each)) for each in names.values())])
    rows = [row for row in rows if any(cell.text != "-" for cell in row[1:])]
    headings = ["", *(f"Machine {number}" for number in range(1, len(found) + 1))]
    if len(found) == 1:
        headings[1] = "Machine"
    return [Table(caption="Where it was measured", headings=headings, rows=rows)]


def _threads(machine: Mapping[str, Any]) -> Cell:
    if "threads" not in machine:
        return Cell("-")
    reason = machine.get("threads_reason")
    return Cell(f"{machine['threads']}" + (f" ({reason})" if reason else ""), machine["threads"])


def _versions(machine: Mapping[str, Any]) -> str:
    versions = machine.get("versions", {}).items()
    return ", ".join(f"{name} {number}" for name, number in versions) or "-"
