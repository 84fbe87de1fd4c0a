"""Write docs/reference.md from the command line itself and the methods table.

    python docs/make_reference.py

A test compares the file with what this makes, so that no option goes undocumented.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from spectool import methods
from spectool.cli import app
from spectool.cli.quantize import command as method_command

TARGET = Path(__file__).with_name("reference.md")


def reference() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    lines = [
        "# Reference",
        "",
        "Made by `docs/make_reference.py` from the command line itself; do not edit.",
        "",
        "## Commands",
        "",
    ]
    for name, command in root.commands.items():
        if name != "quantize":
            lines += [f"### spectool {name}", "", *_command(command)]
    lines += [
        "### spectool quantize METHOD",
        "",
        "Options of every method; each method's own are below.",
        "",
        *_parameters(method_command("int8")),
        "",
        "## Quantizers",
        "",
    ]
    shared = {parameter.name for parameter in method_command("int8").params}
    for name in methods.names("quantizer"):
        row = methods.row(name, "quantizer")
        own = [p for p in method_command(name).params if p.name not in shared]
        lines += [f"### {name}", "", *_row(row), "", *_table(own), ""]
    lines += ["## Drafters", "", "Options are written `--draft name:key=value,key=value`.", ""]
    for name in methods.names("drafter"):
        row = methods.row(name, "drafter")
        lines += [f"### {name}", "", *_row(row), "", *_options(name), ""]
    lines += ["## Verification rules", "", "| `--verify` | |", "|---|---|"]
    for name in methods.names("rule"):
        row = methods.row(name, "rule")
        lines.append(f"| `{name}` | {row.summary}. {row.source}. |")
    return "\n".join(lines) + "\n"


def _command(command: Any) -> list[str]:
    return [command.help.splitlines()[0], "", *_parameters(command), ""]


def _parameters(command: Any) -> list[str]:
    return _table([p for p in command.params if p.name != "help"])


def _table(parameters: list[Any]) -> list[str]:
    if not parameters:
        return ["No options of its own."]
    return ["| | default | |", "|---|---|---|", *map(_line, parameters)]


def _line(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{parameter.name.upper()}` | | {parameter.help} |"
    flags = " / ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    hidden = parameter.default is None or parameter.default is False
    default = "" if hidden else f"`{parameter.default}`"
    return f"| {flags} | {default} | {parameter.help} |"


def _row(row: methods.Method) -> Iterator[str]:
    yield f"{row.summary}. Source: {row.source}. Runs in: {', '.join(row.runs_in)}."


def _options(name: str) -> list[str]:
    from spectool.options import options_of

    found = list(options_of(methods.resolve(name, "drafter").Config))
    if not found:
        return ["No options."]
    lines = ["| option | default | |", "|---|---|---|"]
    return lines + [f"| `{o.name}` | `{o.default}` | {o.help} |" for o in found]


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
