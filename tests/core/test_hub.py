"""Hub ids, with fakes of huggingface_hub: nothing here uses a network."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)

from spectool.checkpoint import hub
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import plan_job

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("owner/name", False),
        ("gpt2", False),
        ("Qwen/Qwen3-0.6B", False),
        ("./owner/name", True),
        ("../name", True),
        ("/abs/name", True),
        ("a/b/c", True),
        ("owner/na me", True),
        (".", True),
        (Path("owner/name"), True),
    ],
)
def test_ids_and_paths(
    model: str | Path, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_local(model) is local
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.is_local("owner/name")


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoints) -> list[Any]:
    """Fake a hub that holds `owner/name`, the tiny llama; returns the list of its requests."""
    source, asked = checkpoint("llama"), []

    def metadata(model: str, *, revision: str | None = None) -> Any:
        asked.append(("headers", model, revision))
        path = source / "model.safetensors"
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        tensors = {
            entry.name: SimpleNamespace(
                dtype=entry.dtype,
                shape=list(entry.shape),
                data_offsets=(entry.start - 8 - length, entry.start - 8 - length + entry.num_bytes),
            )
            for entry in read_header(path)[1]
        }
        return SimpleNamespace(files_metadata={path.name: SimpleNamespace(tensors=tensors)})

    def download(model: str, file: str, *, revision: str | None = None) -> str:
        asked.append((file, model, revision))
        return str(source / file)

    def snapshot(
        model: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert "consolidated*" in ignore_patterns
        asked.append(("snapshot", model, revision, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_dry_run_reads_headers_only(fake_hub: list[Any], checkpoint: Checkpoints) -> None:
    remote = open_checkpoint("owner/name", revision="main", headers_only=True)
    assert fake_hub == [("config.json", "owner/name", "main"), ("headers", "owner/name", "main")]
    local = open_checkpoint(checkpoint("llama"), headers_only=True)
    there, here = remote.layout, local.layout
    assert there.config == here.config and there.num_bytes == here.num_bytes
    assert {n: (e.dtype, e.shape, e.num_bytes) for n, e in there.tensors.items()} == {
        n: (e.dtype, e.shape, e.num_bytes) for n, e in here.tensors.items()
    }
    job = QuantizeJob(method="rtn", config=RTN.Config(bits=3))
    plans = [plan_job(each, job, device="cpu") for each in (remote, local)]
    assert plans[0] == plans[1] and plans[0].num_weights > 0


def test_fetched_checkpoint_knows_its_commit(fake_hub: list[Any], checkpoint: Checkpoints) -> None:
    opened = open_checkpoint("owner/name", revision="v1")
    assert opened.revision == checkpoint("llama").name
    ((what, model, revision, patterns),) = fake_hub
    assert (what, model, revision) == ("snapshot", "owner/name", "v1")
    assert "*.safetensors" in patterns and not any("bin" in pattern for pattern in patterns)
    assert "*.py" not in patterns
    open_checkpoint("owner/name", trust_remote_code=True)
    assert "*.py" in fake_hub[-1][3]
    assert open_checkpoint(checkpoint("llama")).revision is None
    assert opened.name == "owner/name" and not opened.trust_remote_code


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("cannot find\nthe file"),
        ConnectionError("no route to host"),
        OSError("offline"),
        RuntimeError("what an HTTP library raises"),
        ValueError("bad id"),
        ValueError(""),
    ],
)
def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    for name in ("snapshot_download", "hf_hub_download", "get_safetensors_metadata"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    for attempt in (hub.fetch, hub.remote_layout):
        with pytest.raises(CheckpointError, match=r"^owner/name: no directory here") as caught:
            attempt("owner/name", None)
        assert "\n" not in str(caught.value) and caught.value.hint


def test_repository_without_safetensors(
    fake_hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise NotASafetensorsRepoError("no")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fail)
    with pytest.raises(CheckpointError, match="owner/name: holds no safetensors weights"):
        hub.remote_layout("owner/name", None)


def test_offline_the_real_client_fails_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for attempt in (hub.fetch, hub.remote_layout):
        with pytest.raises(CheckpointError, match="spectool-tests/nothing: ") as caught:
            attempt("spectool-tests/nothing", None)
        assert "\n" not in str(caught.value)
