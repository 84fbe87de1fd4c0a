"""The table of architectures is what the harness finds (`architectures.py`), and has no faults.

`ARCHITECTURES` names the entries to try, separated by commas, `all` for all of them; by default a
few that take different ways.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
VERSION = ".".join(transformers.__version__.split(".")[:2])
SAMPLE = "llama,gemma3_text,gpt2,bloom,bert,mixtral,mamba,falcon_h1,gemma3n_text,rwkv"


def committed(version: str) -> dict[str, Any]:
    """The committed rows by entry."""
    file = RESULTS / f"architectures-transformers-{version}.json"
    return {row["entry"]: row for row in json.loads(file.read_text("utf-8"))["entries"]}


def ends(row: dict[str, Any]) -> dict[str, str]:
    """How each check of a row ended."""
    return {name: check["result"] for name, check in row.get("checks", {}).items()}


def test_the_page_is_made_from_the_results() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs/make_architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text("utf-8") == module.page(), "run docs/make_architectures.py"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("architectures-*.json")), ids=lambda f: f.stem)
def test_no_fault_is_committed(file: Path) -> None:
    rows = json.loads(file.read_text("utf-8"))["entries"]
    assert [row["entry"] for row in rows if "FAULT" in ends(row).values()] == []


@pytest.mark.slow
def test_the_table_is_true_here(tmp_path: Path) -> None:
    named = os.environ.get("ARCHITECTURES", SAMPLE)
    only = [] if named == "all" else ["--only", *named.split(",")]
    out = tmp_path / "found.json"
    script = str(ROOT / "tests/architectures.py")
    fresh = ["--lines", str(tmp_path / "lines.jsonl"), "--out", str(out)]
    subprocess.run([sys.executable, script, *only, *fresh], check=True)
    found = {row["entry"]: row for row in json.loads(out.read_text("utf-8"))["entries"]}
    known = committed(VERSION)
    assert found and {name: ends(row) for name, row in found.items()} == {
        name: ends(known[name]) for name in found
    }
