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
    place = tmp_path / "state"
    draft_state.save(place, "recycle", TENSORS)
    loaded = draft_state.load(place, "recycle")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    before = place.read_bytes()
    draft_state.save(place, "recycle", loaded)
    assert place.read_bytes() == before


def test_a_state_of_another_drafter_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "state"
    draft_state.save(place, "trigram", TENSORS)
    with pytest.raises(CheckpointError, match="the state of trigram, not of recycle"):
        draft_state.load(place, "recycle")


@pytest.mark.parametrize(
    "said",
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
def test_another_format_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    place = tmp_path / "state"
    write_safetensors(place, TENSORS, said)
    with pytest.raises(CheckpointError, match="no state of a drafter in version 1"):
        draft_state.load(place, "recycle")


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
    place = tmp_path / "state"
    place.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(place)):
        draft_state.load(place, "recycle")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        draft_state.load(tmp_path, "recycle")


def test_a_newer_state_takes_the_place_of_an_older(tmp_path: Path) -> None:
    place = tmp_path / "state"
    draft_state.save(place, "recycle", TENSORS)
    draft_state.save(place, "recycle", {"other": torch.ones(1)})
    assert draft_state.load(place, "recycle").keys() == {"other"}
    assert list(tmp_path.iterdir()) == [place]


def test_a_disk_that_fills_up_leaves_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "state"
    draft_state.save(place, "recycle", TENSORS)
    before = place.read_bytes()

    def half_written(path: Path, *given: Any) -> None:
        path.write_bytes(before[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(draft_state, "write_safetensors", half_written)
    with pytest.raises(SpectoolError, match="the disk is full"):
        draft_state.save(place, "recycle", {"other": torch.ones(1)})
    assert place.read_bytes() == before


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: Not a directory$"):
        draft_state.save(tmp_path / "file" / "state", "recycle", TENSORS)
    with pytest.raises(SpectoolError, match=r"absent/state: No such file or directory$"):
        draft_state.save(tmp_path / "absent" / "state", "recycle", TENSORS)
