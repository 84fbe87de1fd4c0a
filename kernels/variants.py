"""The shared library of the kernels, one for each instruction set: options and compilation.

A library holds all C files of this folder. It depends on the C library only, and what it computes
on its source and its variant only, not on the machine that compiled it. Nothing of spectool is
imported, because the build of a wheel uses this file where nothing of spectool is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PREBUILT = FOLDER / "prebuilt"

# Products are fused with sums only where the source says so: all machines round alike.
_OPTIONS = ("-O3", "-ffp-contract=off", "-fPIC", "-pthread", "-shared")
# 20 seconds on an idle core, more than 300 on a busy machine.
_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels for one instruction set: flags of the processor that it needs, as Linux names
    them, and the compiler's options. `is_slow`: torch unpacks and multiplies faster."""

    name: str
    needs: tuple[str, ...]
    options: tuple[str, ...]
    is_slow: bool = False


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")


def _x86(name: str, *needs: str) -> Variant:
    # Linux names some flags with an underscore, compilers none.
    return Variant(name, needs, tuple(f"-m{flag.replace('_', '')}" for flag in needs))


# Best first; the last of a machine needs nothing. The keys are names of `platform.machine`.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "x86_64": (
        _x86("avx512bf16", *_AVX512, "avx512vbmi", "avx512_bf16"),
        _x86("avx512", *_AVX512),
        _x86("avxvnni", *_AVX2, "avx_vnni"),
        _x86("avx2", *_AVX2),
        # Milliseconds of a 2048x2048 matrix of 4 bits, one thread, torch without AVX: 1 row exact
        # 12.6, unpacked by torch 6.8; 8 rows 69.2 and 6.8; 32 rows 276 and 9.5.
        Variant("portable", (), (), is_slow=True),
    ),
    "aarch64": (
        Variant("i8mm", ("asimddp", "i8mm"), ("-mcpu=generic+dotprod+i8mm",)),
        Variant("dotprod", ("asimddp",), ("-mcpu=generic+dotprod",)),
        Variant("portable", (), ()),
    ),
}


def variants_of(machine: str) -> tuple[Variant, ...]:
    """Return the variants for a type of machine, best first."""
    return VARIANTS.get(machine, (Variant("portable", (), ()),))


def library_name(machine: str, variant: Variant) -> str:
    """Return the file name, without suffix, of a variant of this folder's source."""
    key = hashlib.sha256(repr((_OPTIONS, variant.options)).encode())
    for path in sorted(FOLDER.glob("*.[ch]")):
        key.update(path.read_bytes())
    return f"{machine}-{variant.name}-{key.hexdigest()[:16]}"


def find_compiler(target: str | None = None) -> tuple[str, ...] | None:
    """Return the words that call a C compiler: $CC, which may have options, cc, gcc or clang, else
    Zig's if it is installed as a Python package.

    With a target in Zig's notation, such as "aarch64-linux-gnu.2.28": Zig's, compiling for that.
    """
    if target is None:
        for words in (shlex.split(os.environ.get("CC", "cc")), ["gcc"], ["clang"]):
            if words and (found := shutil.which(words[0])) is not None:
                return (found, *words[1:])
    zig = importlib.util.find_spec("ziglang")
    if zig is None or not zig.submodule_search_locations:
        return None
    # By default Zig compiles for the processor it runs on.
    options = ("-target", target) if target else ("-mcpu=baseline",)
    return (str(Path(zig.submodule_search_locations[0]) / "zig"), "cc", *options)


def compile_library(compiler: Sequence[str], variant: Variant, target: Path) -> None:
    """Compile a variant of this folder's source to the file `target`.

    Raises:
        OSError: the folder cannot be written.
        SubprocessError: the compiler failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a temporary folder, because several processes may compile at the same time.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        library = Path(scratch) / target.name
        sources = sorted(FOLDER.glob("*.c"))
        words = [*compiler, *_OPTIONS, *variant.options, *map(str, sources)]
        words += ["-lm", "-o", str(library)]
        subprocess.run(words, check=True, capture_output=True, timeout=_SECONDS)
        library.replace(target)
