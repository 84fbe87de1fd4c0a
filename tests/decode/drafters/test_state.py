from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.checkpoint.artifact import write_safetensors
from spectool.decode import draft_state
from spectool.errors import CheckpointError, InputError, SpectoolError

TENSORS = {"ids": torch.arange(6, dtype=torch.int32).view(2, 3), "scores": torch.rand(7)}


def test_no_file_is_an_empty_state(tmp_path: Path) -> None:
    assert draft_state.load(tmp_path / "absent", "recycle") == {}
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "state"
    draft_state.save(path, "recycle", TENSORS)
    loaded = draft_state.load(path, "recycle")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    before = path.read_bytes()
    draft_state.save(path, "recycle", loaded)
    assert path.read_bytes() == before


def test_a_state_of_another_drafter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    draft_state.save(path, "trigram", TENSORS)
    with pytest.raises(CheckpointError, match="the state of trigram, not of recycle"):
        draft_state.load(path, "recycle")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "spectool-packed", "version": 1, "drafter": "recycle"},
        {
            "format": draft_state.FORMAT,
            "version": draft_state.FORMAT_VERSION + 1,
            "drafter": "recycle",
        },
        {"format": draft_state.FORMAT, "drafter": "recycle"},
    ],
)
def test_another_format_is_refused(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = tmp_path / "state"
    write_safetensors(path, TENSORS, metadata)
    with pytest.raises(CheckpointError, match="no state of a drafter in version 1"):
        draft_state.load(path, "recycle")


def with_header(header: dict[str, Any]) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing of the kind",
        with_header({}),
        with_header({"__metadata__": {"format": "pt"}}),
        with_header({"__metadata__": {"spectool": "{"}}),
        with_header({"__metadata__": {"spectool": "7"}}),
        with_header({"__metadata__": {"spectool": "[]"}}),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        draft_state.load(path, "recycle")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        draft_state.load(tmp_path, "recycle")


def test_a_newer_state_replaces_an_older(tmp_path: Path) -> None:
    path = tmp_path / "state"
    draft_state.save(path, "recycle", TENSORS)
    draft_state.save(path, "recycle", {"other": torch.ones(1)})
    assert draft_state.load(path, "recycle").keys() == {"other"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    draft_state.save(path, "recycle", TENSORS)
    before = path.read_bytes()

    def half_written(path: Path, *given: Any) -> None:
        path.write_bytes(before[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(draft_state, "write_safetensors", half_written)
    with pytest.raises(SpectoolError, match="the disk is full"):
        draft_state.save(path, "recycle", {"other": torch.ones(1)})
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: Not a directory$"):
        draft_state.save(tmp_path / "file" / "state", "recycle", TENSORS)
    with pytest.raises(SpectoolError, match=r"absent/state: No such file or directory$"):
        draft_state.save(tmp_path / "absent" / "state", "recycle", TENSORS)
