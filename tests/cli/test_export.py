"""`export`: the commands to serve the result, and refused input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_command(
    spectool: Callable[..., Any], checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, heads, out = checkpoint("llama"), tmp_path / "heads", tmp_path / "with space"
    text.write_text(text.read_text()[:1500])
    quick = ("--steps", 0, "--seq-len", 64, "--held-out", 4, "--num-heads", 3)
    assert spectool("train-heads", "medusa", source, heads, "--data", text, *quick).code == 0
    done = spectool("export", heads, out, "--format", "vllm-medusa", "--model", source, "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == str(out) and done.json["format"] == "vllm-medusa"
    (line,) = done.json["serve"]
    assert line.startswith(f"vllm serve {source} --speculative-config '{{") and line in done.err
    assert json.loads(line.partition("'")[2][:-1]) == {
        "method": "medusa", "model": str(out), "num_speculative_tokens": 3,
    }  # fmt: skip
    back = spectool(
        "train-heads",
        "medusa",
        source,
        tmp_path / "back",
        "--init-from",
        out,
        "--data",
        text,
        *quick[:6],
    )
    assert back.code == 0, back.err
    for words, message in (
        (("--format", "gguf"), "expected one of vllm-medusa, eagle3, speculators"),
        (("--format", "eagle3"), "these are medusa"),
    ):
        done = spectool("export", heads, tmp_path / "none", "--model", source, *words)
        assert done.code == 2 and message in done.err and not (tmp_path / "none").exists()
