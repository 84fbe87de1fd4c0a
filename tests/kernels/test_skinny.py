"""The kernel against `torch.nn.functional.linear`, and against itself."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectool.kernels import skinny

needs_compiler = pytest.mark.skipif(skinny.load_library() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrices(height: int, width: int, rows: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    torch.manual_seed(height + width + rows)
    weight = torch.randn(height, width).to(dtype)
    return torch.randn(rows, width).to(dtype), weight, torch.randn(height).to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 7), (42, 123), (431, 64), (96, 1025)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
def test_it_computes_what_torch_does(
    dtype: torch.dtype, height: int, width: int, rows: int
) -> None:
    x, weight, bias = matrices(height, width, rows, dtype)
    exact = x.double() @ weight.double().T
    for maybe_bias in (None, bias):
        found = skinny.linear(x, weight, maybe_bias)
        expected = exact if maybe_bias is None else exact + maybe_bias.double()
        assert found.dtype == dtype
        # Sums are in float32; bfloat16 rounds the result to 8 bits.
        close = (
            {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        )
        torch.testing.assert_close(found.double(), expected, **close)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(1, 200), (301, 203), (302, 64)])
def test_a_row_does_not_depend_on_its_mates(
    dtype: torch.dtype, threads: int, height: int, width: int
) -> None:
    x, weight, bias = matrices(height, width, 13, dtype)
    torch.set_num_threads(1)
    together = skinny.linear(x, weight, bias)
    torch.set_num_threads(threads)
    for size in (1, 2, 3, 4, 5, 8):
        for start in range(13 - size):
            part = skinny.linear(x[start : start + size], weight, bias)
            assert torch.equal(part, together[start : start + size])


@needs_compiler
def test_modules_are_taken_over_and_given_back() -> None:
    big, small = nn.Linear(256, 128), nn.Linear(8, 8)
    model = nn.Sequential(big, nn.Linear(128, 256, bias=False), small, nn.LayerNorm(8))
    found = skinny.eligible_linears(model.modules())
    assert found == [big, model[1]]
    x = torch.randn(2, 3, 256)
    with torch.inference_mode():
        plain = big(x)
        with skinny.products(found, 8):
            assert torch.equal(big(x), skinny.linear(x, big.weight, big.bias))
            # More rows than allowed are torch's.
            many = torch.randn(9, 256)
            assert torch.equal(big(many), nn.functional.linear(many, big.weight, big.bias))
        torch.testing.assert_close(skinny.linear(x, big.weight, big.bias), plain)
    assert "forward" not in big.__dict__
    with pytest.raises(RuntimeError), skinny.products(found, 8):
        raise RuntimeError
    assert "forward" not in big.__dict__


def test_without_a_compiler_nothing_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import torch; from spectool.kernels import skinny; "
        "assert skinny.eligible_linears(torch.nn.Linear(256, 256).modules()) == []; "
        "print(skinny.missing())"
    )
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "no C compiler"


@needs_compiler
def test_a_compiler_that_fails_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    script = "from spectool.kernels import skinny; print(skinny.load_library(), skinny.missing())"
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None the C compiler cannot build the kernel"
    assert not list(tmp_path.rglob("*.so"))


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
            others[0] = skinny._build_library()
        return done

    monkeypatch.setattr(subprocess, "run", run)
    built = skinny._build_library()
    assert others == [built]
    assert [path.name for path in (tmp_path / "spectool/kernels").iterdir()] == [built.name]
    ctypes.CDLL(str(built))
