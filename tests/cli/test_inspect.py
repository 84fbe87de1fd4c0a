"""`spectool inspect`: bits that match the files, even if their record is damaged."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import contents

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def written(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make a read-only artifact."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    options = ["--bits", 3, "--symmetric", "--skip", "*0.mlp.up*", "--allow-dense", "--seed", 7]
    assert spectool("quantize", "rtn", checkpoint("llama"), out, *options).code == 0
    return out


@pytest.fixture
def artifact(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def change(artifact: Path, by: Change) -> None:
    config = json.loads((artifact / "config.json").read_text())
    by(config)
    (artifact / "config.json").write_text(json.dumps(config))


def test_bits_equal_the_files(spectool: Spectool, artifact: Path) -> None:
    done = spectool("inspect", artifact, "--layers")
    found = spectool("inspect", artifact, "--json").json
    size = sum(path.stat().st_size for path in artifact.glob("packed-*.safetensors"))
    assert found["bytes"] == size and found["kind"] == "packed" and found["method"] == "rtn"
    assert found["bits_per_weight"]["file"] == 8 * size / found["parameters"]
    assert f"{found['bits_per_weight']['file']:.4f} |" in (artifact / "README.md").read_text()
    assert f"{found['bits_per_weight']['linears']:.4f} bits per weight" in done.out
    assert len(found["modules"]) == 13
    for module in found["modules"]:
        assert f"{module['name']}  rtn  " in done.out
    assert found["source"]["fingerprint"] in done.out


def test_dense_and_foreign_checkpoints(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    dense = spectool("inspect", checkpoint("llama"), "--json").json
    assert (dense["kind"], dense["method"], dense["modules"]) == ("dense", None, [])
    shutil.copytree(checkpoint("llama"), tmp_path / "foreign")
    change(
        tmp_path / "foreign",
        lambda config: config.update(quantization_config={"quant_method": "gptq", "source": "x"}),
    )
    foreign = spectool("inspect", tmp_path / "foreign", "--json").json
    assert (foreign["kind"], foreign["method"]) == ("quantized elsewhere", "gptq")
    assert foreign["source"] is None and foreign["command"] is None
    assert foreign["parameters"] is None and foreign["bits_per_weight"]["file"] is None


def test_a_trained_checkpoint_says_how_it_was_made(
    spectool: Spectool, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    model, out, again = checkpoint("llama"), tmp_path / "out", tmp_path / "again"
    text.write_text(text.read_text()[:1500])
    words = ["--data", text, "--rank", 2, "--steps", 2, "--seq-len", 32, "--teacher", model]
    assert spectool("distill", "lora", model, out, *words, "--batch-tokens", 64).code == 0
    found = spectool("inspect", out, "--json").json
    assert found["kind"] == "dense" and found["made_by"]["options"] == {"rank": 2}
    source, data = found["source"]["fingerprint"], found["made_by"]["data"]
    shown = spectool("inspect", out, "--checksums").out
    assert f"trained with lora (rank=2) from the teacher {source} on text {data}: best" in shown
    assert "of 2 steps, held-out kl " in shown and "checksums: 1 file verified" in shown
    assert f"source: {source}\nmade by: {found['command']}\n" in shown
    paths = {"MODEL": model, "TEACHER": model, "OUT": again, "DATA": text}
    words = [paths.get(word, word) for word in shlex.split(found["command"])]
    assert spectool(*words[1:]).code == 0
    assert contents(out) == contents(again)
    record = out / "spectool_training.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "best": None}))
    done = spectool("inspect", out)
    assert done.code == 2 and "is not the record of a training" in done.err


def _without(*keys: str) -> Change:
    def remove(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return remove


def _with(*keys: str, value: Any) -> Change:
    def write(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return write


@pytest.mark.parametrize(
    "by",
    [
        _without("made_by"),
        *(
            _without("made_by", key)
            for key in ("method", "options", "skip", "allow_dense", "seed", "calibration")
        ),
        _with("made_by", value={}),
        _with("made_by", "options", value=["bits"]),
        _with("made_by", "skip", value=[3]),
        _with("made_by", "calibration", value={"samples": 3}),
    ],
)
def test_unknown_origin_leaves_the_command_out(
    spectool: Spectool, artifact: Path, by: Change
) -> None:
    change(artifact, by)
    found = spectool("inspect", artifact, "--json").json
    assert found["command"] is None and found["method"] == "rtn" and len(found["modules"]) == 13
    done = spectool("inspect", artifact)
    assert done.code == 0 and "made by" not in done.out


def test_absent_source(spectool: Spectool, artifact: Path) -> None:
    change(artifact, _with("source", value={}))
    assert spectool("inspect", artifact).code == 0
    change(artifact, _without("source"))
    done = spectool("inspect", artifact)
    assert done.code == 0 and "source:" not in done.out and "made by" in done.out
    assert spectool("inspect", artifact, "--json").json["source"] is None


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (_with("format_version", value=3), "has format 3"),
        (_without("modules", NAME, "shape"), f"the entry of {NAME} is"),
        (_without("modules", NAME, "method"), f"the entry of {NAME} is"),
        (_with("modules", NAME, "shape", value=[0, 0]), f"the entry of {NAME} is"),
        (_with("source", value="here"), "source is"),
        (_with("made_by", value="me"), "made_by is"),
        (lambda config: config.update(quantization_config="spectool"), "expected an object"),
    ],
)
def test_damaged_record_is_one_line_for_every_command(
    spectool: Spectool, artifact: Path, by: Change, message: str
) -> None:
    change(artifact, by)
    for words in (("inspect", artifact), ("generate", artifact, "--prompt", "a")):
        done = spectool(*words)
        errors = [line for line in done.err.splitlines() if line.startswith("error:")]
        assert done.code == 2 and len(errors) == 1 and message in errors[0], done.err
