"""The audits end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Choices, and a reply that needs a scorer."""
    rows: list[dict[str, Any]] = [
        {"id": str(i), "dimension": "utility", "task": "choice", "prompt": f"The {i}",
         "options": [" red", " tree"], "gold": i % 2}
        for i in range(8)
    ]  # fmt: skip
    rows.append({"id": "t", "dimension": "toxicity", "task": "generate", "prompt": "He said"})
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_trust_gates_on_any_number(
    spectool: Spectool, checkpoint: Checkpoint, suite: Path, text: Path
) -> None:
    model, other = checkpoint("llama"), checkpoint("llama", seed=1)
    common = ["audit", "trust", model, "--reference", other, "--suite", suite]
    common += ["--text", text, "--limit", 600, "--max-new-tokens", 5]
    done = spectool(*common, "--gate", "drift.kl.lower<=0", "--gate", "flips.share<=1", "--json")
    assert done.code == 3, done.err
    found = done.json
    assert [gate["holds"] for gate in found["gates"]] == [False, True]
    assert found["made_for"]["suite"].startswith("sha256:")
    assert found["made_for"]["model"] != found["made_for"]["reference"]
    assert found["dimensions"].keys() == {"utility"}
    assert "verdict: " in done.err and "limits: " in done.err
    assert "not measured: toxicity: needs --scorer" in done.err
    # What was not measured holds no gate; what is no dimension is refused.
    done = spectool(*common, "--gate", "dimensions.toxicity.delta>=-5")
    assert done.code == 3 and "does not hold (nan)" in done.out
    done = spectool(*common, "--gate", "dimensions.cheese.delta>=-5")
    assert done.code == 2 and "no metric" in done.err
    done = spectool(*common, "--fail-loss", 1)
    assert done.code == 2 and "at least --pass-loss" in done.err
