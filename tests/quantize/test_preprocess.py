"""Preprocessing: which weights change, and that a killed run ends with the same bytes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.distill import objective
from spectool.errors import TextError, UnsupportedError, UsageError
from spectool.quantize import preprocess, run
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import measure
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.run import quantize
from spectool.report import Reporter, TrainingStep

from ..conftest import contents, tokenizer

Checkpoints = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Write a text that is regular enough to be learnt in a few steps."""
    path = tmp_path / "text.txt"
    path.write_text("def run(path: Path) -> None:\n    return path\n" * 400)
    return str(path)


def job(text: str, **asked: Any) -> QuantizeJob:
    return QuantizeJob(
        method="rtn",
        config=RTN.Config(bits=2, group_size=16),
        seq_len=32,
        allow_dense=True,
        preprocess=Preprocess(text=[text], **{"steps": 20, "rank": 4, "rate": 2e-2, **asked}),
    )


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3_moe"])
def test_the_reshaped_model_is_packed_as_the_original(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text: str,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint(family)
    monkeypatch.setattr(run.shutil, "rmtree", lambda path: None)
    report = quantize(open_checkpoint(source), tmp_path / "out", job(text))
    assert report.preprocess is not None
    assert report.preprocess["merged"] < report.preprocess["packed"] - 1
    layout, scratch = read_layout(tmp_path / "out"), tmp_path / "out.preprocess"
    assert layout.quantization is not None
    assert layout.quantization["source"]["fingerprint"] == open_checkpoint(source).fingerprint()
    record = layout.quantization["made_by"]["preprocess"]
    assert record["text"].startswith("sha256:") and record["steps"] == 20
    assert str(tmp_path) not in json.dumps(layout.config)
    assert measure(layout).linears == measure(read_layout(scratch / "first")).linears
    before, after = (load_file(p / "model.safetensors") for p in (source, scratch / "merged"))
    assert before.keys() == after.keys()
    packed = {name.removesuffix(".q.codes") for name in layout.tensors if ".q.codes" in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in packed if ".experts." not in name}
    assert all(before[name].shape == after[name].shape for name in before)


def test_a_run_that_was_killed_ends_with_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    quantize(open_checkpoint(source), tmp_path / "whole", job(text))
    assert not (tmp_path / "whole.preprocess").exists()
    out = tmp_path / "out"

    class Killed(Exception):
        pass

    steps: list[int] = []

    class Killer(Reporter):
        def event(self, event: Any) -> None:
            if isinstance(event, TrainingStep) and event.evaluation is not None:
                steps.append(event.step)
                if len(steps) in (3, 8):
                    raise Killed

    original = objective.Training

    def storing(**given: Any) -> Any:
        return original(**given, save_seconds=-1, save_share=float("inf"))

    monkeypatch.setattr(objective, "Training", storing)
    for _ in range(2):
        with pytest.raises(Killed):
            quantize(open_checkpoint(source), out, job(text), reporter=Killer())
    quantize(open_checkpoint(source), out, job(text), reporter=Killer())
    assert len(steps) > 8, "the third run went on from the second"
    assert steps == sorted(set(steps)), "no step was taken twice"
    assert contents(out) == contents(tmp_path / "whole")


def test_held_out_text_is_not_trained_on(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lines differ: no training sequence shares a number with a held-out one."""
    path, seen = tmp_path / "text.txt", []
    path.write_text("\n".join(f"def run{n}(): return {n}" for n in range(1000, 3000)))
    original = preprocess.train

    def spy(trained: Any, *more: Any, **given: Any) -> Any:
        seen.append(trained.task.texts)
        return original(trained, *more, **given)

    monkeypatch.setattr(preprocess, "train", spy)
    quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", job(str(path), steps=30))
    (found,) = seen
    sides = found.samples, [sample for batch in found.held_out for sample in batch]
    texts = [tokenizer().batch_decode([sample.tokens for sample in side]) for side in sides]
    train, held_out = ({int(n) for n in re.findall(r"run(\d{4})\(", " ".join(t))} for t in texts)
    assert len(train) > 50 and len(held_out) > 10 and max(train) < min(held_out)


def test_the_scratch_of_another_run_is_left_alone(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    scratch = tmp_path / "out.preprocess"
    scratch.mkdir()
    (scratch / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="something other than an unfinished run"):
            quantize(open_checkpoint(source), out, job(text), overwrite=overwrite)
    assert (scratch / "notes.txt").read_text() == "mine"
    shutil.rmtree(scratch)
    scratch.mkdir()
    (scratch / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="something other"):
        quantize(open_checkpoint(source), out, job(text))
    quantize(open_checkpoint(source), out, job(text, steps=2), overwrite=True)
    assert out.exists() and not scratch.exists()


def test_what_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    short = tmp_path / "short.txt"
    ids = tokenizer().encode(Path(text).read_text())
    short.write_text(tokenizer().decode(ids[:50]))
    with pytest.raises(TextError, match=r"of --preprocess has .* fewer than one sequence"):
        quantize(open_checkpoint(source), tmp_path / "out", job(str(short)))
    monkeypatch.setattr(preprocess, "available_memory", lambda device: 1000)
    with pytest.raises(UnsupportedError, match="trains the whole model"):
        quantize(open_checkpoint(source), tmp_path / "out", job(text))
    words = ["quantize", "rtn", str(source), str(tmp_path / "out")]
    for option in ("--preprocess-steps", "--preprocess-rank", "--preprocess-rate"):
        done = CliRunner().invoke(app, [*words, option, "1"])
        assert done.exit_code == 2 and f"{option}: only with --preprocess, which" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_the_command_says_what_the_ceiling_is(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    words = ["quantize", "rtn", str(checkpoint("llama")), str(tmp_path / "out"), "--bits", "2"]
    words += ["--seq-len", "32", "--preprocess", text, "--preprocess-steps", "10"]
    words += ["--preprocess-rank", "2", "--preprocess-rate", "1e-2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)["preprocess"]
    assert result["merged"] < result["packed"]
    assert f"{result['merged']:.3f} after it" in done.stderr
    assert "preprocessing: loss " in done.stderr and "steps: 10/10" in done.stderr
    assert "kernels" not in done.stderr
