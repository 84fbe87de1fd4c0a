"""Artifacts are written atomically, old ones are kept until then, and a rerun continues."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spectool.checkpoint.artifact import (
    ArtifactWriter,
    check_target,
    listed_files,
    write_safetensors,
)
from spectool.checkpoint.headers import PACKED_INDEX, read_header
from spectool.errors import CheckpointError, InputError, SpectoolError, UsageError

from ..conftest import contents

IDENTITY = {"source": "s", "options": {"bits": 4}}
SHARD = "packed-1.safetensors"
TEMPLATE = "additional_chat_templates/tool.jinja"


def small(*others: str) -> dict[str, bytes]:
    """Make the small files of an artifact, whose index lists them and `others`."""
    files = ["config.json", PACKED_INDEX, *others]
    return {
        "config.json": b"{}",
        PACKED_INDEX: json.dumps({"metadata": {"files": files}}).encode(),
    }


def shard(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 5), value), "codes": torch.arange(7, dtype=torch.uint8)}


def complete(out: Path, value: float = 1.0, *, overwrite: bool = False) -> None:
    with ArtifactWriter(out, identity=IDENTITY, overwrite=overwrite) as writer:
        if writer.report(SHARD) is None:
            writer.write_shard(SHARD, shard(value), {}, {"value": value})
        writer.finish({**small(SHARD, TEMPLATE), TEMPLATE: b"x"})


def test_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 2).half(),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "view": torch.randn(4, 6).T,
    }
    write_safetensors(tmp_path / "x", tensors, {"b": 1, "a": [2]})
    with safe_open(tmp_path / "x", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt", "spectool": '{"a": [2], "b": 1}'}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    for entry in read_header(tmp_path / "x")[1]:
        assert entry.start % tensors[entry.name].element_size() == 0


def test_equal_inputs_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    first = write_safetensors(tmp_path / "a", shard(1.0), {"x": 1, "y": 2})
    second = write_safetensors(tmp_path / "b", dict(reversed(shard(1.0).items())), {"y": 2, "x": 1})
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_copied_tensors_keep_their_bytes_and_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectool.checkpoint.tensors.CHUNK", 64)
    tensors = {"w": torch.randn(13, 7).bfloat16(), "ids": torch.arange(40)}
    save_file(tensors, tmp_path / "source")
    entries = {entry.name: entry for entry in read_header(tmp_path / "source")[1]}
    write_safetensors(tmp_path / "copy", entries, {})
    with safe_open(tmp_path / "copy", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
    tensors["w"][12, 6] = float("nan")
    save_file(tensors, tmp_path / "source")
    entries = {entry.name: entry for entry in read_header(tmp_path / "source")[1]}
    with pytest.raises(CheckpointError, match="w: 1 of"):
        write_safetensors(tmp_path / "copy", entries, {})


def test_out_appears_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", identity=IDENTITY) as writer:
        writer.write_shard(SHARD, shard(1.0), {}, None)
        assert not (tmp_path / "out").exists()
        writer.finish({**small(SHARD, TEMPLATE), TEMPLATE: b"x"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {"config.json", PACKED_INDEX, SHARD, TEMPLATE}
    assert set(contents(tmp_path / "out")) == listed_files(tmp_path / "out") == names


def test_a_rerun_keeps_whole_shards_and_drops_the_rest(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with ArtifactWriter(out, identity=IDENTITY) as writer:
        for index in (1, 2):
            writer.write_shard(f"packed-{index}", shard(index), {}, {"index": index})
    (partial / "packed-2").write_bytes((partial / "packed-2").read_bytes()[:-1] + b"!")
    (partial / "packed-3.tmp").write_bytes(b"half of it")
    with ArtifactWriter(out, identity=IDENTITY) as writer:
        assert writer.report("packed-1") == {"index": 1}
        assert writer.report("packed-2") is None
        assert sorted(path.name for path in partial.iterdir()) == ["packed-1"]


def test_another_identity_does_not_resume_and_says_what_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, identity=IDENTITY) as writer:
        writer.write_shard("packed-1", shard(1.0), {}, None)
    other = {**IDENTITY, "options": {"bits": 3}}
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r'another options \({"bits": 4}, now {"bits": 3}\)'):
        ArtifactWriter(out, identity=other)
    assert contents(tmp_path) == before
    with ArtifactWriter(out, identity=other, overwrite=True) as writer:
        assert writer.report("packed-1") is None


def test_two_runs_on_one_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ArtifactWriter(out, identity=IDENTITY) as writer:
        writer.write_shard("packed-1", shard(1.0), {}, None)
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="another run is writing it"):
                ArtifactWriter(out, identity=IDENTITY, overwrite=overwrite)
        assert writer.report("packed-1") is None and (out.parent / "out.partial").exists()
        writer.finish(small("packed-1"))
    assert set(contents(out)) == {*small(), "packed-1"}


def test_existing_out_needs_overwrite_and_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    complete(out)
    before = contents(out)
    with pytest.raises(UsageError, match="exists already") as caught:
        complete(out, 2.0)
    assert caught.value.hint is not None and "--overwrite" in caught.value.hint
    with ArtifactWriter(out, identity=IDENTITY, overwrite=True) as writer:
        writer.write_shard("packed-1.safetensors", shard(2.0), {}, None)
        assert contents(out) == before
    assert contents(out) == before
    complete(out, 2.0, overwrite=True)
    assert contents(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FOREIGN = {
    "notes": "holds notes.txt",
    "hidden": "holds .cache",
    "folder": "holds mine",
    "inner": "holds additional_chat_templates/mine.jinja",
    "linked folder": "holds additional_chat_templates",
    "index without a list": "holds ",
    "damaged index": "holds ",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_overwrite_leaves_alone_an_artifact_with_something_else_in_it(
    tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    complete(out)
    if kind == "notes":
        (out / "notes.txt").write_text("mine")
    elif kind == "hidden":
        (out / ".cache").write_text("mine")
    elif kind == "folder":
        (out / "mine").mkdir()
    elif kind == "inner":
        (out / "additional_chat_templates" / "mine.jinja").write_text("mine")
    elif kind == "linked folder":
        (out / "additional_chat_templates").rename(tmp_path / "elsewhere")
        (out / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    else:
        (out / PACKED_INDEX).write_text("{" if kind == "damaged index" else "{}")
    before = contents(tmp_path)
    for target in (out, tmp_path / "other"):
        with pytest.raises(UsageError) as caught:
            complete(target, 2.0, overwrite=True)
        assert FOREIGN[kind] in str(caught.value) and "not written by spectool" in str(caught.value)
        assert "\n" not in str(caught.value) and "move it away" in str(caught.value.hint)
        if target == out:
            # The same where an older OUT would go to: found before anything is computed.
            out.rename(tmp_path / "other.replaced")
    assert contents(tmp_path) == {
        name.replace("out/", "other.replaced/"): data for name, data in before.items()
    }


def test_foreign_file_where_the_older_out_would_go(tmp_path: Path) -> None:
    complete(tmp_path / "out")
    (tmp_path / "out.replaced").write_text("mine")
    with pytest.raises(UsageError, match=r"out\.replaced: is a file, not written by spectool"):
        complete(tmp_path / "out", 2.0, overwrite=True)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "out.replaced").unlink()
    (tmp_path / "out.replaced").mkdir()
    complete(tmp_path / "new")
    complete(tmp_path / "out", 2.0, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_what_appears_in_out_during_a_run_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite, message in ((False, "exists already"), (True, r"holds notes\.txt")):
        with ArtifactWriter(out, identity=IDENTITY, overwrite=overwrite) as writer:
            if writer.report(SHARD) is None:
                writer.write_shard(SHARD, shard(1.0), {}, {"value": 1.0})
            if overwrite:
                (out / "notes.txt").write_text("mine")
            else:
                complete(tmp_path / "other")
                (tmp_path / "other").rename(out)
            with pytest.raises(UsageError, match=message):
                writer.finish(small(SHARD))
    (out / "notes.txt").unlink()
    with ArtifactWriter(out, identity=IDENTITY, overwrite=True) as writer:
        assert writer.report(SHARD) == {"value": 1.0}, "nothing that was done is lost"
        writer.finish(small(SHARD))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dense checkpoint"])
def test_overwrite_leaves_alone_what_is_not_ours(tmp_path: Path, kind: str) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        complete(target)
        out.symlink_to(target)
    else:
        out.mkdir()
        (out / ("model.safetensors" if kind == "dense checkpoint" else "mine")).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="not written by spectool"):
        complete(out, overwrite=True)
    assert contents(tmp_path) == before


def test_foreign_partial_directory_is_not_emptied(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.tex"):
        complete(tmp_path / "out")
    assert (partial / "thesis.tex").exists()


@pytest.mark.parametrize(
    "content",
    ['{"name": "x"}', "{", "[]", '{"identity": {}, "shards": {"a": {}}}',
     '{"identity": {}, "shards": {"../a": {"sha256": "0", "report": null}}}',
     '{"identity": [], "shards": {}}', '{"identity": {}, "shards": []}'],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_manifest(tmp_path: Path, content: str, overwrite: bool) -> None:
    manifest = tmp_path / "out.partial.json"
    manifest.write_text(content)
    with pytest.raises(UsageError, match="not the record of an unfinished") as caught:
        complete(tmp_path / "out", overwrite=overwrite)
    assert manifest.read_text() == content and "\n" not in str(caught.value)


def test_left_over_manifest_without_a_run_does_not_matter(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", identity={"another": 1}) as writer:
        writer.write_shard(SHARD, shard(1.0), {}, None)
    shutil.rmtree(tmp_path / "out.partial")
    complete(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise, as if the process died, right before the n-th rename or removal from now on."""
    count = iter(range(1, 100))

    def mortal(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            if next(count) == call:
                raise KeyboardInterrupt
            return original(*arguments)

        return step

    monkeypatch.setattr(Path, "rename", mortal(Path.rename))
    monkeypatch.setattr(Path, "unlink", mortal(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", mortal(shutil.rmtree))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", range(1, 9))
def test_a_death_before_any_rename_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, overwrite: bool
) -> None:
    complete(tmp_path / "expected", 2.0)
    out = tmp_path / "out"
    if overwrite:
        complete(out, 1.0)
        old = contents(out)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(call, patch)
        with contextlib.suppress(KeyboardInterrupt):
            complete(out, 2.0, overwrite=overwrite)
    whole = out.exists() and contents(out) == contents(tmp_path / "expected")
    if overwrite and not whole:
        # The old one is whole, at its path or next to it for the moment between two renames.
        assert contents(out if out.exists() else tmp_path / "out.replaced") == old
    if whole:
        assert call > 4 and not (tmp_path / "out.partial").exists()
        complete(out, 2.0, overwrite=True)
    else:
        # Three renames record a shard; from then on it is never written again.
        if call > 4:
            monkeypatch.setattr(ArtifactWriter, "write_shard", None)
        complete(out, 2.0, overwrite=overwrite)
    assert contents(out) == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_left_over_of_a_finished_replacement_does_not_stop_the_next(tmp_path: Path) -> None:
    complete(tmp_path / "out")
    complete(tmp_path / "out.replaced")
    complete(tmp_path / "out", 2.0, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def three_shards(out: Path) -> None:
    with ArtifactWriter(out, identity={}) as writer:
        for index in range(3):
            if writer.report(f"packed-{index}") is None:
                tensors = {"w": torch.ones(1000 * 4**index)}
                writer.write_shard(f"packed-{index}", tensors, {}, index)
        writer.finish({})


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that every user may read, unlike those that pytest makes."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Forbid changes below `folder`; for root, whom no permission stops, become another user."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    closed = [folder, *folder.rglob("*")]
    for path in closed:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in closed:
            path.chmod(0o755)


@pytest.mark.parametrize("target", ["out", "a/b/out"])
def test_read_only_target(open_folder: Path, target: str) -> None:
    with (
        without_rights(open_folder),
        pytest.raises(InputError, match="cannot be written") as caught,
    ):
        three_shards(open_folder / target)
    assert caught.value.exit_code == 2
    assert not any(open_folder.iterdir())


def test_unfinished_run_of_another_user(open_folder: Path) -> None:
    with ArtifactWriter(open_folder / "out", identity={}) as writer:
        writer.write_shard("packed-0", {"w": torch.ones(1000)}, {}, 0)
    before = contents(open_folder)
    with without_rights(open_folder), pytest.raises(InputError, match="cannot be written"):
        three_shards(open_folder / "out")
    assert contents(open_folder) == before


@pytest.mark.parametrize("length", [240, 250, 300, 5000])
def test_name_that_no_disk_takes(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="cannot be written: File name too long") as caught:
        complete(tmp_path / ("x" * length))
    assert caught.value.exit_code == 2


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder where nothing can be made"
)
def test_place_that_cannot_be_made() -> None:
    with pytest.raises(InputError) as caught:
        complete(Path("/proc/x/out"))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Limit the size of files; the kernel then refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line_and_resumable(tmp_path: Path) -> None:
    with room_for(20_000), pytest.raises(SpectoolError, match="the disk is full") as caught:
        three_shards(tmp_path / "out")
    assert caught.value.exit_code == 1 and "same command again" in str(caught.value.hint)
    whole = json.loads((tmp_path / "out.partial.json").read_text())["shards"]
    assert sorted(whole) == ["packed-0", "packed-1"]
    kept = (tmp_path / "out.partial" / "packed-1").stat().st_mtime_ns
    three_shards(tmp_path / "out")
    assert (tmp_path / "out" / "packed-1").stat().st_mtime_ns == kept
    three_shards(tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_disk_full_from_the_first_byte(tmp_path: Path) -> None:
    with room_for(0), pytest.raises(SpectoolError, match="the disk is full"):
        three_shards(tmp_path / "out")
    three_shards(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        complete(tmp_path / "file" / "out")


def test_check_target_takes_an_absent_or_an_empty_place(tmp_path: Path) -> None:
    check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=True)
    with pytest.raises(UsageError):
        check_target(tmp_path / "empty", overwrite=False)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error")])
def test_other_disk_errors_keep_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    with ArtifactWriter(tmp_path / "out", identity=IDENTITY) as writer:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(SpectoolError, match="Input/output error"):
            writer.write_shard("packed-1", shard(1.0), {}, None)
