"""Pictures of trainings: a panel for the loss and each held-out metric, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectool.cli import app
from spectool.distill.curve import draw_curve


def write(path: Path, losses: list[float | None]) -> None:
    lines = [{"run": 1}, {"step": 0, "held_out": {"step": 0, "score": 1.0, "accuracy": [0.1, 0.2]}}]
    lines += [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines[-1]["held_out"] = {"score": 2.0, "accuracy": [0.3, 0.4], "tokens_per_forward": 1.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_metric_has_a_panel_and_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curve.svg"
    write(metrics, [3.0, None, 2.0])
    draw_curve(metrics, picture)
    drawn = picture.read_bytes()
    for words in ("loss", "held-out accuracy", "held-out tokens per forward", "head 2", "step"):
        assert f">{words}</text>".encode() in drawn, words
    assert b"score" not in drawn
    draw_curve(metrics, picture)
    assert picture.read_bytes() == drawn
    write(metrics, [3.0, None, 1.0])
    draw_curve(metrics, picture)
    assert picture.read_bytes() != drawn


def test_the_commands_draw_what_they_measured(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    text, picture = tmp_path / "text.txt", tmp_path / "curve.png"
    text.write_text("def run(path: Path) -> None:\n    return path\n" * 60)
    draft = str(checkpoint("llama", seed=1))
    own = [
        ("train-heads", "medusa", "--num-heads", "2"),
        ("train-heads", "acceptance", "--draft-model", draft),
        ("distill", "lora", "--rank", "2"),
    ]
    for command, method, *options in own:
        words = [command, method, str(checkpoint("llama")), str(tmp_path / method), *options]
        words += ["--data", str(text), "--steps", "2", "--seq-len", "48", "--plot", str(picture)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and "--plot draws what --metrics holds" in done.stderr
        words += ["--metrics", str(tmp_path / f"{method}.jsonl")]
        refused = [str(tmp_path / "curve.txt") if w == str(picture) else w for w in words]
        done = CliRunner().invoke(app, refused)
        assert done.exit_code == 2 and "ends with .png or .svg" in done.stderr
        assert not list(tmp_path.glob(f"{method}*"))
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 and f"picture: {picture}" in done.stderr, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
