"""The kernels' shared library of this machine: chosen by its processor, loaded or compiled.

A library that came with the package is used if it was compiled from this very source. Otherwise
one is compiled on first use and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from spectool.kernels import cpu, variants
from spectool.kernels.variants import Variant

# Names the variant to use instead of the best one, for tests and measurements.
FORCED = "SPECTOOL_KERNELS"


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library; `origin` says where it came from."""

    variant: Variant
    functions: ctypes.CDLL
    origin: str

    def __str__(self) -> str:
        used = ", ".join(self.variant.needs) or "only what all processors of its kind have"
        return f"{self.variant.name}, {self.origin}; the processor's flags used: {used}"


def supported() -> list[Variant]:
    """Return the variants that this machine's processor can run, best first."""
    flags = cpu.flags() or frozenset()
    known = variants.variants_of(platform.machine())
    return [variant for variant in known if flags.issuperset(variant.needs)]


@functools.cache
def load_library() -> Library | str:
    """Load the library of the best variant, or of the one that $SPECTOOL_KERNELS names; return why
    where that fails."""
    name, choices = os.environ.get(FORCED), supported()
    for variant in choices:
        if name in (None, "", variant.name):
            return load_variant(variant)
    names = ", ".join(each.name for each in choices)
    return f"{FORCED}={name}: this machine can run {names}"


@functools.cache
def load_variant(variant: Variant) -> Library | str:
    """Load the library of a variant, compiled if none that came with the package fits; return why
    where that fails."""
    name = variants.library_name(platform.machine(), variant)
    prebuilt = variants.PREBUILT / f"{name}.so"
    if prebuilt.exists():
        try:
            return Library(variant, ctypes.CDLL(str(prebuilt)), "prebuilt")
        except OSError:
            # Linked with a C library newer than this machine's; one compiled here fits.
            pass
    compiler = variants.find_compiler()
    if compiler is None:
        return "no C compiler; pip install 'spectool[cc]' brings one"
    try:
        path = _cache() / f"{name}-{_identity(compiler)}.so"
        variants.compile_library(compiler, variant, path)
        return Library(variant, ctypes.CDLL(str(path)), f"compiled by {Path(compiler[0]).name}")
    except subprocess.SubprocessError:
        return f"the C compiler cannot build the kernels for {variant.name}"
    except OSError as error:
        # A cache folder that cannot be written, a library that cannot be loaded.
        return str(error)


def missing() -> str | None:
    """Return why the kernels cannot be had here; None if they can."""
    found = load_library()
    return found if isinstance(found, str) else None


def _cache() -> Path:
    """Return the folder of compiled libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectool/kernels"


def _identity(compiler: tuple[str, ...]) -> str:
    """Return a key that another compiler, or another version of it, does not have."""
    found = Path(compiler[0]).resolve()
    stat = found.stat()
    key = repr((found, stat.st_size, stat.st_mtime_ns, compiler[1:]))
    return hashlib.sha256(key.encode()).hexdigest()[:8]
