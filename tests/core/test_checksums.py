"""A flipped byte or another artifact's shard is noticed when it is read."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

import spectool
from spectool.checkpoint import checksums
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.checksums import BackgroundCheck, Checksums, Guard
from spectool.checkpoint.headers import PACKED_INDEX, read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

from ..conftest import contents, flip
from ..stopping import stopped

JOB = QuantizeJob(method="rtn", config=import_method("rtn", "quantizer").Config(bits=4))
SHARDS = [f"packed-0000{index}-of-00003.safetensors" for index in range(3)]


@pytest.fixture(scope="module")
def artifacts(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Make two artifacts of equal shapes; tests only read them."""
    folder = tmp_path_factory.mktemp("artifacts")
    for seed in (0, 1):
        quantize(open_checkpoint(checkpoint("llama", seed=seed)), folder / str(seed), JOB)
    return folder / "0", folder / "1"


@pytest.fixture
def copied(artifacts: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts[0], tmp_path / "copy"))


def forget(path: Path) -> None:
    """Turn an artifact into one of an older spectool."""
    index = json.loads((path / PACKED_INDEX).read_text())
    del index["metadata"]["checksums"]
    (path / PACKED_INDEX).write_text(json.dumps(index))


def test_checksums_are_those_of_the_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "WINDOW", 1 << 14)
    monkeypatch.setattr(checksums, "CHUNK", 1000)
    for size in (1, (1 << 14) - 1, 1 << 14, (1 << 15) + 5):
        data = torch.arange(size, dtype=torch.int32).numpy().tobytes()[:size]
        (tmp_path / "x").write_bytes(data)
        found = checksums.of_file(tmp_path / "x")
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert found.xxh3_64 == xxhash.xxh3_64_hexdigest(data)
        Guard(tmp_path / "x", found.xxh3_64).check()


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("kind", ["flipped", "foreign"])
def test_a_shard_that_is_another_is_not_loaded(
    artifacts: tuple[Path, Path], copied: Path, shard: str, kind: str
) -> None:
    if kind == "flipped":
        flip(copied / shard)
    else:
        shutil.copy(artifacts[1] / shard, copied / shard)
    for load in (spectool.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{shard}: damaged, or not the file"):
            load(copied)
    spectool.load(copied, checksums=False)


def test_the_way_of_loading_leaves_no_trace(copied: Path) -> None:
    for model in (
        spectool.load(copied),
        spectool.load(copied, checksums=False),
        AutoModelForCausalLM.from_pretrained(copied),
    ):
        assert "checksums" not in model.config.to_dict()["quantization_config"]


def test_a_shard_is_compared_when_it_is_first_read_from(copied: Path) -> None:
    """Read block by block, the other shards are not compared."""
    flip(copied / SHARDS[2])
    checkpoint = open_checkpoint(copied)
    architecture = Architecture(checkpoint)
    first, second = architecture.blocks
    assert architecture.read(architecture.block_tensors(first))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=SHARDS[2]):
            architecture.read(architecture.block_tensors(second))
    with pytest.raises(CheckpointError, match=SHARDS[2]):
        checkpoint.fingerprint()
    unchecked = Architecture(open_checkpoint(copied, checksums=False))
    assert unchecked.read(unchecked.block_tensors(second))


def test_a_shard_is_compared_once(artifacts: tuple[Path, Path], monkeypatch: Any) -> None:
    checkpoint = open_checkpoint(artifacts[0])
    read: list[Path] = []
    compute = checksums._compute_xxh3
    monkeypatch.setattr(checksums, "_compute_xxh3", lambda path: read.append(path) or compute(path))
    for _ in range(2):
        for name in checkpoint.layout.tensors:
            checkpoint.read(name)
    assert sorted(path.name for path in read) == SHARDS


def test_an_older_artifact_loads_with_a_note(copied: Path) -> None:
    assert read_layout(copied).notes == []
    forget(copied)
    flip(copied / SHARDS[1])
    spectool.load(copied)
    AutoModelForCausalLM.from_pretrained(copied)
    assert read_layout(copied).notes == [
        f"{copied}: has no checksums to compare its files with: an older spectool wrote it"
    ]


def test_a_dense_checkpoint_has_neither_checksums_nor_a_note(
    checkpoint: Callable[..., Path],
) -> None:
    layout = read_layout(checkpoint("llama"))
    assert not layout.checksums and not layout.guards and not layout.notes


@pytest.mark.parametrize(
    ("stored", "refusal"),
    [
        (7, "cannot be read"),
        ([], "cannot be read"),
        ({SHARDS[0]: None}, "cannot be read"),
        ({SHARDS[0]: {"sha256": "0"}}, "cannot be read"),
        ({SHARDS[0]: {"sha256": "0", "xxh3_64": 1}}, "cannot be read"),
        ({"../x": {"sha256": "0", "xxh3_64": "0"}}, "cannot be read"),
        ({SHARDS[0]: {"sha256": "0", "xxh3_64": "0"}}, f"{SHARDS[1]}: has no checksum"),
    ],
)
def test_checksums_that_cannot_be_right(copied: Path, stored: Any, refusal: str) -> None:
    index = json.loads((copied / PACKED_INDEX).read_text())
    index["metadata"]["checksums"] = stored
    (copied / PACKED_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=refusal):
        spectool.load(copied)


def test_a_resumed_run_ends_with_the_same_bytes(
    artifacts: tuple[Path, Path],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Also if an older spectool, which stored SHA-256 alone, began it, or a shard was damaged."""
    with stopped(ArtifactWriter, "finish", after=0):
        quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", JOB)
    manifest = json.loads((tmp_path / "out.partial.json").read_text())
    for record in manifest["shards"].values():
        del record["xxh3_64"]
    (tmp_path / "out.partial.json").write_text(json.dumps(manifest))
    flip(tmp_path / "out.partial" / SHARDS[1])
    quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", JOB)
    assert contents(tmp_path / "out") == contents(artifacts[0])


def test_verifying_compares_both(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"data")
    right = checksums.of_file(tmp_path / "x")
    checksums.verify(tmp_path, {"x": right})
    for wrong, kind in (
        (Checksums("0", right.xxh3_64), "SHA-256"),
        (Checksums(right.sha256, "0"), "XXH3"),
    ):
        with pytest.raises(CheckpointError, match=f"its {kind} is"):
            checksums.verify(tmp_path, {"x": wrong})


ABANDONED = """
import pathlib, sys, time
from spectool.checkpoint.checksums import BackgroundCheck, Guard

class Slow(Guard):
    def check(self):
        time.sleep(60)

BackgroundCheck([Slow(pathlib.Path(), "")])
sys.exit("failed meanwhile")
"""


def test_a_run_that_fails_does_not_wait_for_the_comparison() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED], capture_output=True, text=True, timeout=20
    )
    assert ended.returncode == 1 and ended.stderr == "failed meanwhile\n"


def test_whatever_stops_a_comparison_is_raised() -> None:
    class Broken(Guard):
        def check(self) -> None:
            raise ValueError("no map")

    with pytest.raises(ValueError, match="no map"):
        BackgroundCheck([Broken(Path(), ""), Broken(Path(), "")]).finish()
    BackgroundCheck([]).finish()
