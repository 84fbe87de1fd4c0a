"""`spectool export PATH OUT --format F`: write artifacts in formats of other tools."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from spectool.checkpoint.headers import HEADS
from spectool.cli.common import Output, prepare_torch
from spectool.errors import UsageError
from spectool.options import Config, option, same_option
from spectool.shared_options import LoadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(Config):
    """Options of an export: the checkpoint, the directory to write, and the format."""

    path: str = option(..., "Quantized checkpoint, or directory of draft heads", argument=True)
    out: Path = option(..., "Directory to write; must not exist", argument=True)
    format: str = option(
        ...,
        "Format to write: dense or compressed-tensors for a checkpoint; vllm-medusa, eagle3 or "
        "speculators for draft heads",
    )
    model: str | None = option(None, "Checkpoint that the draft heads draft for")
    trust_remote_code: bool = same_option(LoadOptions, "trust_remote_code")
    checksums: bool = same_option(LoadOptions, "checksums")


def export(output: Output, options: ExportOptions) -> None:
    """Write a quantized checkpoint or draft heads in a format that other tools read."""
    prepare_torch(None)
    from spectool.checkpoint.tensors import open_checkpoint

    path, out, model, name = options.path, options.out, options.model, options.format
    opened = functools.partial(
        open_checkpoint, trust_remote_code=options.trust_remote_code, checksums=options.checksums
    )
    if (Path(path) / HEADS).exists():
        from spectool.decode.heads import convert

        if model is None:
            raise UsageError("--model: heads are exported for the checkpoint they draft for")
        lines = convert.export(Path(path), opened(model), out, name)
    else:
        from spectool.quantize import export as export_module

        if model is not None:
            raise UsageError(f"--model: only for draft heads, and {path} holds none")
        lines = export_module.export(opened(path), out, name)
    output.show(
        f"{out}: {name}" + ("; serve it with" if lines else ", which no server is known to read")
    )
    for line in lines:
        output.show(f"  {line}")
    output.result({"out": str(out), "format": name, "serve": lines})
