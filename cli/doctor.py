"""`spectool doctor`: what this machine can do, and which packages are there."""

from __future__ import annotations

from typing import Any

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


def doctor(json_output: Json = False, debug: Debug = False) -> None:
    """Processor, memory, packages, and what runs here."""
    with session(json_wanted=json_output, debug=debug) as output:
        from spectool import machine
        from spectool.decode import curve
        from spectool.kernels import skinny

        found: dict[str, Any] = machine.describe()
        output.show(f"processor: {found['processor']}, {found['cores']} cores")
        output.show(f"threads: {found['threads']}")
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
        if curves:
            output.show("passes measured here, for --draft auto and :tune:")
        for model, points in curves.items():
            output.show(f"  {model}: {curve.Curve(points)}")
        output.result({"machine": found, "packages": packages, "passes": curves})
