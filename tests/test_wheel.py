"""Wheels: the kernels that they hold, and an installed one without a compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spectool.kernels import variants

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "core", "decode", "distill", "evaluate", "examples", "kernels", "quantize")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(variants.find_compiler() is None, reason="no C compiler here"),
]
needs_zig = pytest.mark.skipif(
    variants.find_compiler("x86_64-linux-gnu.2.28") is None, reason="ziglang is not installed"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a wheel is built from, and the kernels' tests with the results that they read."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*ROOMS, "tests/kernels", "benchmarks/results"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


def make_wheel(tree: Path, out: Path, *options: str, **environment: str) -> Path:
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), *options, "."]
    subprocess.run(
        [sys.executable, "-m", "pip", *words], check=True, cwd=tree, env=os.environ | environment
    )
    (wheel,) = out.iterdir()
    return wheel


def prebuilt(wheel: Path) -> dict[str, str]:
    """Return machine and key of the libraries in a wheel, by variant."""
    folder = "spectool/kernels/prebuilt/"
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(folder)]
    parts = [name.removeprefix(folder).removesuffix(".so").split("-") for name in names]
    return {variant: f"{machine}-{key}" for machine, variant, key in parts}


@pytest.fixture(scope="module")
def site(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a wheel that was built here; return the folder it is in."""
    wheel = make_wheel(tree, tmp_path_factory.mktemp("out"))
    machine = platform.machine()
    assert wheel.name.endswith(f"-py3-none-linux_{machine}.whl")
    assert list(prebuilt(wheel)) == sorted(each.name for each in variants.variants_of(machine))
    site = tmp_path_factory.mktemp("site")
    words = ["install", "-q", "--no-deps", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return site


def run_without_compiler(
    site: Path, tree: Path, cache: Path, script: str, has_zig: bool = False
) -> str:
    """Run Python code with an installed spectool and nothing on the PATH; return what it prints."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CC"},
        "PATH": "/nowhere",
        "PYTHONPATH": str(site),
        "XDG_CACHE_HOME": str(cache),
    }
    # Zig's compiler is no program of the PATH.
    hide = "" if has_zig else "sys.modules['ziglang'] = None\n"
    words = [sys.executable, "-c", f"import sys\n{hide}{script}"]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LIBRARY = (
    "import spectool.kernels.build as build\n"
    "print(build.__file__)\n"
    "found = build.load_library()\n"
    "print(found)\n"
)
TESTS = "import pytest\nsys.exit(pytest.main(['tests/kernels', '-p', 'no:cacheprovider', '-vv']))\n"


def test_without_a_compiler_the_kernels_of_the_wheel_run(
    site: Path, tree: Path, tmp_path: Path
) -> None:
    place, library = run_without_compiler(site, tree, tmp_path, LIBRARY).splitlines()
    assert place.startswith(str(site)) and ", prebuilt; " in library
    told = run_without_compiler(site, tree, tmp_path, TESTS)
    assert re.search(r"test_it_computes_what_the_twin_does\[.*dense-bfloat16\] PASSED", told)
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_and_without_kernels_torch_computes(
    site: Path, tree: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "site"
    shutil.copytree(site, bare, ignore=shutil.ignore_patterns("prebuilt"))
    _, library = run_without_compiler(bare, tree, tmp_path, LIBRARY).splitlines()
    assert library.startswith("no C compiler")
    told = run_without_compiler(bare, tree, tmp_path, TESTS)
    assert "test_formats_without_a_kernel_say_so PASSED" in told
    assert not re.search(r"test_it_computes_what_the_twin_does.* PASSED", told)


@needs_zig
def test_the_package_of_zig_is_a_compiler(site: Path, tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "site"
    shutil.copytree(site, bare, ignore=shutil.ignore_patterns("prebuilt"))
    _, library = run_without_compiler(bare, tree, tmp_path, LIBRARY, has_zig=True).splitlines()
    assert ", compiled by zig; " in library
    told = run_without_compiler(bare, tree, tmp_path, TESTS, has_zig=True)
    assert re.search(r"test_it_computes_what_the_twin_does\[.*dense-bfloat16\] PASSED", told)


def test_a_wheel_made_without_a_compiler_is_pure(tree: Path, tmp_path: Path) -> None:
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text("import sys\nsys.modules['ziglang'] = None\n")
    environment = {"CC": "/nowhere/cc", "PATH": "/nowhere", "PYTHONPATH": str(hide)}
    wheel = make_wheel(tree, tmp_path / "out", **environment)
    assert wheel.name.endswith("-py3-none-any.whl") and not prebuilt(wheel)


@needs_zig
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_for_an_older_c_library_or_another_machine(
    tree: Path, tmp_path: Path, machine: str
) -> None:
    platform_tag = f"manylinux_2_28_{machine}"
    option = f"--config-settings=--build-option=--plat-name={platform_tag}"
    wheel = make_wheel(tree, tmp_path / "out", option)
    assert wheel.name.endswith(f"-py3-none-{platform_tag}.whl")
    found = prebuilt(wheel)
    assert set(found) == {variant.name for variant in variants.VARIANTS[machine]}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                check_library(archive.read(name), machine)


def check_library(content: bytes, machine: str) -> None:
    """Check a library's machine, that it has the functions, and what it needs of the C library."""
    # The machine's number in an ELF header.
    assert int.from_bytes(content[18:20], "little") == {"x86_64": 62, "aarch64": 183}[machine]
    for function in (b"dense_float32", b"dense_bfloat16", b"spectool_product"):
        assert b"\0" + function + b"\0" in content
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", content)
    assert versions and max((int(major), int(minor)) for major, minor in versions) <= (2, 28)
