"""`spectool export PATH OUT --format F`: for the tools that serve it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectool.cli.common import Debug, Json, TrustRemoteCode, prepare_torch, session


def export(
    path: Annotated[Path, typer.Argument(help="Heads directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to make; must not exist.")],
    format: Annotated[str, typer.Option(help="vllm-medusa, eagle3 or speculators.")],
    model: Annotated[str, typer.Option(help="The checkpoint that the heads draft for.")],
    trust_remote_code: TrustRemoteCode = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write draft heads in a format that other servers read."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(None)
        from spectool.decode.drafters import exchange

        lines = exchange.export(path, model, out, format, trust_remote_code=trust_remote_code)
        output.show(f"{out}: {format}; serve it with")
        for line in lines:
            output.show(f"  {line}")
        output.result({"out": str(out), "format": format, "serve": lines})
