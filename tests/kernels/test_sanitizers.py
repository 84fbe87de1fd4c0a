"""The kernels' tests again, with libraries that check every address and every undefined operation,
and the pool with a check of its memory accesses between threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spectool.kernels import build, variants

ROOT = Path(__file__).parent.parent.parent
NAMES = "attention", "steps", "dense", "lookup", "pool", "products", "registry"
FILES = [Path(__file__).parent / f"test_{name}.py" for name in NAMES]

GCC = shutil.which("gcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GCC is None, reason="no gcc here")]


def runtime(name: str) -> str | None:
    """Find a sanitizer's library."""
    words = [str(GCC), f"-print-file-name={name}"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.mark.parametrize("variant", [each.name for each in build.supported()])
def test_nothing_is_read_outside_and_nothing_is_undefined(tmp_path: Path, variant: str) -> None:
    if GCC is None or (library := runtime("libasan.so")) is None:
        pytest.skip("no address sanitizer here")
    compiler = tmp_path / "checking"
    options = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    compiler.write_text(f'#!/bin/sh\nexec {GCC} "$@" -O1 {options}\n')
    compiler.chmod(0o755)
    environment = os.environ | {
        "CC": str(compiler),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "SPECTOOL_KERNELS": variant,
        "LD_PRELOAD": library,
        # Python and torch keep memory until they end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # -s: a sanitizer ends the process, and what pytest had captured would be lost.
    words = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *map(str, FILES)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = tmp_path.rglob("*.so")
    assert f"-{variant}-" in built.name and b"__asan_report_load" in built.read_bytes()


STRESS = """
#include <pthread.h>
#include <stdio.h>
#include "pool.h"

static void add(void *sums, ptrdiff_t index) { ((long *)sums)[index] += index; }

static void *call(void *failed) {
    for (int round = 0; round < 20000; round++) {
        long sums[7] = {0};
        pool_run(add, sums, 7, 2 + round % 3);
        for (int index = 0; index < 7; index++) *(int *)failed += sums[index] != index;
    }
    return 0;
}

int main(void) {
    pthread_t threads[3];
    int failed[3] = {0};
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], 0, call, &failed[i]);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], 0);
    return failed[0] + failed[1] + failed[2] != 0;
}
"""


def test_the_pool_has_no_data_race(tmp_path: Path) -> None:
    if runtime("libtsan.so") is None:
        pytest.skip("no thread sanitizer here")
    (tmp_path / "stress.c").write_text(STRESS)
    program, source = tmp_path / "stress", variants.FOLDER / "pool.c"
    words = [GCC, "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{variants.FOLDER}"]
    subprocess.run([*words, tmp_path / "stress.c", source, "-o", program], check=True)  # type: ignore[list-item]
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
