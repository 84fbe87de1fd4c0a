"""The table of architectures is what the harness finds (`architectures.py`), and has no faults.

`ARCHITECTURES` names the entries to try, separated by commas, `all` for all of them; by default a
few that take different ways.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spectool import methods

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
VERSION = ".".join(transformers.__version__.split(".")[:2])
# What transformers itself does not build from a default configuration, or not without a package.
NOT_BUILT = {
    "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody",
    "reformer",
}  # fmt: skip
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
    assert {row["entry"] for row in rows if "not built" in row} <= NOT_BUILT


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "gptq"])
def test_a_wrong_matrix_is_a_fault(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that passes whatever is packed would say nothing: one matrix's rows are reversed."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    checks: Any = importlib.import_module("architecture_checks")
    shrunken: Any = importlib.import_module("shrunken")
    place = tmp_path / "model"
    model = shrunken.build(shrunken.tiny_config("llama"))
    model.save_pretrained(place)
    checks.tokenizer().save_pretrained(place)
    ids = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(0))
    quantizer: Any = methods.import_method(method, "quantizer")
    right, seen = quantizer.pack, []

    def wrong(weight: torch.Tensor, *args: Any) -> Any:
        seen.append(weight)
        return right(weight.flip(0).contiguous() if len(seen) == 5 else weight, *args)

    for pack, expected in ((right, "works"), (wrong, "FAULT")):
        monkeypatch.setattr(quantizer, "pack", pack)
        scratch = tmp_path / expected
        scratch.mkdir()
        subject = checks.Subject(place, scratch, model, ids)
        assert checks.judge(checks.CHECKS[method], subject, causal=True)["result"] == expected
