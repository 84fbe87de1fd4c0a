"""`tune`: the options are kept for this machine, and used as defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import read_record
from spectool.decode.policy.fastest import read_fastest
from spectool.files import TUNED, cache_folder

Spectool = Callable[..., Any]


@pytest.mark.parametrize(("method", "options"), [("medusa", 2), ("eagle3", 3)])
def test_what_is_found_is_what_drafts(
    spectool: Spectool,
    checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    method: str,
    options: int,
) -> None:
    source, heads = checkpoint("llama"), tmp_path / "heads"
    text.write_text(text.read_text()[:1500])
    quick = ("--steps", 0, "--seq-len", 64, "--held-out", 4)
    assert spectool("train-heads", method, source, heads, "--data", text, *quick).code == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("from pathlib\nimport os\n")
    before = {path.name: path.read_bytes() for path in heads.iterdir()}
    done = spectool(
        "tune", heads, source, "--prompts", prompts, "--max-new-tokens", 6, "--json", "--dtype",
        "float32",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "nodes 2: " in done.err and "depth 1: " in done.err
    frame = {"schema_version", "command", "machine", "read", "heads", "speedup"}
    assert len(done.json.keys() - frame) == options and done.json["speedup"] > 0
    assert {path.name: path.read_bytes() for path in heads.iterdir()} == before

    runner = Runner(source, draft=str(heads), dtype=torch.float32)
    config: Any = runner.drafter.config  # type: ignore[attr-defined]
    assert {"nodes": config.nodes, "depth": config.depth}.items() <= done.json.items()
    found = read_fastest(read_record(heads).fingerprint, runner.target)
    assert found is not None and found.speedup == done.json["speedup"]
    shutil.copytree(heads, tmp_path / "copy")
    assert (
        Runner(source, draft=str(tmp_path / "copy"), dtype=torch.float32).drafter.config == config
    )  # type: ignore[attr-defined]
    runner.use(f"{heads}:nodes=3")
    assert runner.drafter.config.nodes == 3  # type: ignore[attr-defined]
    other = Runner(source, draft=str(heads), dtype=torch.bfloat16)
    assert other.drafter.config.nodes == 32  # type: ignore[attr-defined]
    # Heads of before held the times of a machine; a damaged file is none.
    old = json.loads(before["spectool_heads.json"]) | {"tuned": {"here": {"nodes": 2}}}
    (heads / "spectool_heads.json").write_text(json.dumps(old))
    (cache_folder() / TUNED).write_text("{")
    again = Runner(source, draft=str(heads), dtype=torch.float32)
    assert again.drafter.config.nodes == 32  # type: ignore[attr-defined]


def test_what_are_no_heads(
    spectool: Spectool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    done = spectool("tune", tmp_path, checkpoint("llama"), "--prompts", tmp_path / "none.txt")
    assert done.code == 2 and "Error" not in done.err.splitlines()[0]
