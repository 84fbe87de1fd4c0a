"""`spectool doctor`: what this machine can do, and which packages are there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectool.cli.common import Debug, Json, session, size

PACKAGES = {
    "torch": None,
    "transformers": None,
    "safetensors": None,
    "bitsandbytes": "bnb",
    "pyarrow": "data",
    "datasets": "data",
    "matplotlib": "eval",
    "peft": "lora",
    "compressed-tensors": "compressed",
}


# Curves that are shown unless all are asked for.
NEWEST = 5


def doctor(
    all_curves: Annotated[
        bool, typer.Option("--all", help=f"All measured passes, not only the {NEWEST} newest.")
    ] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Processor, memory, packages, and what runs here."""
    with session(json_wanted=json_output, debug=debug) as output:
        from spectool import machine
        from spectool.decode.policy import curve
        from spectool.kernels import skinny

        machine.set_threads(None)
        found: dict[str, Any] = machine.describe()
        output.show(f"processor: {found['processor']}, {found['cores']} cores")
        output.show(f"threads: {found['threads']} ({found['threads_reason']})")
        spin = " ".join(f"{name}={value}" for name, value in found["spin"].items())
        output.show(f"waiting threads: {spin or 'as OpenMP does by itself'}")
        output.show(
            f"memory: {size(found['memory_bytes'])}, {size(machine.available_memory())} free"
        )
        output.show(f"gpu: {found.get('gpu', 'none that torch can use')}")
        packages = {name: machine.version(name) for name in PACKAGES}
        for name, version in packages.items():
            extra = PACKAGES[name]
            absent = "not installed" + (f" (pip install 'spectool[{extra}]')" if extra else "")
            output.show(f"{name}: {version or absent}")
        absent_kernel = skinny.missing()
        output.show(f"products of few rows: {absent_kernel or 'compiled kernel'}")
        output.show("packed linears: unpacked in torch at every forward; no compiled kernel yet")
        curves = curve.read_curves()
        shown = list(curves) if all_curves else list(curves)[-NEWEST:]
        if shown:
            output.show("passes measured here, for --draft auto and :tune:")
        for model in shown:
            output.show(f"  {model}: {curve.Curve(curves[model])}")
        if len(shown) < len(curves):
            output.show(f"  {len(curves) - len(shown)} older: --all shows them")
        output.result({"machine": found, "packages": packages, "passes": curves})
