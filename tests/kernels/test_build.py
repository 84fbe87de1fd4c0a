"""Building C files on first use: without a compiler, with a broken one, in several processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.kernels import build, registry

needs_compiler = pytest.mark.skipif(build.missing("dense") is not None, reason="no C compiler here")


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return `reason(PATH=…)`: why a process that has only this environment has no kernel."""
    monkeypatch.setattr(build, "load_library", build.load_library.__wrapped__)

    def find(**environment: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CC", raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            return str(registry.choose.__wrapped__("dense", "cpu", torch.float32))

    return find


def write_compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_torch_computes(tmp_path: Path, reason: Callable[..., str]) -> None:
    assert reason(PATH="/nowhere", XDG_CACHE_HOME=str(tmp_path)) == "torch (no C compiler)"


@needs_compiler
def test_a_compiler_that_fails_is_reported(tmp_path: Path, reason: Callable[..., str]) -> None:
    write_compiler(tmp_path / "cc", "exit 1")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = reason(PATH=path, XDG_CACHE_HOME=str(tmp_path))
    assert found == "torch (the C compiler cannot build the kernel)"
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, reason: Callable[..., str]
) -> None:
    cache = tmp_path / "file"
    cache.touch()
    found = reason(PATH=os.environ["PATH"], XDG_CACHE_HOME=str(cache))
    assert str(cache) in found and "compiler" not in found


def test_another_compiler_builds_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers of which each writes its name, and its last word is where."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    for name, source in (("one", "int8"), ("two", "int8"), ("two", "dense")):
        script = f'for last; do :; done; echo {name} > "$last"'
        monkeypatch.setenv("CC", str(write_compiler(tmp_path / name, script)))
        built.append(build.build_library(source))
    assert [path.read_text() for path in built] == ["one\n", "two\n", "two\n"]
    assert len(set(built)) == 3


@needs_compiler
def test_several_processes_may_build_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole build runs between two steps of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", ("-O0", *build._FLAGS[1:]))
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
