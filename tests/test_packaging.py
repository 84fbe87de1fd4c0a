"""The folder table, the import rules between rooms, and what may not be imported early."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spectool

ROOT = Path(__file__).parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Who may import whom, by room; core is `spectool` itself.
ALLOWED = {
    "core": {"core", "kernels"},
    "kernels": {"kernels"},
    # --preprocess trains by an objective of distill.
    "quantize": {"quantize", "core", "kernels", "distill"},
    "decode": {"decode", "core", "kernels"},
    "distill": {"distill", "core", "decode"},
    "evaluate": {"evaluate", "core", "decode"},
    "cli": {"cli", "core", "kernels", "quantize", "decode", "distill", "evaluate", "examples"},
    "examples": {"examples", "core"},
}


def python_files() -> list[tuple[str, Path]]:
    """All modules but the entry point and the public face, which open the top floors."""
    return [
        (room, path)
        for room in ALLOWED
        for path in sorted((ROOT / room).rglob("*.py"))
        if path not in (ROOT / "core/__main__.py", ROOT / "core/__init__.py")
    ]


def test_packages_match_folders() -> None:
    listed = set(SETUP["packages"])
    found = {
        ".".join(["spectool", *parts[parts[0] == "core" :]])
        for room in ALLOWED
        for init in (ROOT / room).rglob("__init__.py")
        for parts in [init.parent.relative_to(ROOT).parts]
    }
    assert listed == found
    assert set(SETUP["package-dir"].values()) == set(ALLOWED)


@pytest.mark.parametrize(("room", "path"), python_files(), ids=lambda value: str(value)[-40:])
def test_rooms_import_only_what_they_may(room: str, path: Path) -> None:
    for module in imports(path):
        assert module.partition(".")[0] not in ALLOWED, f"{module}: a folder by its bare name"
        if module.partition(".")[0] == "spectool":
            second = module.split(".")[1] if "." in module else ""
            target = second if second in ALLOWED and second != "core" else "core"
            assert target in ALLOWED[room], f"{path.name} of {room} imports {module}"


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", spectool.__all__)
def test_each_public_name_is_there_and_explained(name: str) -> None:
    found = getattr(spectool, name)
    assert found.__doc__ and name in dir(spectool)
    assert callable(found) or name == "__version__"


def test_the_public_face_is_what_an_editor_sees() -> None:
    """Names that type checkers are told of are those that `__getattr__` finds, and no others."""
    told = {
        f"{node.module}:{alias.name}"
        for block in ast.parse((ROOT / "core/__init__.py").read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert spectool.__all__ == sorted(spectool.__all__)
    assert {place.partition(":")[2] for place in told} | {"SpectoolError", "__version__"} == set(
        spectool.__all__
    )
    for place in told:
        module, _, name = place.partition(":")
        found = getattr(importlib.import_module(module), name)
        assert name == "quantize" or getattr(spectool, name) is found
    with pytest.raises(AttributeError, match="no attribute 'cheese'"):
        _ = spectool.cheese  # type: ignore[attr-defined]


def run_elsewhere(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_torch_alone_until_a_name_is_used() -> None:
    run_elsewhere(
        "import sys, spectool\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert callable(spectool.quantize) and 'torch' not in sys.modules\n"
        "assert spectool.quantize is sys.modules['spectool.quantize']\n"
    )
    run = importlib.import_module("spectool.quantize.run")
    assert callable(spectool.quantize) and vars(spectool.quantize)["run"] is run


@pytest.mark.slow
def test_names_are_there_whatever_was_imported_before() -> None:
    run_elsewhere(
        "import spectool\n"
        "assert callable(spectool.quantize)\n"
        "from spectool.quantize.run import QuantizeJob\n"
        "assert callable(spectool.quantize) and spectool.quantize.run.QuantizeJob is QuantizeJob\n"
        "assert spectool.Runner.__module__ == 'spectool.decode.generate'\n"
    )


QUICK_COMMANDS = [
    "--help",
    "--version",
    "list",
    "list quantizers --json",
    "quantize --help",
    "eval --help",
    "bench --help",
    "generate --help",
    "chat --help",
    "inspect model",
    "report result.json",
]


def test_quick_commands_do_not_import_torch(tmp_path: Path) -> None:
    """Each runs in a process of its own, in which nothing but the app was imported before."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    weights = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (checkpoint / "model.safetensors").write_bytes(weights)
    (tmp_path / "result.json").write_text('{"schema_version": 2}')
    script = f"""
import os, sys
os.chdir({str(tmp_path)!r})
from spectool.cli import app
for command in {QUICK_COMMANDS}:
    sys.stdout.flush()
    if not (child := os.fork()):
        told, sys.stdout = sys.stdout, open(os.devnull, "w")
        try:
            app(command.split())
        except SystemExit as stop:
            if stop.code:
                print(command, "exited", stop.code, file=told)
        heavy = {{"torch", "transformers", "bitsandbytes", "prompt_toolkit"}} & set(sys.modules)
        if heavy:
            print(command, "imported", *heavy, file=told)
        told.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(command, "died")
"""
    assert run_elsewhere(script) == ""
