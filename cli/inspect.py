"""`spectool inspect PATH`: what is in this directory, bit by bit, and how it was made."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from spectool.cli.common import Debug, Json, session, size


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every packed matrix.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Contents, stored bits and origin of a checkpoint, read from headers only."""
    with session(json_wanted=json_output, debug=debug) as output:
        from spectool.headers import read_layout
        from spectool.quantize.ledger import measure

        layout = read_layout(path)
        ledger = measure(layout)
        quantization = layout.quantization or {}
        made_by = quantization.get("made_by") if layout.is_packed else None
        again = command(made_by) if made_by else None
        source = (quantization.get("source") or None) if layout.is_packed else None
        kind = "packed" if layout.is_packed else "quantized elsewhere" if quantization else "dense"
        methods = sorted({entry.method for entry in ledger.entries})
        method = ", ".join(methods) or quantization.get("quant_method")
        result: dict[str, Any] = {
            "kind": kind,
            "method": method,
            "model_type": layout.config.get("model_type"),
            "parameters": ledger.num_parameters,
            "bytes": ledger.file_bytes,
            "bits_per_weight": {"linears": ledger.linears, "file": ledger.file},
            "modules": [
                {
                    "name": entry.name,
                    "method": entry.method,
                    "shape": list(entry.shape),
                    "bytes": entry.num_bytes,
                    "bits": entry.bits,
                }
                for entry in ledger.entries
            ],
            "source": source,
            "made_by": made_by,
            "command": again,
        }
        output.show(
            f"{path}: {kind} {result['model_type']}, {ledger.num_parameters / 1e6:.2f} M "
            f"parameters in {size(ledger.file_bytes)}"
        )
        if ledger.linears is not None:
            output.show(
                f"{len(ledger.entries)} packed matrices ({method}): {ledger.linears:.4f} bits per "
                "weight"
            )
        output.show(f"the whole file: {ledger.file:.4f} bits per parameter")
        if source:
            output.show(f"source: {source.get('fingerprint', 'without a fingerprint')}")
        if again:
            output.show(f"made by: {again}")
        if layers:
            for entry in ledger.entries:
                shape = "x".join(map(str, entry.shape))
                output.show(f"{entry.name}  {entry.method}  {shape}  {entry.bits:.4f} bits")
        output.result(result)


def command(made_by: dict[str, Any]) -> str | None:
    """The command that makes the artifact again, from a source with the same fingerprint.

    None where the record does not say enough.
    """
    try:
        words = ["spectool", "quantize", made_by["method"], "MODEL", "OUT"]
        for key, value in made_by["options"].items():
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
        for pattern in made_by["skip"]:
            words += ["--skip", pattern]
        if made_by["allow_dense"]:
            words.append("--allow-dense")
        calibration = made_by["calibration"]
        if calibration:
            if not calibration["builtin"]:
                words += ["--calibration", "TEXT"]
            words += ["--samples", str(calibration["samples"])]
            words += ["--seq-len", str(calibration["seq_len"])]
        if made_by["seed"]:
            words += ["--seed", str(made_by["seed"])]
        return shlex.join(words)
    except (KeyError, TypeError, AttributeError):
        return None
