"""`inspect --checksums`, and the errors of commands for damaged files before any computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spectool.checkpoint.headers import HEADS, HEADS_FILE, PACKED_INDEX
from spectool.checkpoint.tensors import open_checkpoint
from spectool.methods import import_method
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

from ..conftest import flip
from .conftest import Done

Spectool = Callable[..., Done]
SHARD = "packed-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def artifact(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a read-only artifact."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    job = QuantizeJob(method="rtn", config=import_method("rtn", "quantizer").Config())
    quantize(open_checkpoint(checkpoint("llama")), out, job)
    return out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def forget(path: Path, *keys: str) -> None:
    """Remove the checksums under `keys`, as in files of an older spectool."""
    whole = json.loads(path.read_text())
    entry = whole
    for key in keys:
        entry = entry[key]
    del entry["checksums"]
    path.write_text(json.dumps(whole))


def test_inspect_compares_files_if_asked(spectool: Spectool, artifact: Path, copied: Path) -> None:
    right = spectool("inspect", artifact, "--checksums", "--json").json["checksums"]
    assert right["checked"] and right["sha256"].keys() == {
        path.name for path in artifact.glob("*.safetensors")
    }
    assert "checksums: 3 files verified" in spectool("inspect", artifact, "--checksums").out
    flip(copied / SHARD)
    # Headers alone are read otherwise.
    cheap = spectool("inspect", copied, "--json")
    assert cheap.code == 0 and cheap.json["checksums"] == {**right, "checked": False}
    done = spectool("inspect", copied, "--checksums", "--json")
    assert done.code == 2 and f"{SHARD}: damaged" in done.json["error"]["message"]


@pytest.mark.parametrize("kind", ["missing", "one too many", "one of another", "older", "dense"])
def test_inspect_names_the_file_that_is_not_right(
    spectool: Spectool, artifact: Path, copied: Path, checkpoint: Callable[..., Path], kind: str
) -> None:
    named = SHARD
    if kind == "missing":
        (copied / SHARD).unlink()
    elif kind == "one too many":
        named = "packed-00009.safetensors"
        shutil.copy(copied / SHARD, copied / named)
    elif kind == "one of another":
        shutil.copy(artifact / SHARD.replace("1-of", "2-of"), copied / SHARD)
    else:
        named = "no checksums to compare with"
        if kind == "dense":
            copied = checkpoint("llama")
        else:
            forget(copied / PACKED_INDEX, "metadata")
    done = spectool("inspect", copied, "--checksums")
    assert done.code == 2 and named in done.err and done.out == ""


def test_commands_refuse_a_damaged_artifact_in_one_line(
    spectool: Spectool, copied: Path, text: Path, tmp_path: Path
) -> None:
    flip(copied / SHARD)
    commands = (
        ("generate", copied, "--prompt", "def", "--max-new-tokens", 1),
        ("eval", copied, "--text", text, "--window", 32, "--limit", 100),
        ("eval", copied, "--text", text, "--window", 32, "--limit", 100, "--blockwise"),
        ("export", copied, tmp_path / "dense", "--format", "dense"),
    )
    for words in commands:
        done = spectool(*words)
        errors = [line for line in done.err.splitlines() if line.startswith("error")]
        assert done.code == 2 and len(errors) == 1 and f"{SHARD}: damaged" in errors[0], done.err
        assert done.out == "" and not (tmp_path / "dense").exists()
        assert spectool(*words, "--no-checksums").code == 0


def test_an_older_artifact_is_noted_once(spectool: Spectool, copied: Path, text: Path) -> None:
    note = "no checksums to compare its files with"
    words = ("generate", copied, "--prompt", "def", "--max-new-tokens", 1)
    assert note not in spectool(*words).err
    forget(copied / PACKED_INDEX, "metadata")
    assert spectool(*words).err.count(note) == 1
    evaluated = spectool("eval", copied, "--text", text, "--window", 32, "--limit", 100)
    assert evaluated.code == 0 and evaluated.err.count(note) == 1


def test_heads_are_compared_as_well(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, heads = checkpoint("llama"), tmp_path / "heads"
    text.write_text(text.read_text()[:1500])
    quick = ("--steps", 1, "--seq-len", 32, "--batch-tokens", 64, "--held-out", 2)
    done = spectool(
        "train-heads", "medusa", source, heads, "--data", text, *quick, "--num-heads", 1
    )
    assert done.code == 0, done.err
    words = ("generate", source, "--draft", heads, "--prompt", "def", "--max-new-tokens", 2)
    assert spectool("inspect", heads, "--checksums").out.endswith("checksums: 1 file verified\n")
    assert spectool(*words).code == 0
    flip(heads / HEADS_FILE)
    assert spectool("inspect", heads).code == 0
    damaged = f"{HEADS_FILE}: damaged"
    for refused in (
        ("inspect", heads, "--checksums"),
        words,
        ("export", heads, tmp_path / "out", "--model", source, "--format", "vllm-medusa"),
        (
            "train-heads",
            "medusa",
            source,
            tmp_path / "more",
            "--init-from",
            heads,
            "--data",
            text,
            *quick,
        ),
    ):
        done = spectool(*refused)
        assert done.code == 2 and damaged in done.err, done.err
    assert spectool(*words, "--no-checksums").code == 0
    forget(heads / HEADS)
    older = spectool(*words)
    assert older.code == 0 and older.err.count("no checksums to compare its files with") == 1
    assert spectool("inspect", heads, "--checksums").code == 2
