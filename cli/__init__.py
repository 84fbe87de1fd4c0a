"""The command line, one file per subcommand; no algorithm lives here.

The modules imported here import nothing heavy at their top: `--help`, `--version`, `list` and
`inspect` finish without torch.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

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
    tune,
)
from spectool.cli.quantize import QUANTIZE
from spectool.cli.train_heads import TRAIN_HEADS
from spectool.version import __version__

app = typer.Typer(
    name="spectool",
    help="Compress language-model checkpoints, decode them faster, and prove what was lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spectool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for verb in (QUANTIZE, TRAIN_HEADS):
    app.add_typer(verb.application(), name=verb.name)
app.command("tune")(tune.tune)
app.command("export")(export.export)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("list")(list_methods.list_methods)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def main() -> None:
    """The entry point of `spectool` and `python -m spectool`."""
    processors.bound_spin(os.environ)
    app()
