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
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from spectool.kernels import cpu, variants
from spectool.kernels.variants import Variant

# Names the variant to use instead of the best one, for tests and measurements.
FORCED = "SPECTOOL_KERNELS"

# Compiled libraries of a variant that are kept: environments with another version of spectool, or
# another compiler, use the same cache.
KEPT = 4


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library; `origin`: where it came from; `skipped`: why better ones were not."""

    variant: Variant
    functions: ctypes.CDLL
    origin: str
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        used = ", ".join(self.variant.needs) or "only what all processors of its kind have"
        told = f"{self.variant.name}, {self.origin}; the processor's flags used: {used}"
        return "; ".join((told, *self.skipped))


def supported() -> list[Variant]:
    """Return the variants that this machine's processor can run, best first."""
    flags = cpu.flags() or frozenset()
    known = variants.variants_of(platform.machine())
    return [variant for variant in known if flags.issuperset(variant.needs)]


@functools.cache
def load_library() -> Library | str:
    """Load the library of the best variant that can be had, or of the one that $SPECTOOL_KERNELS
    names; return why where that fails."""
    name, choices = os.environ.get(FORCED), supported()
    wanted = [variant for variant in choices if name in (None, "", variant.name)]
    if not wanted:
        names = ", ".join(each.name for each in choices)
        return f"{FORCED}={name}: this machine can run {names}"
    skipped: list[str] = []
    for variant in wanted:
        # An older compiler lacks the options of newer instructions.
        found = load_variant(variant)
        if isinstance(found, Library):
            return replace(found, skipped=tuple(skipped))
        skipped.append(found)
    # The last variant needs least, so it tells most.
    return skipped[-1]


@functools.cache
def load_variant(variant: Variant) -> Library | str:
    """Load the library of a variant, compiled if none that came with the package fits; return why
    where that fails."""
    name = variants.library_name(platform.machine(), variant)
    prebuilt, why_not = variants.PREBUILT / f"{name}.so", ""
    if prebuilt.exists():
        try:
            return Library(variant, ctypes.CDLL(str(prebuilt)), "prebuilt")
        except OSError as error:
            # Linked with a C library newer than this machine's; one compiled here fits.
            why_not = f"; the library that came along: {error}"
    compiler = variants.find_compiler()
    if compiler is None:
        return f"no C compiler; pip install 'spectool[cc]' brings one{why_not}"
    try:
        path = _cache() / f"{name}-{_identity(compiler)}.so"
        if not path.exists():
            with _told(f"compiling the kernels for {variant.name}, once"):
                variants.compile_library(compiler, variant, path)
            _remove_old(path)
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


def missing_products() -> str | None:
    """Return why packed matrices are left to torch here; None if the kernels multiply with them.

    A variant that is slower than torch is used where $SPECTOOL_KERNELS names it.
    """
    found = load_library()
    if isinstance(found, str):
        return found
    name = found.variant.name
    if found.variant.is_slow and os.environ.get(FORCED) != name:
        return f"faster than the kernels for {name}; {FORCED}={name} uses these"
    return None


def _cache() -> Path:
    """Return the folder of compiled libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectool/kernels"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Print a line to stderr if what is done takes more than a second."""
    # No reporter is at hand: whatever multiplies first compiles.
    timer = threading.Timer(1.0, print, [what], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _remove_old(path: Path) -> None:
    """Remove the libraries of a new one's variant that were compiled before the newest `KEPT`."""
    machine, variant, *_ = path.name.split("-")
    # Another process may remove them at the same time, or replace them.
    found: list[tuple[int, Path]] = []
    for other in path.parent.glob(f"{machine}-{variant}-*.so"):
        with suppress(FileNotFoundError):
            found.append((other.stat().st_mtime_ns, other))
    for _, other in sorted(found)[:-KEPT]:
        other.unlink(missing_ok=True)


def _identity(compiler: tuple[str, ...]) -> str:
    """Return a key that other words, or other versions of the programs among them, do not have."""
    programs = [Path(found).resolve() for word in compiler if (found := shutil.which(word))]
    stats = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in programs]
    return hashlib.sha256(repr((compiler, stats)).encode()).hexdigest()[:8]
