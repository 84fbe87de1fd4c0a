"""Products of few rows with a large matrix on a CPU: what decoding a token or a tree consists of.

torch reads a float32 matrix once per row up to some four rows, and has no good path for bfloat16
where the processor has no instructions for it. `skinny.c` reads the matrix once for all rows and
sums every row in an order of its own, so that a row's result does not depend on its mates, to the
last bit. The twin is `torch.nn.functional.linear`: what it computes, and what runs where there is
no compiler. Built with the system's C compiler on first use and kept in the user's cache folder.
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
# Of smaller matrices the call costs more than it saves; with so many rows torch's own products come
# near (a core of Zen 4, 318 M weights in float32: 56 against 173 ms for 8 rows, 453 against 577 for
# 64; in bfloat16 39 against 68, and 215 against 224).
_SMALLEST, MOST_ROWS = 1 << 15, 64
# torch multiplies tiles of bfloat16 where the processor does (two cores of a Xeon with AMX, the
# same weights: 32 against 40 ms for 4 rows, 55 against 49 for 8, 133 against 46 for 32).
MOST_ROWS_BESIDE_TILES = 4
# The kernel reads rows in steps of up to so many elements.
_PADDED = 32


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be built (`missing` says why)."""
    try:
        return _open_library(_build_library())
    except (OSError, subprocess.SubprocessError):
        return None


def missing() -> str | None:
    """Why torch's own products run instead, if they do."""
    if load_library() is not None:
        return None
    return "no C compiler" if _find_compiler() is None else "the C compiler cannot build the kernel"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [M, K] transposed, plus bias [M]; sums in float32, in x's dtype.

    Inference only, on the CPU; x and a contiguous weight are both float32 or both bfloat16, and
    `load_library` gave kernels.
    """
    kernels = load_library()
    assert kernels is not None and x.dtype == weight.dtype
    height, width = weight.shape
    rows_NK = x.reshape(-1, width).contiguous()
    padded = -(-width // _PADDED) * _PADDED
    packed = torch.empty(len(rows_NK) * padded, dtype=torch.float32)
    out_NM = torch.empty(len(rows_NK), height, dtype=torch.float32)
    own = bias.to(torch.float32) if bias is not None else None
    run = kernels.product_float if weight.dtype == torch.float32 else kernels.product_bfloat16
    run(
        rows_NK.data_ptr(),
        weight.data_ptr(),
        None if own is None else own.data_ptr(),
        out_NM.data_ptr(),
        packed.data_ptr(),
        len(rows_NK),
        width,
        height,
        torch.get_num_threads(),
    )
    return out_NM.to(x.dtype).view(*x.shape[:-1], height)


def eligible_linears(modules: Iterator[nn.Module]) -> list[nn.Linear]:
    """The linears whose products `products` would take over; none without `load_library` kernels."""
    found = [
        module
        for module in modules
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.numel() >= _SMALLEST
        and module.weight.is_contiguous()
    ]
    return found if found and load_library() is not None else []


@contextlib.contextmanager
def products(linears: Sequence[nn.Linear], most_rows: int) -> Iterator[None]:
    """Within it, these modules multiply up to `most_rows` rows with the kernel.

    One whose forward was replaced already is left alone.
    """
    linears = [module for module in linears if "forward" not in module.__dict__]
    try:
        for module in linears:
            module.forward = functools.partial(_forward, module, most_rows)  # type: ignore[method-assign]
        yield
    finally:
        for module in linears:
            # What was set hides the class's own method; without it that is back.
            module.__dict__.pop("forward", None)


def _forward(module: nn.Linear, most_rows: int, x: Tensor) -> Tensor:
    if x.numel() > most_rows * module.in_features:
        return nn.functional.linear(x, module.weight, module.bias)
    return linear(x, module.weight, module.bias)


def _find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _build_library() -> Path:
    """The shared library of this source for this processor, compiled unless it lies there."""
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
        # In a folder of its own: several processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            load_library, library = Path(scratch) / "skinny.o", Path(scratch) / "skinny.so"
            subprocess.run([compiler, *_FLAGS, "-c", _SOURCE, "-o", load_library], **quiet)  # type: ignore[call-overload]
            # Linked without OpenMP: torch's own is loaded already, and two pools of threads would
            # spin against each other.
            subprocess.run([compiler, "-shared", load_library, "-o", library], **quiet)  # type: ignore[call-overload]
            library.replace(target)
    return target


def _open_library(path: Path) -> ctypes.CDLL:
    for openmp in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    kernels = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    for run in (kernels.product_float, kernels.product_bfloat16):
        run.argtypes = [*[pointer] * 5, *[size] * 3, ctypes.c_int]
        run.restype = None
    return kernels


def _processor_flags() -> str:
    """What tells processors apart for which -march=native means different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
