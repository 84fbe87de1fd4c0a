"""`spectool list`: all methods by kind."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from spectool import methods
from spectool.cli.common import Debug, Json, session
from spectool.errors import UsageError


def list_methods(
    kind: Annotated[
        str | None,
        typer.Argument(help=f"Kind to list: {', '.join(get_args(methods.Kind))}; default: all"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List research methods too")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """List the methods by kind, each with a one-line summary."""
    with session(json_wanted=json_output, debug=debug) as output:
        kinds = get_args(methods.Kind)
        if kind is not None and kind.rstrip("s") not in kinds:
            raise UsageError(f"no kind is called {kind!r}; known: {', '.join(kinds)}")
        wanted = [
            (key.rpartition(":")[2], row)
            for key, row in methods.METHODS.items()
            if (kind is None or row.kind == kind.rstrip("s"))
            and (everything or row.status == "stable")
        ]
        width = max((len(name) for name, _ in wanted), default=0)
        if not wanted:
            output.show("none is stable; --all lists research methods too")
        shown = None
        for name, row in wanted:
            if row.kind != shown:
                output.show("kv" if row.kind == "kv" else f"{row.kind}s")
                shown = row.kind
            others = ", ".join(tool for tool in row.runs_in if tool != "spectool")
            output.show(
                f"  {name:<{width}}  {row.summary}" + (f" [also in {others}]" if others else "")
            )
        output.result(
            {
                "methods": [
                    {
                        "name": name,
                        "kind": row.kind,
                        "summary": row.summary,
                        "source": row.source,
                        "status": row.status,
                        "runs_in": list(row.runs_in),
                    }
                    for name, row in wanted
                ]
            }
        )
