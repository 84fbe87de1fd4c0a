"""Compilation of C files to shared libraries on first use, kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from spectool.kernels import cpu

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")


@functools.cache
def load_library(name: str) -> ctypes.CDLL | str:
    """Build and load `name`.c of this folder; return why where that fails."""
    try:
        library = build_library(name)
        # torch's OpenMP first: the library is linked with none.
        for openmp in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(library))
    except subprocess.SubprocessError:
        return "the C compiler cannot build the kernel"
    except OSError as error:
        # No compiler, a cache folder that cannot be written, a library that cannot be loaded.
        return str(error)


def missing(name: str) -> str | None:
    """Return why the library of `name`.c cannot be had here; None if it can."""
    found = load_library(name)
    return found if isinstance(found, str) else None


def build_library(name: str) -> Path:
    """Compile `name`.c for this processor, unless the cache has its library; return the path.

    Raises:
        OSError: there is no C compiler, or the cache cannot be written.
        SubprocessError: the compiler failed.
    """
    compiler = _find_compiler()
    if compiler is None:
        raise OSError("no C compiler")
    source = _FOLDER / f"{name}.c"
    key = hashlib.sha256()
    for path in (source, *sorted(_FOLDER.glob("*.h"))):
        key.update(path.read_bytes())
    found = Path(compiler).resolve()
    version = found.stat().st_size, found.stat().st_mtime_ns
    processor = platform.machine(), sorted(cpu.flags() or [platform.processor()])
    key.update(repr((found, version, processor, _FLAGS)).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "spectool" / "kernels"
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = {"check": True, "capture_output": True, "timeout": 120}
        # In a temporary directory, as several processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, library = Path(scratch) / f"{name}.o", Path(scratch) / f"{name}.so"
            subprocess.run([compiler, *_FLAGS, "-c", source, "-o", compiled], **quiet)  # type: ignore[call-overload]
            # Not linked with OpenMP: torch's is loaded already, and the threads of two pools would
            # compete for the cores.
            subprocess.run([compiler, "-shared", compiled, "-o", library], **quiet)  # type: ignore[call-overload]
            library.replace(target)
    return target


def _find_compiler() -> str | None:
    """Return the path of a C compiler: $CC, cc, gcc or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
