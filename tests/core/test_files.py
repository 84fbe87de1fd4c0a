"""A file is replaced whole or not at all, and what the disk refuses is one line."""

import errno
import os
from pathlib import Path

import pytest

from spectool.errors import InputError, SpectoolError
from spectool.files import cache_folder, disk_errors, replacing, state_folder


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".json", "some writers tell the format by it"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_absent_folder_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "a"
    with pytest.raises(SpectoolError, match="No such file"), replacing(path) as temporary:
        temporary.write_text("x")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, SpectoolError, "the disk is full"),
        (errno.EDQUOT, SpectoolError, "the disk is full"),
        (errno.EROFS, InputError, "cannot be written"),
        (errno.EIO, SpectoolError, "Input/output error"),
    ],
)
def test_what_the_disk_refuses(number: int, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught, disk_errors(Path("x")):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind and str(caught.value).startswith("x: ")


def test_the_users_folders_follow_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "c/spectool"
    assert state_folder() == tmp_path / ".local/state/spectool"
