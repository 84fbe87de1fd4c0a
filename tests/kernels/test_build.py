"""Building C files on first use: without a compiler, with a broken one, in several processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectool.kernels import build

needs_compiler = pytest.mark.skipif(build.missing("dense") is not None, reason="no C compiler here")


def reason_elsewhere(**environment: str) -> str:
    """Return why another process has no kernel."""
    script = (
        "import torch; from spectool.kernels import registry; "
        "print(registry.choose('dense', 'cpu', torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    there = str(tmp_path)
    assert reason_elsewhere(PATH="/nowhere", XDG_CACHE_HOME=there) == "torch (no C compiler)"


@needs_compiler
def test_a_compiler_that_fails_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    reason = reason_elsewhere(PATH=path, XDG_CACHE_HOME=str(tmp_path))
    assert reason == "torch (the C compiler cannot build the kernel)"
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "file"
    cache.touch()
    reason = reason_elsewhere(PATH=os.environ["PATH"], XDG_CACHE_HOME=str(cache))
    assert str(cache) in reason and "compiler" not in reason


@needs_compiler
def test_another_compiler_builds_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.build_library("int8")
    other = tmp_path / "cc"
    other.write_text(f'#!/bin/sh\nexec {build._find_compiler()} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CC", str(other))
    assert build.build_library("int8") not in (first, build.build_library("dense"))


@needs_compiler
def test_several_processes_may_build_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole build runs between two steps of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    original, others = subprocess.run, []

    def run(words: list[object], **options: Any) -> Any:
        done = original(words, **options)
        if not others:
            others.append(None)
            others[0] = build.build_library("dense")
        return done

    monkeypatch.setattr(subprocess, "run", run)
    built = build.build_library("dense")
    assert others == [built]
    assert [path.name for path in (tmp_path / "spectool/kernels").iterdir()] == [built.name]
    ctypes.CDLL(str(built))
