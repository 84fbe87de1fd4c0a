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
        {"id": str(i), "dimension": "plain-skill", "task": "choice", "prompt": f"The {i}",
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
    gates = ("drift.kl.lower<=0", "flips.share<=1", "dimensions.plain-skill.delta>=-100")
    done = spectool(*common, *(word for gate in gates for word in ("--gate", gate)), "--json")
    assert done.code == 3, done.err
    found = done.json
    assert [gate["holds"] for gate in found["gates"]] == [False, True, True]
    assert found["made_for"]["suite"].startswith("sha256:")
    assert found["made_for"]["model"] != found["made_for"]["reference"]
    assert found["dimensions"].keys() == {"plain-skill"}
    assert "verdict: " in done.err and "limits: " in done.err
    assert "not measured: toxicity: needs --scorer" in done.err
    # What was not measured holds no gate; what is no dimension is refused.
    done = spectool(*common, "--gate", "dimensions.toxicity.delta>=-5")
    assert done.code == 3 and "does not hold (nan)" in done.out
    done = spectool(*common, "--gate", "dimensions.plain_skill.delta>=-5")
    assert done.code == 2 and "did you mean dimensions.plain-skill.delta?" in done.err
    done = spectool(*common, "--fail-loss", 1)
    assert done.code == 2 and "at least --pass-loss" in done.err


def test_features_prints_a_line_a_layer(spectool: Spectool, checkpoint: Checkpoint) -> None:
    done = spectool("audit", "features", checkpoint("llama"), "--limit", 5000, "--json")
    assert done.code == 0, done.err
    assert [layer["name"] for layer in done.json["layers"]] == ["layer 0", "layer 1", "final"]
    assert "layer 1: " in done.err and "as secret as their text" in done.err


def test_logprobs_prints_what_it_found(spectool: Spectool, checkpoint: Checkpoint) -> None:
    common = ["--limit", 4000, "--prompt-tokens", 2, "--watched", 1, "--steps", 3]
    done = spectool("audit", "logprobs", checkpoint("llama"), *common, "--json")
    assert done.code == 0, done.err
    assert done.json["rank"] == done.json["width"] == 32
    assert "rank of the log-probabilities: 32" in done.err and "held-out prompts" in done.err


def test_saved_states_serve_as_the_reference(
    spectool: Spectool, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    model, other, saved = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "saved"
    common = ["--text", text, "--limit", 1200, "--window", 64]
    done = spectool("eval", other, *common, "--save-reference", saved, "--save-states")
    assert done.code == 0, done.err
    assert "32 numbers a position in place of 320" in done.err
    blockwise = spectool(
        "eval", other, *common, "--save-reference", tmp_path / "b", "--save-states", "--blockwise"
    )
    assert blockwise.code == 0, blockwise.err
    live = spectool("eval", model, *common, "--reference", other, "--json").json
    for path in (saved, tmp_path / "b"):
        shown = spectool("eval", model, "--reference", path, "--json")
        read = shown.json
        assert 0 < read["reference_error"] < 1e-4 and "reference_error" not in live
        assert "log-probabilities are off by at most" in shown.err
        for name in ("perplexity_ratio", "kl"):
            assert read[name] == pytest.approx(live[name], rel=1e-4)
    assert spectool("eval", other, *common, "--save-states").code == 2
