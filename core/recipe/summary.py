"""A summary of a run in Markdown, for the pages of CI services and for pull requests."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from spectool.recipe.execute import Outcome
from spectool.recipe.figures import figures_of

# Said by the reports of a run until it ends.
UNFINISHED = "the run did not end"

_STATES = {
    "done": "done",
    "cached": "cached",
    "gate": "**a gate does not hold**",
    "failed": "**failed**",
    "skipped": "did not run",
    "runs": "runs",
}


def as_markdown(name: str, found: Mapping[str, Sequence[Outcome]]) -> bytes:
    """Return the summary of a run with this name; `found` has the outcomes by variant.

    Without any it is that of a run that did not end.
    """
    lines = [f"# {name}", "", *(() if found else (f"**{UNFINISHED}**", ""))]
    for variant, outcomes in found.items():
        lines += [f"## {variant}", ""] if variant else []
        lines += ["| stage | | seconds |", "|---|---|---:|"]
        for outcome in outcomes:
            why = f": {_cell(outcome.reason)}" if outcome.reason else ""
            seconds = f"{outcome.seconds:.1f}" if outcome.seconds else ""
            lines.append(f"| {outcome.planned.stage} | {_STATES[outcome.state]}{why} | {seconds} |")
        lines += ["", *_gates(outcomes), *_figures(outcomes), *_commands(outcomes)]
    return "\n".join(lines).encode()


def _gates(outcomes: Sequence[Outcome]) -> Iterator[str]:
    gates = [gate for outcome in outcomes for gate in outcome.gates]
    if gates:
        yield from ("| gate | | value |", "|---|---|---:|")
        for gate in gates:
            value = "not a number" if gate["value"] is None else f"{gate['value']:.4g}"
            word = "holds" if gate["holds"] else "**does not hold**"
            yield f"| `{_cell(gate['expression'])}` | {word} | {value} |"
        yield ""


def _figures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    figures = [
        figure
        for outcome in outcomes
        if outcome.result is not None
        for figure in figures_of(outcome.planned.stage, outcome.result)
    ]
    if figures:
        yield from ("| figure | |", "|---|---:|")
        yield from (f"| {_cell(figure.name)} | {figure.text} |" for figure in figures)
        yield ""


def _commands(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield from ("<details><summary>commands</summary>", "", "```")
    yield from (f"spectool {shlex.join(outcome.command)}" for outcome in outcomes)
    yield from ("```", "", "</details>", "")


def _cell(text: str) -> str:
    """Return a text that ends no cell of a table."""
    return text.replace("|", "\\|")
