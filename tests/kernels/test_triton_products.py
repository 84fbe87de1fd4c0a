"""Triton kernels of packed products: in Triton's interpreter, on a device, and compiled for one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CHECKS = Path(__file__).with_name("triton_checks.py")


def run(*words: str, interpreted: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def run_checks(marked: str, *, interpreted: bool) -> None:
    # Without tests/conftest.py, which imports transformers, and that Triton.
    run("-m", "pytest", "--noconftest", "-m", marked, str(CHECKS), interpreted=interpreted)


def test_in_the_interpreter() -> None:
    run_checks("not slow", interpreted=True)


@pytest.mark.slow
def test_in_the_interpreter_at_length() -> None:
    run_checks("slow", interpreted=True)


@pytest.mark.slow
def test_it_compiles_for_devices_that_are_not_here() -> None:
    run(str(CHECKS.with_name("triton_compiled.py")), interpreted=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device() -> None:
    run_checks("slow or not slow", interpreted=False)
