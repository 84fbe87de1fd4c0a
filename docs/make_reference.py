"""Write docs/reference.md from the command line itself and the methods table.

    python docs/make_reference.py

A test compares the file with what this makes, so that no option goes undocumented.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from spectool import methods
from spectool.cli import app
from spectool.cli.by_method import Verb
from spectool.cli.derive import PANELS
from spectool.cli.distill import DISTILL
from spectool.cli.quantize import QUANTIZE
from spectool.cli.train_heads import TRAIN_HEADS

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
    verbs = {
        "quantize": (QUANTIZE, "int8"),
        "distill": (DISTILL, "lora"),
        "train-heads": (TRAIN_HEADS, "medusa"),
    }
    for name in root.list_commands(None):
        if name in verbs:
            lines += [f"### spectool {name} METHOD", "", *_verb(*verbs[name])]
        elif hasattr(root.commands[name], "commands"):
            for part, command in root.commands[name].commands.items():
                lines += [f"### spectool {name} {part}", "", *_command(command)]
        else:
            lines += [f"### spectool {name}", "", *_command(root.commands[name])]
    lines += ["## Quantizers", ""]
    for name in (*methods.list_methods("chooser"), *methods.list_methods("quantizer")):
        lines += [f"### {name}", "", *_row(methods.METHODS[name]), ""]
        lines += [*_table(_own(QUANTIZE, name)), ""]
    lines += ["## Objectives", ""]
    for name in methods.list_methods("objective"):
        lines += [f"### {name}", "", *_row(methods.METHODS[name]), ""]
        lines += [*_table(_own(DISTILL, name)), ""]
    lines += ["## Drafters", "", "Options are written `--draft name:key=value,key=value`.", ""]
    for name in methods.list_methods("drafter"):
        row = methods.get_method(name, "drafter")
        lines += [f"### {name}", "", *_row(row), "", *_options(name), ""]
        if row.trainable:
            lines += [f"Training it (`train-heads {name}`):", ""]
            lines += [*_table(_own(TRAIN_HEADS, name)), ""]
    lines += ["## Heads that a drafter reads", ""]
    for name in methods.list_methods("head"):
        lines += [f"### {name}", "", *_row(methods.METHODS[name]), ""]
        lines += [f"Training it (`train-heads {name}`), which takes these options only:", ""]
        parameters = TRAIN_HEADS.command(name).params
        lines += [*_table([p for p in parameters if p.name not in ("help", "json", "debug")]), ""]
    lines += ["## Keys and values", "", "Options are written `--kv name:key=value`.", ""]
    for name in methods.list_methods("kv"):
        lines += [
            f"### kv {name}",
            "",
            *_row(methods.get_method(name, "kv")),
            "",
            *_options(name, "kv"),
            "",
        ]
    lines += ["## Strategies", "", "Options are written `--strategy name:key=value`.", ""]
    for name in methods.list_methods("strategy"):
        row = methods.get_method(name, "strategy")
        lines += [f"### {name}", "", *_row(row), "", *_options(name, "strategy"), ""]
    lines += ["## Verification rules", "", "| `--verify` | |", "|---|---|"]
    for name in methods.list_methods("verifier"):
        row = methods.get_method(name, "verifier")
        lines.append(f"| `{name}` | {row.summary}. {row.source}. |")
    lines += ["", "## Measures", ""]
    lines += ["Where a metric `x` has an interval, `x.lower` and `x.upper` are metrics too.", ""]
    lines += ["| `--measure` | | metrics for `--gate` |", "|---|---|---|"]
    for name in methods.list_methods("measure"):
        names = methods.import_method(name, "measure").metrics()
        metrics = ", ".join(f"`{each.removesuffix('.value')}`" for each in _shorten(names))
        lines.append(f"| `{name}` | {methods.get_method(name, 'measure').summary} | {metrics} |")
    return "\n".join(lines) + "\n"


def _shorten(names: Sequence[str]) -> Iterator[str]:
    """Yield the names without those of the ends of intervals."""
    ends = {f"{name.removesuffix('.value')}.{end}" for name in names for end in ("lower", "upper")}
    yield from (name for name in names if name not in ends)


def _verb(verb: Verb, example: str) -> Iterator[str]:
    """Arguments and the options that all methods share, a table a panel."""
    yield from (f"{verb.help}. Options of every method; each method's own are below.", "")
    parameters = verb.command(example).params
    yield from (*_table([p for p in parameters if p.param_type_name == "argument"]), "")
    for panel in PANELS:
        if found := [p for p in parameters if getattr(p, "rich_help_panel", None) == panel]:
            yield from (f"{panel}:", "", *_table(found), "")


def _own(verb: Verb, name: str) -> list[Any]:
    panel = f"Options of {name}"
    parameters = verb.command(name).params
    return [p for p in parameters if getattr(p, "rich_help_panel", None) == panel]


def _command(command: Any) -> list[str]:
    return [f"{command.help.splitlines()[0]}.", "", *_parameters(command), ""]


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


def _options(name: str, kind: methods.Kind = "drafter") -> list[str]:
    from spectool.options import options_of

    found = list(options_of(methods.import_method(name, kind).Config))
    if not found:
        return ["No options."]
    lines = ["| option | default | |", "|---|---|---|"]
    return lines + [f"| `{o.name}` | `{o.default}` | {o.help} |" for o in found]


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
