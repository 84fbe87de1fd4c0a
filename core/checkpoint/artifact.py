"""Resumable, atomic writing of artifacts.

Shards go to `OUT.partial/` next to OUT, one at a time: temporary name, sync, rename, then an entry
with the shard's checksums in the manifest `OUT.partial.json`. A rerun compares the manifest with
its own input and continues after the last complete shard. OUT appears by one rename at the end. An
older OUT is replaced only then, and only if it holds no files but those its artifact lists.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint import checksums
from spectool.checkpoint.checksums import Checksums, Hasher
from spectool.checkpoint.headers import HEADS, PACKED_INDEX, TRAINING, TensorEntry, read_json
from spectool.checkpoint.tensors import DTYPES, check_finite, read_pieces, torch_dtype
from spectool.errors import CheckpointError, InputError, UsageError
from spectool.files import disk_errors, json_bytes, replacing

NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A tensor to write, or the entry of a stored one whose bytes are copied.
Content = Tensor | TensorEntry


class ArtifactWriter:
    """Writer of one artifact: collects shards in `OUT.partial/`, then renames it to OUT.

    `identity` is everything that determines the bytes; a run with another identity does not resume.

    Raises:
        UsageError: OUT exists and may not be replaced, another run is writing it, or `OUT.partial`
            holds an unfinished run with another identity.
        InputError: the path cannot be written.
    """

    def __init__(self, out: Path, *, identity: dict[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self.overwrite = overwrite
        self.partial = out.with_name(out.name + ".partial")
        # Not inside `partial`: it must outlive the rename to OUT.
        self.manifest_path = out.with_name(out.name + ".partial.json")
        self.replaced = out.with_name(out.name + ".replaced")
        check_target(out, overwrite=overwrite)
        with disk_errors(self.partial):
            try:
                self.partial.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:
                raise InputError(f"{self.partial}: cannot be made: {error.strerror}") from error
            self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            with disk_errors(self.partial):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._finish_replacing()
                check_target(out, overwrite=overwrite)
                self.manifest = self._resume(identity)
                self._save_manifest()
        except BlockingIOError as error:
            self.close()
            raise UsageError(f"{out}: another run is writing it ({self.partial})") from error
        except BaseException:
            self.close()
            raise

    def _finish_replacing(self) -> None:
        """Remove or restore the older OUT of a run that was killed between its last renames."""
        if self.replaced.exists():
            if self.out.exists() or not any(self.replaced.iterdir()):
                shutil.rmtree(self.replaced)
            else:
                self.replaced.rename(self.out)

    def _resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return the manifest to continue with; removes what is not a complete shard."""
        fresh: dict[str, Any] = {"identity": identity, "shards": {}}
        present = sorted(path.name for path in self.partial.iterdir())
        manifest = self._read_manifest()
        if manifest is None and present:
            raise UsageError(
                f"{self.partial}: holds {present[0]}, which no spectool run left there",
                hint="move that directory away, or choose another OUT",
            )
        if manifest is None or not present:
            return fresh
        changed = [
            key
            for key in sorted({*identity, *manifest["identity"]})
            if identity.get(key) != manifest["identity"].get(key)
        ]
        if changed and not self.overwrite:
            before, now = (
                json.dumps(side.get(changed[0])) for side in (manifest["identity"], identity)
            )
            raise UsageError(
                f"{self.partial}: holds an unfinished run with another {', '.join(changed)} "
                f"({before}, now {now})",
                hint="finish it with the same input, or start anew with --overwrite",
            )
        if changed:
            manifest = fresh
        complete = {}
        for name, record in manifest["shards"].items():
            if (self.partial / name).is_file():
                sums = checksums.of_file(self.partial / name)
                if sums.sha256 == record["sha256"]:
                    complete[name] = {**asdict(sums), "report": record["report"]}
        for path in self.partial.iterdir():
            if path.name not in complete:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {"identity": identity, "shards": complete}

    def _read_manifest(self) -> dict[str, Any] | None:
        """Read the last run's manifest; None without one."""
        if not self.manifest_path.exists():
            return None
        try:
            manifest = read_json(self.manifest_path)
            shards = manifest["shards"]
            if isinstance(manifest["identity"], dict) and all(
                Path(name).name == name and isinstance(record["sha256"], str) and "report" in record
                for name, record in shards.items()
            ):
                return manifest
        except (CheckpointError, KeyError, TypeError, AttributeError):
            pass
        raise UsageError(
            f"{self.manifest_path}: is not the record of an unfinished spectool run",
            hint="move that file away, or choose another OUT",
        )

    def report(self, shard: str) -> Any:
        """Return the report recorded with a finished shard; None if the shard is not finished."""
        record = self.manifest["shards"].get(shard)
        return record["report"] if record else None

    def path(self, shard: str) -> Path:
        """Return the shard's path in `partial`."""
        return self.partial / shard

    def write_shard(
        self, shard: str, tensors: Mapping[str, Content], metadata: dict[str, Any], report: Any
    ) -> None:
        """Write one safetensors file and record it as finished.

        Raises:
            CheckpointError: a copied tensor holds NaN or infinite values.
            SpectoolError: the disk is full.
        """
        self.add_shard(shard, write_atomically(self.partial / shard, tensors, metadata), report)

    def add_shard(self, shard: str, sums: Checksums, report: Any) -> None:
        """Record as finished a shard that `write_atomically` wrote into `partial`."""
        with disk_errors(self.partial):
            self.manifest["shards"][shard] = {**asdict(sums), "report": report}
            self._save_manifest()

    def checksums(self) -> dict[str, dict[str, str]]:
        """Return the checksums of all finished shards by name, as an artifact stores them."""
        return {
            shard: {"sha256": record["sha256"], "xxh3_64": record["xxh3_64"]}
            for shard, record in self.manifest["shards"].items()
        }

    def set_report(self, shard: str, report: Any) -> None:
        """Replace the report recorded with a finished shard."""
        with disk_errors(self.partial):
            self.manifest["shards"][shard]["report"] = report
            self._save_manifest()

    def remove_shard(self, shard: str) -> None:
        """Remove a shard that only the run itself needed."""
        with disk_errors(self.partial):
            if self.manifest["shards"].pop(shard, None) is not None:
                self._save_manifest()
            (self.partial / shard).unlink(missing_ok=True)

    def keep_only(self, shards: Iterable[str]) -> None:
        """Remove all shards but these."""
        for shard in sorted(self.manifest["shards"].keys() - set(shards)):
            self.remove_shard(shard)

    def delete(self) -> None:
        """Remove the partial directory and the manifest."""
        with disk_errors(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.manifest_path.unlink(missing_ok=True)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add the small files and rename the partial directory to OUT.

        One of `files`, the index or a record, must list all files; see `listed_files`.

        Raises:
            UsageError: meanwhile another process made OUT, or added files to the older one.
        """
        with disk_errors(self.partial):
            for name, data in files.items():
                (self.partial / name).parent.mkdir(exist_ok=True)
                _write_synced(self.partial / name, data)
            os.fsync(self._lock)
            check_target(self.out, overwrite=self.overwrite)
            replaces = self.out.exists()
            if replaces:
                self.out.rename(self.replaced)
            self.partial.rename(self.out)
            self.manifest_path.unlink()
            if replaces:
                shutil.rmtree(self.replaced)
        self.close()

    def close(self) -> None:
        """Release the lock; the partial directory stays for the next run."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and not self.manifest["shards"]:
            # No shard that a rerun could continue after.
            self.delete()
        self.close()

    def _save_manifest(self) -> None:
        data = json.dumps(self.manifest, sort_keys=True).encode()
        temporary = self.manifest_path.with_name(self.manifest_path.name + ".tmp")
        _write_synced(temporary, data)
        temporary.rename(self.manifest_path)


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise an InputError if OUT cannot be written; called before a long run and when it writes.

    With `overwrite` OUT may exist, with no files but those that its artifact lists.
    """
    with disk_errors(out):
        replaced = out.with_name(out.name + ".replaced")
        stray = _find_stray(replaced) if replaced.exists() or replaced.is_symlink() else None
        if stray is not None:
            raise UsageError(
                f"{replaced}: {stray}, not written by spectool; an older OUT is moved there",
                hint="move it away, or choose another OUT",
            )
        if not (out.exists() or out.is_symlink()):
            folder = next(parent for parent in out.absolute().parents if parent.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
                raise InputError(f"{out}: cannot be written: {folder} takes no new files")
            return
        if not overwrite:
            raise UsageError(
                f"{out}: exists already", hint="--overwrite replaces it once the new one is whole"
            )
        stray = _find_stray(out)
        if stray is not None:
            raise UsageError(
                f"{out}: {stray}, not written by spectool, so --overwrite leaves it alone",
                hint="move it away, or choose another OUT",
            )


def free_for(out: Path) -> int:
    """Return the bytes free on the disk of OUT for a run, its own unfinished files included."""
    path = out.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    unfinished = out.with_name(out.name + ".partial").glob("*")
    return shutil.disk_usage(existing).free + sum(file.stat().st_size for file in unfinished)


def check_paths(source: Path, out: Path) -> None:
    """Raise a UsageError if one directory contains the other, or they are the same."""
    source_path, out_path = source.resolve(), out.resolve()
    if source_path.is_relative_to(out_path) or out_path.is_relative_to(source_path):
        raise UsageError(f"{out}: OUT must lie outside the source {source}, and not around it")


def listed_files(path: Path) -> set[str]:
    """List the files that the artifact in this directory names as its own; empty without one.

    A packed checkpoint names them in its index's metadata, draft heads and trained checkpoints at
    the top of their record.
    """
    listed: set[str] = set()
    for name in (PACKED_INDEX, HEADS, TRAINING):
        try:
            record = read_json(path / name)
        except CheckpointError:
            continue
        metadata = record.get("metadata") if name == PACKED_INDEX else record
        files = metadata.get("files") if isinstance(metadata, dict) else None
        if isinstance(files, list):
            listed.update(file for file in files if isinstance(file, str))
    return listed


def find_listing(path: Path) -> Path:
    """Find the file in which the checkpoint in this directory lists its files.

    Raises:
        UsageError: no checkpoint that spectool wrote is there.
    """
    for name in (PACKED_INDEX, TRAINING):
        if (path / name).is_file() and listed_files(path):
            return path / name
    raise UsageError(
        f"{path}: no checkpoint that spectool wrote, so no files can be attached to it",
        hint="leave out --attach",
    )


def attach_file(path: Path, name: str, data: bytes) -> None:
    """Add a small file to the checkpoint in this directory, or replace it.

    It is listed first, so that a killed run leaves no file that nobody listed. Fingerprints and
    checksums do not cover it.

    Raises:
        UsageError: no checkpoint that spectool wrote is there.
        InputError: the directory cannot be written.
    """
    listing = find_listing(path)
    record = read_json(listing)
    holder = record["metadata"] if listing.name == PACKED_INDEX else record
    holder["files"] = sorted({*holder.get("files", ()), name})
    for file, content in ((listing, json_bytes(record)), (path / name, data)):
        with replacing(file) as temporary:
            _write_synced(temporary, content)


def _find_stray(path: Path) -> str | None:
    """Find something that no artifact wrote; returns the predicate of a sentence about `path`."""
    if path.is_symlink() or not path.is_dir():
        return "is a link" if path.is_symlink() else "is a file"
    listed = listed_files(path)
    folders = {str(parent) for file in listed for parent in Path(file).parents}
    for root, names, files in os.walk(path):
        for name, known in [(n, folders) for n in sorted(names)] + [
            (f, listed) for f in sorted(files)
        ]:
            entry = Path(root, name)
            relative = str(entry.relative_to(path))
            if relative not in known or (known is folders and entry.is_symlink()):
                return f"holds {relative}"
    return None


def write_atomically(
    path: Path, tensors: Mapping[str, Content], metadata: dict[str, Any]
) -> Checksums:
    """Write a safetensors file atomically, as `write_safetensors` under a temporary name."""
    with disk_errors(path.parent):
        temporary = path.with_name(path.name + ".tmp")
        sums = write_safetensors(temporary, tensors, metadata)
        temporary.rename(path)
    return sums


def write_safetensors(
    path: Path, tensors: Mapping[str, Content], metadata: dict[str, Any]
) -> Checksums:
    """Write a safetensors file and sync it; returns the checksums of its bytes.

    Raises:
        CheckpointError: a copied floating-point tensor holds NaN or infinite values.
    """
    # Not the library's writer: it orders metadata keys at random (0.8.0), but equal inputs must
    # give equal bytes; and it cannot stream copied tensors through a small buffer.
    # Tensors lie in order of falling element size, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "spectool": json.dumps(metadata, sort_keys=True)}
    }
    offset = 0
    for name in order:
        content = tensors[name]
        end = offset + num_bytes(content)
        header[name] = {
            "dtype": NAMES[_dtype(content)],
            "shape": list(content.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    hasher = Hasher()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(raw)), raw):
            hasher.update(piece)
            file.write(piece)
        for name in order:
            for data in _read_pieces(tensors[name]):
                hasher.update(data)
                file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hasher.finish()


def _dtype(content: Content) -> torch.dtype:
    return content.dtype if isinstance(content, Tensor) else torch_dtype(content)


def num_bytes(content: Content) -> int:
    """Return the bytes of a tensor, in memory or in a file."""
    return content.nbytes if isinstance(content, Tensor) else content.num_bytes


def _read_pieces(content: Content) -> Iterator[memoryview]:
    """Yield a tensor's bytes, a stored one's in pieces of `CHUNK`."""
    if isinstance(content, Tensor):
        flat = content.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
        return
    for piece in read_pieces(content):
        check_finite(content.name, piece.view(torch_dtype(content)))
        yield piece.numpy().data


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
