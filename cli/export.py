"""`spectool export PATH OUT --format F`: write artifacts in formats of other tools."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from spectool.checkpoint.headers import HEADS
from spectool.cli.common import Debug, Json, NoChecksums, TrustRemoteCode, prepare_torch, session
from spectool.errors import UsageError


def export(
    path: Annotated[str, typer.Argument(help="Quantized checkpoint, or directory of draft heads")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist")],
    format: Annotated[
        str,
        typer.Option(
            help="Format to write: dense or compressed-tensors for a checkpoint; vllm-medusa, "
            "eagle3 or speculators for draft heads"
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint that the draft heads draft for")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint or draft heads in a format that other tools read."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(None)
        from spectool.checkpoint.tensors import open_checkpoint

        opened = functools.partial(
            open_checkpoint, trust_remote_code=trust_remote_code, checksums=not no_checksums
        )
        if (Path(path) / HEADS).exists():
            from spectool.decode.heads import convert

            if model is None:
                raise UsageError("--model: heads are exported for the checkpoint they draft for")
            lines = convert.export(Path(path), opened(model), out, format)
        else:
            from spectool.quantize import export as export_module

            if model is not None:
                raise UsageError(f"--model: only for draft heads, and {path} holds none")
            lines = export_module.export(opened(path), out, format)
        output.show(
            f"{out}: {format}"
            + ("; serve it with" if lines else ", which no server is known to read")
        )
        for line in lines:
            output.show(f"  {line}")
        output.result({"out": str(out), "format": format, "serve": lines})
