"""`spectool doctor`: hardware, packages and compiled kernels of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectool.cli.common import Output
from spectool.files import size
from spectool.options import Config, option

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
    "ziglang": "cc",
}

# Cost curves shown without --all.
NEWEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(Config):
    """Options of what `doctor` shows."""

    all: bool = option(
        False, f"Show all measured cost curves, not only the {NEWEST} newest", switch=True
    )


def doctor(output: Output, options: DoctorOptions) -> None:
    """Show processor, memory, GPU, packages and compiled kernels of this machine."""
    from spectool import machine
    from spectool.decode.policy import curve
    from spectool.kernels import build, registry
    from spectool.model.kernels import DTYPES, describe_products

    machine.set_threads(None)
    described: dict[str, Any] = machine.describe()
    output.show(f"processor: {described['processor']}, {described['cores']} cores")
    output.show(f"threads: {described['threads']} ({described['threads_reason']})")
    spin = " ".join(f"{name}={value}" for name, value in described["spin"].items())
    output.show(f"waiting threads: {spin or 'OpenMP defaults'}")
    output.show(
        f"memory: {size(described['memory_bytes'])}, {size(machine.available_memory())} free"
    )
    output.show(f"gpu: {described.get('gpu', 'none that torch can use')}")
    packages = {name: machine.version(name) for name in PACKAGES}
    for name, version in packages.items():
        extra = PACKAGES[name]
        absent = "not installed" + (f" (pip install 'spectool[{extra}]')" if extra else "")
        output.show(f"{name}: {version or absent}")
    library = build.load_library()
    if isinstance(library, build.Library):
        variant = library.variant
        built = {
            "variant": variant.name,
            "origin": library.origin,
            "flags": list(variant.needs),
            "skipped": list(library.skipped),
        }
        output.show(f"kernels: {library}")
    else:
        built = {"reason": library}
        output.show(f"kernels: none ({library})")
    output.show("products on a processor:")
    kernels = {
        f"packed, {str(dtype).removeprefix('torch.')}": describe_products("cpu", dtype)
        for dtype in DTYPES
    } | {
        f"{format}, {str(dtype).removeprefix('torch.')}": str(
            registry.choose(format, device, dtype)
        )
        for format, device, dtype in registry.KERNELS
    }
    for name, choice in kernels.items():
        output.show(f"  {name}: {choice}")
    curves = curve.read_curves()
    shown = list(curves) if options.all else list(curves)[-NEWEST:]
    if shown:
        output.show("measured cost curves, for --draft auto and :tune:")
    for model in shown:
        output.show(f"  {model}: {curve.Curve(curves[model], 'measured')}")
    if len(shown) < len(curves):
        output.show(f"  {len(curves) - len(shown)} older: --all shows them")
    output.result(
        {
            "machine": described,
            "packages": packages,
            "library": built,
            "kernels": kernels,
            "passes": curves,
        }
    )
