"""The demo: its texts, and (slow) a whole run as a user starts it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from spectool.cli import QUANTIZE, app
from spectool.cli.demo import _next_commands, _write_texts
from spectool.examples.stdlib import read_documents

from .conftest import Done


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _write_texts(tmp_path_factory.mktemp("demo"))


def test_nothing_that_is_measured_on_is_learnt_from(texts: dict[str, str]) -> None:
    train = [json.loads(line) for line in Path(texts["train"]).read_text().splitlines()]
    assert {"text", "messages"} == {key for row in train for key in row}
    held_out = {document.text for document in read_documents() if document.held_out}
    trained_on = "".join(row.get("text", "") for row in train)
    prompts = [
        json.loads(line)["prompt"] for line in Path(texts["prompts"]).read_text().splitlines()
    ]
    assert len(prompts) == 8 and texts["sample"] == prompts[0]
    assert all(any(prompt.strip() in text for text in held_out) for prompt in prompts)
    assert not any(prompt in trained_on for prompt in prompts)
    assert Path(texts["held-out"]).read_text()[:200] in "".join(sorted(held_out))


def test_what_no_demo_made_is_left_alone(spectool: Callable[..., Done], tmp_path: Path) -> None:
    mine = tmp_path / "train.jsonl"
    mine.write_text("mine")
    for out in (tmp_path, mine):
        done = spectool("demo", out)
        assert done.code == 2 and "no demo made it" in done.err
    assert mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_stage_that_fails_is_told_to_programs_too(
    spectool: Callable[..., Done],
    tmp_path: Path,
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectool.cli.demo.CHECKPOINT", "not-there")
    monkeypatch.setattr("spectool.cli.demo._write_texts", lambda _: texts)
    done = spectool("demo", tmp_path / "demo", "--json")
    assert done.code == 1 and "spectool quantize ended" in done.json["error"]["message"]


def test_what_to_try_next_can_be_pasted() -> None:
    texts = {"train": "train.jsonl", "prompts": "prompts.jsonl"}
    root: Any = typer.main.get_command(app)
    commands = _next_commands(Path("a demo"), "some/model", texts)
    assert [name for name, *_ in commands] == ["chat", "bench", "quantize"]
    for name, *words in commands:
        command = QUANTIZE.command(words.pop(0)) if name == "quantize" else root.commands[name]
        # Parsed, not run: an option that is not there would raise.
        command.make_context(name, words, resilient_parsing=False)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "spectool", "demo", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # A third of it on two idle cores.
    assert result["seconds"] < 360
    steps = result["steps"]
    assert steps["quantize"]["bits_per_weight"]["linears"] < 2
    assert all(fit["loss_after"] < fit["loss_start"]
               for fit in (block["fits"][0] for block in steps["quantize"]["blocks"]))  # fmt: skip
    for run in (steps["bench"], *steps["bench"]["other_runs"]):
        assert all(row["identical"] == row["prompts"] for row in run["drafters"])
    for name in ("heads", "heads of packed"):
        heads = steps[name]
        assert heads["tokens_per_forward_estimate"] > heads["untrained_estimate"] + 0.3
    for run in steps["bench"]["other_runs"]:
        assert all(row["tokens_per_forward"] > 1.3 for row in run["drafters"][1:])
    assert "Traceback" not in done.stderr
    for command in result["next"]:
        again = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert again.returncode == 0, again.stderr
