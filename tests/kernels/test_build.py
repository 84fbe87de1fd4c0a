"""The library of the kernels: which variant, and how it is had, with a compiler and without one."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.kernels import build, cpu, registry, variants

needs_compiler = pytest.mark.skipif(variants.find_compiler() is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the source by one line, what came along by nothing; return where libraries go."""
    for name in ("FOLDER", "PREBUILT"):
        monkeypatch.setattr(variants, name, tmp_path / name)
        (tmp_path / name).mkdir()
    (variants.FOLDER / "some.c").write_text("int one(void) { return 1; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.FORCED, raising=False)
    for name in ("load_library", "load_variant"):
        monkeypatch.setattr(build, name, getattr(build, name).__wrapped__)
    return tmp_path / "cache/spectool/kernels"


def write_compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def with_variants(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the machine run variants whose options are their names."""
    made = [variants.Variant(name, (), (f"-D{name}",)) for name in names]
    monkeypatch.setattr(build, "supported", lambda: made)


def test_without_a_compiler_torch_computes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    # Zig's compiler, if it is installed.
    monkeypatch.setitem(sys.modules, "ziglang", None)
    reason = "no C compiler; pip install 'spectool[cc]' brings one"
    assert str(registry.choose.__wrapped__("dense", "cpu", torch.float32)) == f"torch ({reason})"
    with_variants(monkeypatch, "ANY")
    (variant,) = build.supported()
    prebuilt = variants.PREBUILT / f"{variants.library_name(platform.machine(), variant)}.so"
    prebuilt.write_text("linked for another machine")
    told = build.missing()
    assert told is not None and told.startswith(f"{reason}; the library that came along: ")
    assert str(prebuilt) in told


def test_a_compiler_that_fails_is_reported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(write_compiler(tmp_path / "cc", "exit 1")))
    simplest = build.supported()[-1].name
    assert build.missing() == f"the C compiler cannot build the kernels for {simplest}"
    assert not list(cache.iterdir())


@needs_compiler
def test_a_variant_that_cannot_be_built_gives_way_to_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is forced."""
    (variants.FOLDER / "some.c").write_text("#ifdef NEW\n#error unknown\n#endif\nint one;")
    with_variants(monkeypatch, "NEW", "OLD", "OLDER")
    found = build.load_library()
    assert isinstance(found, build.Library) and found.variant.name == "OLD"
    reason = "the C compiler cannot build the kernels for NEW"
    assert found.skipped == (reason,) and str(found).endswith(f"; {reason}")
    assert [path.name.split("-")[1] for path in cache.iterdir()] == ["OLD"]
    monkeypatch.setenv(build.FORCED, "NEW")
    assert build.load_library() == reason


@needs_compiler
def test_a_compiler_may_be_several_words(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that calls another, as ccache does, and options."""
    compiler = variants.find_compiler()
    assert compiler is not None
    (variants.FOLDER / "some.c").write_text("int one(void) { return NUMBER; }")
    caller = write_compiler(tmp_path / "some caller", 'exec "$@"')
    words = [str(caller), *compiler, "-DNUMBER=7"]
    monkeypatch.setenv("CC", shlex.join(words))
    assert variants.find_compiler() == tuple(words)
    found = build.load_library()
    assert isinstance(found, build.Library) and found.functions.one() == 7
    # Another version of the second program is another compiler.
    first = write_compiler(tmp_path / "cc", "exit 0")
    before = build._identity((str(caller), str(first)))
    write_compiler(first, "exit  0")
    assert build._identity((str(caller), str(first))) != before


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, ""), (1.5, "compiling the kernels for ANY, once\n")]
)
def test_a_long_compilation_is_announced(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    told: str,
) -> None:
    monkeypatch.setenv("CC", str(write_compiler(tmp_path / "cc", "exit 1")))
    compile_library = variants.compile_library

    def compile_slowly(*given: Any) -> None:
        time.sleep(seconds)
        compile_library(*given)

    monkeypatch.setattr(variants, "compile_library", compile_slowly)
    with_variants(monkeypatch, "ANY")
    assert build.missing() is not None
    assert capsys.readouterr().err == told


@needs_compiler
def test_of_a_variant_the_newest_libraries_are_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variants(monkeypatch, "ANY")
    cache.mkdir(parents=True)
    machine = platform.machine()
    for number in range(build.KEPT + 2):
        old = cache / f"{machine}-ANY-{number}-abc.so"
        old.touch()
        os.utime(old, (1000 - number, 1000 - number))
    (cache / f"{machine}-ANY2-1-abc.so").touch()
    assert build.missing() is None
    names = {path.name.split("-", 1)[1] for path in cache.iterdir()}
    assert {name for name in names if name.endswith("-abc.so")} == {
        "ANY2-1-abc.so", *(f"ANY-{number}-abc.so" for number in range(build.KEPT - 1))
    }  # fmt: skip
    assert len(names) == build.KEPT + 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = build.missing()
    assert found is not None and str(tmp_path / "file") in found and "compiler" not in found


def test_another_compiler_or_source_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers of which each writes its name, and its last word is where."""
    compilers = {
        name: write_compiler(tmp_path / name, f'for last; do :; done; echo {name} > "$last"')
        for name in ("one", "two")
    }
    with_variants(monkeypatch, "ANY")
    for name, text in (("one", "a"), ("two", "a"), ("two", "a"), ("two", "b")):
        (variants.FOLDER / "some.c").write_text(text)
        monkeypatch.setenv("CC", str(compilers[name]))
        assert build.missing() is not None
    assert sorted(path.read_text() for path in cache.iterdir()) == ["one\n", "two\n", "two\n"]


@needs_compiler
def test_several_processes_may_build_at_the_same_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole build runs after the compiler of another has, and before its library is in place."""
    original, calls = subprocess.run, []

    def run(words: list[object], **options: Any) -> Any:
        done = original(words, **options)
        calls.append(words)
        if len(calls) == 1:
            assert build.missing() is None
        return done

    monkeypatch.setattr(subprocess, "run", run)
    assert build.missing() is None
    assert len(calls) == 2 and len(list(cache.iterdir())) == 1


AVX512 = "avx512f avx512bw avx512dq avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        ("x86_64", "sse2", ["portable"]),
        ("x86_64", "avx2 fma f16c", ["avx2", "portable"]),
        # Some virtual machines hide a flag of those that come together.
        ("x86_64", "avx2 f16c avx_vnni", ["portable"]),
        ("x86_64", "avx2 fma f16c avx_vnni", ["avxvnni", "avx2", "portable"]),
        ("x86_64", "avx2 fma f16c avx512f avx512bw", ["avx2", "portable"]),
        ("x86_64", f"avx2 fma f16c {AVX512}", ["avx512", "avx2", "portable"]),
        (
            "x86_64",
            f"avx2 fma f16c {AVX512} avx512vbmi avx512_bf16 avx_vnni",
            ["avx512bf16", "avx512", "avxvnni", "avx2", "portable"],
        ),
        ("aarch64", "fp asimd", ["portable"]),
        ("aarch64", "fp asimd asimddp i8mm", ["i8mm", "dotprod", "portable"]),
        ("riscv64", "", ["portable"]),
        ("x86_64", None, ["portable"]),
    ],
)
def test_the_variants_are_those_that_the_processor_runs(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, names: list[str]
) -> None:
    known = None if flags is None else frozenset(flags.split())
    monkeypatch.setattr(cpu, "flags", lambda: known)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert [variant.name for variant in build.supported()] == names


@needs_compiler
def test_a_variant_can_be_forced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.FORCED, "portable")
    found = build.load_library()
    assert isinstance(found, build.Library) and found.variant.name == "portable"
    assert [path.name.split("-")[1] for path in cache.iterdir()] == ["portable"]
    monkeypatch.setenv(build.FORCED, "sse9")
    assert str(build.load_library()).startswith("SPECTOOL_KERNELS=sse9: this machine can run ")


@needs_compiler
@pytest.mark.parametrize(("machine", "is_slow"), [("x86_64", True), ("aarch64", False)])
def test_packed_matrices_are_left_to_torch_where_it_is_faster(
    cache: Path, monkeypatch: pytest.MonkeyPatch, machine: str, is_slow: bool
) -> None:
    monkeypatch.setattr(cpu, "flags", frozenset)
    monkeypatch.setattr("platform.machine", lambda: machine)
    reason = "faster than the kernels for portable; SPECTOOL_KERNELS=portable uses these"
    assert build.missing() is None
    assert build.missing_products() == (reason if is_slow else None)
    monkeypatch.setenv(build.FORCED, "portable")
    assert build.missing_products() is None
    monkeypatch.setenv(build.FORCED, "avx2")
    assert build.missing_products() == "SPECTOOL_KERNELS=avx2: this machine can run portable"


@needs_compiler
def test_a_library_that_came_along_is_used_if_it_fits_the_source(cache: Path) -> None:
    """And one that cannot be loaded is compiled anew."""
    compiler, best = variants.find_compiler(), build.supported()[0]
    assert compiler is not None
    prebuilt = variants.PREBUILT / f"{variants.library_name(platform.machine(), best)}.so"

    def origin() -> str:
        found = build.load_library()
        assert isinstance(found, build.Library)
        return found.origin

    prebuilt.write_text("linked for another machine")
    assert origin().startswith("compiled by") and len(list(cache.iterdir())) == 1
    prebuilt.unlink()
    variants.compile_library(compiler, best, prebuilt)
    assert origin() == "prebuilt"
    (variants.FOLDER / "some.c").write_text("int two(void) { return 2; }")
    assert origin().startswith("compiled by") and len(list(cache.iterdir())) == 2


def test_nothing_links_openmp() -> None:
    """The threads of two pools would spin against each other."""
    for path in variants.FOLDER.glob("*.[ch]"):
        assert "#pragma omp" not in path.read_text() and "<omp.h>" not in path.read_text()
    assert not any("openmp" in option for option in variants._OPTIONS)
