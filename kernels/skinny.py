"""Skinny matrix products on a CPU: few rows of x times a large weight, as in decoding.

With up to about four rows torch reads a float32 weight once per row, and it is slow in bfloat16 on
processors without bfloat16 instructions. `skinny.c` reads the weight once for all rows. It sums
each row in a fixed order, so the result of a row does not depend on the other rows, to the last
bit. `torch.nn.functional.linear` is the specification, and runs where there is no compiler. The C
compiler of the system builds the kernel on first use; the library is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name("skinny.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
# For smaller weights the call costs more than it saves. With 64 rows torch is about as fast (one
# Zen 4 core, 318 M weights, kernel against torch: float32 56 against 173 ms for 8 rows and 453
# against 577 for 64; bfloat16 39 against 68 and 215 against 224).
_SMALLEST, MOST_ROWS = 1 << 15, 64
# torch uses bfloat16 tile instructions where the processor has them (two Xeon cores with AMX, same
# weights, kernel against torch: 32 against 40 ms for 4 rows, 55 against 49 for 8, 133 against 46
# for 32).
MOST_ROWS_BESIDE_TILES = 4
# The kernel reads rows in steps of up to 32 elements; scratch rows are padded to that.
_PADDED = 32


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Build and load the kernels; None where that fails (`missing` gives the reason)."""
    try:
        return _open_library(_build_library())
    except (OSError, subprocess.SubprocessError):
        return None


def missing() -> str | None:
    """Return why torch's products run instead of the kernels; None if the kernels run."""
    if load_library() is not None:
        return None
    return "no C compiler" if _find_compiler() is None else "the C compiler cannot build the kernel"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x [..., K] times weight [M, K] transposed, plus bias [M], summed in float32.

    The result has x's dtype. Inference only, on the CPU. x and weight (contiguous) must both be
    float32 or both bfloat16, and `load_library` must have found kernels.
    """
    kernels = load_library()
    assert kernels is not None and x.dtype == weight.dtype
    height, width = weight.shape
    rows_NK = x.reshape(-1, width).contiguous()
    padded = -(-width // _PADDED) * _PADDED
    panels = torch.empty(len(rows_NK) * padded, dtype=torch.float32)
    out_NM = torch.empty(len(rows_NK), height, dtype=torch.float32)
    bias_M = bias.to(torch.float32) if bias is not None else None
    run = kernels.product_float if weight.dtype == torch.float32 else kernels.product_bfloat16
    run(
        rows_NK.data_ptr(),
        weight.data_ptr(),
        None if bias_M is None else bias_M.data_ptr(),
        out_NM.data_ptr(),
        panels.data_ptr(),
        len(rows_NK),
        width,
        height,
        torch.get_num_threads(),
    )
    return out_NM.to(x.dtype).view(*x.shape[:-1], height)


def eligible_linears(modules: Iterator[nn.Module]) -> list[nn.Linear]:
    """Return the linears that `products` can accelerate; none if there are no kernels."""
    linears = [
        module
        for module in modules
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.numel() >= _SMALLEST
        and module.weight.is_contiguous()
    ]
    # Last: models without such linears never start the compiler.
    return linears if linears and load_library() is not None else []


@contextlib.contextmanager
def products(linears: Sequence[nn.Linear], most_rows: int) -> Iterator[None]:
    """Run these modules with the kernel, inside the context, for inputs of up to `most_rows` rows.

    Modules whose forward is replaced already are left alone.
    """
    linears = [module for module in linears if "forward" not in module.__dict__]
    try:
        for module in linears:
            module.forward = functools.partial(_forward, module, most_rows)  # type: ignore[method-assign]
        yield
    finally:
        for module in linears:
            # Deleting the instance attribute restores the class's method.
            module.__dict__.pop("forward", None)


def _forward(module: nn.Linear, most_rows: int, x: Tensor) -> Tensor:
    """Run a linear with the kernel if x has at most `most_rows` rows, else with torch."""
    if x.numel() > most_rows * module.in_features:
        return nn.functional.linear(x, module.weight, module.bias)
    return linear(x, module.weight, module.bias)


def _find_compiler() -> str | None:
    """Return the path of a C compiler: $CC, cc, gcc or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _build_library() -> Path:
    """Compile the shared library for this processor, unless the cache has it; return its path.

    Raises:
        OSError: there is no C compiler.
        SubprocessError: the compiler failed.
    """
    compiler = _find_compiler()
    if compiler is None:
        raise OSError("no C compiler")
    processor = platform.machine() + _processor_flags()
    key = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), processor.encode(), *(flag.encode() for flag in _FLAGS)):
        key.update(part)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "spectool" / "kernels"
    target = folder / f"skinny-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = {"check": True, "capture_output": True, "timeout": 120}
        # In a temporary directory, as several processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled_object, library = Path(scratch) / "skinny.o", Path(scratch) / "skinny.so"
            subprocess.run([compiler, *_FLAGS, "-c", _SOURCE, "-o", compiled_object], **quiet)  # type: ignore[call-overload]
            # Not linked with OpenMP: torch's is loaded already, and the threads of two pools would
            # compete for the cores.
            subprocess.run([compiler, "-shared", compiled_object, "-o", library], **quiet)  # type: ignore[call-overload]
            library.replace(target)
    return target


def _open_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` after torch's OpenMP, and declare its functions."""
    for openmp in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    kernels = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    for run in (kernels.product_float, kernels.product_bfloat16):
        run.argtypes = [*[pointer] * 5, *[size] * 3, ctypes.c_int]
        run.restype = None
    return kernels


def _processor_flags() -> str:
    """Return the processor's instruction set flags, which -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
