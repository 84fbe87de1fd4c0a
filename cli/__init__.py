"""The command line, one file per subcommand; no algorithm lives here.

The modules imported here import nothing heavy at their top: `--help`, `--version`, `list` and
`inspect` finish without torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from spectool import processors
from spectool.cli import (
    bench,
    chat,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    list_methods,
    push,
    report,
    run,
    tune,
)
from spectool.cli.audit import AUDIT
from spectool.cli.by_method import Verb
from spectool.cli.derive import Command, configs_of, derive
from spectool.cli.distill import DISTILL
from spectool.cli.quantize import QUANTIZE
from spectool.cli.train_heads import TRAIN_HEADS
from spectool.version import __version__

# Commands as `--help` lists them, in the order of the pipeline.
PANELS: dict[str, dict[str, Verb | typer.Typer | Callable[..., None]]] = {
    "Compress": {"quantize": QUANTIZE, "distill": DISTILL},
    "Accelerate": {"train-heads": TRAIN_HEADS, "tune": tune.tune},
    "Measure": {
        "eval": evaluate.evaluate,
        "bench": bench.bench,
        "audit": AUDIT,
        "report": report.report,
    },
    "Run": {
        "generate": generate.generate,
        "chat": chat.chat,
        "export": export.export,
        "run": run.run,
        "push": push.push,
    },
    "Look": {
        "inspect": inspect.inspect,
        "list": list_methods.list_methods,
        "doctor": doctor.doctor,
        "demo": demo.demo,
    },
}


class Pipeline(TyperGroup):
    """Top-level command group, in the order of PANELS: typer would list plain commands first."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for commands in PANELS.values() for name in commands]


app = typer.Typer(
    name="spectool",
    cls=Pipeline,
    help="Quantize transformers checkpoints, speed up decoding without changing the output, and "
    "measure what was lost",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spectool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version"),
    ] = False,
) -> None:
    pass


for panel, commands in PANELS.items():
    for name, command in commands.items():
        if isinstance(command, Verb):
            app.add_typer(command.application(), name=name, rich_help_panel=panel)
        elif isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            line = (command.__doc__ or "").removesuffix(".")
            derived = derive(command, configs_of(command), words=(name,))
            app.command(name, cls=Command, help=line, rich_help_panel=panel)(derived)


def main() -> None:
    """Run `spectool` or `python -m spectool`."""
    processors.limit_spin(os.environ)
    app()
