"""Writing an artifact so that nothing half-written is ever taken for whole, and nothing is lost.

Everything goes to `OUT.partial/` beside OUT, one shard at a time: temporary name, sync, rename,
then a line in the manifest `OUT.partial.json` with the shard's checksums. A killed run finds the
manifest, checks it against what it is asked to do, and goes on after the last whole shard. OUT
appears by one rename at the end; an older OUT gives way only then, and only if it holds nothing but
what spectool wrote: every artifact lists its own files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint import checksums
from spectool.checkpoint.checksums import Checksums, Summing
from spectool.checkpoint.headers import HEADS, PACKED_INDEX, TensorEntry, read_json
from spectool.checkpoint.tensors import CHUNK, DTYPES, check_finite, torch_dtype
from spectool.errors import CheckpointError, InputError, UsageError
from spectool.files import disk_errors

NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A tensor to write, or the stored bytes of one to copy as they are.
Content = Tensor | TensorEntry


class ArtifactWriter:
    """Collects the shards of one artifact in `OUT.partial/` and turns it into OUT.

    `identity` is everything that decides the bytes: a rerun with another one does not resume.

    Raises:
        UsageError: OUT exists, is no artifact, or another run is writing it; or a partial run of
            something else lies there.
        InputError: the place cannot be written.
    """

    def __init__(self, out: Path, *, identity: dict[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self.overwrite = overwrite
        self.partial = out.with_name(out.name + ".partial")
        # Beside what it describes, so that it outlives the rename that makes OUT.
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
                self._settle()
                check_target(out, overwrite=overwrite)
                self.manifest = self._resume(identity)
                self._save_manifest()
        except BlockingIOError as error:
            self.close()
            raise UsageError(f"{out}: another run is writing it ({self.partial})") from error
        except BaseException:
            self.close()
            raise

    def _settle(self) -> None:
        """Finish what a run that was killed between its last renames left of an older OUT."""
        if self.replaced.exists():
            if self.out.exists() or not any(self.replaced.iterdir()):
                shutil.rmtree(self.replaced)
            else:
                self.replaced.rename(self.out)

    def _resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        fresh: dict[str, Any] = {"identity": identity, "shards": {}}
        present = sorted(path.name for path in self.partial.iterdir())
        found = self._read_manifest()
        if found is None and present:
            raise UsageError(
                f"{self.partial}: holds {present[0]}, which no spectool run left there",
                hint="move that directory away, or choose another OUT",
            )
        if found is None or not present:
            return fresh
        changed = [
            key
            for key in sorted({*identity, *found["identity"]})
            if identity.get(key) != found["identity"].get(key)
        ]
        if changed and not self.overwrite:
            before, now = (
                json.dumps(side.get(changed[0])) for side in (found["identity"], identity)
            )
            raise UsageError(
                f"{self.partial}: holds an unfinished run with another {', '.join(changed)} "
                f"({before}, now {now})",
                hint="finish it with the same input, or start anew with --overwrite",
            )
        if changed:
            found = fresh
        whole = {}
        for name, said in found["shards"].items():
            if (self.partial / name).is_file():
                sums = checksums.of_file(self.partial / name)
                if sums.sha256 == said["sha256"]:
                    whole[name] = {**sums.as_dict(), "report": said["report"]}
        for path in self.partial.iterdir():
            if path.name not in whole:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {"identity": identity, "shards": whole}

    def _read_manifest(self) -> dict[str, Any] | None:
        """What the last run recorded; None if there was none."""
        if not self.manifest_path.exists():
            return None
        try:
            found = read_json(self.manifest_path)
            shards = found["shards"]
            if isinstance(found["identity"], dict) and all(
                Path(name).name == name and isinstance(said["sha256"], str) and "report" in said
                for name, said in shards.items()
            ):
                return found
        except (CheckpointError, KeyError, TypeError, AttributeError):
            pass
        raise UsageError(
            f"{self.manifest_path}: is not the record of an unfinished spectool run",
            hint="move that file away, or choose another OUT",
        )

    def report(self, shard: str) -> Any | None:
        """What was recorded with a finished shard; None if it is not finished."""
        said = self.manifest["shards"].get(shard)
        return said["report"] if said else None

    def path(self, shard: str) -> Path:
        return self.partial / shard

    def write_shard(
        self, shard: str, tensors: Mapping[str, Content], metadata: dict[str, Any], report: Any
    ) -> None:
        """Write one safetensors file and record it as finished.

        Raises:
            CheckpointError: a copied tensor holds NaN or infinite values.
            SpectoolError: the disk is full.
        """
        self.adopt(shard, write_whole(self.partial / shard, tensors, metadata), report)

    def adopt(self, shard: str, sums: Checksums, report: Any) -> None:
        """Record a shard as finished that `write_whole` wrote into `partial`, in any process."""
        with disk_errors(self.partial):
            self.manifest["shards"][shard] = {**sums.as_dict(), "report": report}
            self._save_manifest()

    def checksums(self) -> dict[str, dict[str, str]]:
        """Those of all finished shards by name, as an artifact stores them."""
        return {
            shard: {"sha256": said["sha256"], "xxh3_64": said["xxh3_64"]}
            for shard, said in self.manifest["shards"].items()
        }

    def record(self, shard: str, report: Any) -> None:
        """Replace what was recorded with a finished shard."""
        with disk_errors(self.partial):
            self.manifest["shards"][shard]["report"] = report
            self._save_manifest()

    def discard(self, shard: str) -> None:
        """Forget a shard that only this run needed."""
        with disk_errors(self.partial):
            if self.manifest["shards"].pop(shard, None) is not None:
                self._save_manifest()
            (self.partial / shard).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave nothing: what was asked for cannot be made of this input."""
        with disk_errors(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.manifest_path.unlink(missing_ok=True)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add the small files, and let the whole become OUT.

        One of them, the index or the heads' record, lists them all and the shards; see `own_files`.

        Raises:
            UsageError: meanwhile OUT was made by someone else, or somebody put files into it.
        """
        with disk_errors(self.partial):
            for name, data in files.items():
                (self.partial / name).parent.mkdir(exist_ok=True)
                _write_synced(self.partial / name, data)
            os.fsync(self._lock)
            check_target(self.out, overwrite=self.overwrite)
            gives_way = self.out.exists()
            if gives_way:
                self.out.rename(self.replaced)
            self.partial.rename(self.out)
            self.manifest_path.unlink()
            if gives_way:
                shutil.rmtree(self.replaced)
        self.close()

    def close(self) -> None:
        """Release the lock; what was written stays for the next run."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and not self.manifest["shards"]:
            # Nothing to go on from.
            self.abandon()
        self.close()

    def _save_manifest(self) -> None:
        data = json.dumps(self.manifest, sort_keys=True).encode()
        temporary = self.manifest_path.with_name(self.manifest_path.name + ".tmp")
        _write_synced(temporary, data)
        temporary.rename(self.manifest_path)


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises: UsageError: OUT exists and may not, or must not, be replaced.

    InputError: its place is read-only. Asked before a long run begins, and again when it writes.
    """
    with disk_errors(out):
        replaced = out.with_name(out.name + ".replaced")
        stray = _stray(replaced) if replaced.exists() or replaced.is_symlink() else None
        if stray is not None:
            raise UsageError(
                f"{replaced}: {stray}, not written by spectool; an older OUT is moved there",
                hint="move it away, or choose another OUT",
            )
        if not (out.exists() or out.is_symlink()):
            place = next(parent for parent in out.absolute().parents if parent.exists())
            if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
                raise InputError(f"{out}: cannot be written: {place} takes no new files")
            return
        if not overwrite:
            raise UsageError(
                f"{out}: exists already", hint="--overwrite replaces it once the new one is whole"
            )
        stray = _stray(out)
        if stray is not None:
            raise UsageError(
                f"{out}: {stray}, not written by spectool, so --overwrite leaves it alone",
                hint="move it away, or choose another OUT",
            )


def own_files(path: Path) -> set[str]:
    """Names of all files of the artifact in this directory, as it lists them; empty if it is none.

    A packed checkpoint lists them in its index's metadata, heads at the top of their record.
    """
    found: set[str] = set()
    for name in (PACKED_INDEX, HEADS):
        try:
            said = read_json(path / name)
        except CheckpointError:
            continue
        metadata = said.get("metadata") if name == PACKED_INDEX else said
        files = metadata.get("files") if isinstance(metadata, dict) else None
        if isinstance(files, list):
            found.update(file for file in files if isinstance(file, str))
    return found


def _stray(path: Path) -> str | None:
    """What there is besides an artifact, as the end of a sentence about `path`; None if nothing."""
    if path.is_symlink() or not path.is_dir():
        return "is a link" if path.is_symlink() else "is a file"
    own = own_files(path)
    folders = {str(parent) for file in own for parent in Path(file).parents}
    for root, names, files in os.walk(path):
        for name, known in [(n, folders) for n in sorted(names)] + [
            (f, own) for f in sorted(files)
        ]:
            entry = Path(root, name)
            relative = str(entry.relative_to(path))
            if relative not in known or (known is folders and entry.is_symlink()):
                return f"holds {relative}"
    return None


def write_whole(path: Path, tensors: Mapping[str, Content], metadata: dict[str, Any]) -> Checksums:
    """`write_safetensors` under a temporary name: the file is there whole or not at all.

    Raises:
        SpectoolError: the disk is full.
    """
    with disk_errors(path.parent):
        temporary = path.with_name(path.name + ".tmp")
        sums = write_safetensors(temporary, tensors, metadata)
        temporary.rename(path)
    return sums


def write_safetensors(
    path: Path, tensors: Mapping[str, Content], metadata: dict[str, Any]
) -> Checksums:
    """Write a safetensors file, synced; returns the checksums of its bytes.

    Written here rather than by the library for two reasons: the library orders metadata keys at
    random (0.8.0), and equal inputs must give equal bytes; and tensors that are only copied can be
    streamed through a small buffer. Tensors lie in order of element size, so all are aligned.

    Raises:
        CheckpointError: a copied floating-point tensor holds NaN or infinite values.
    """
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "spectool": json.dumps(metadata, sort_keys=True)}
    }
    offset = 0
    for name in order:
        content = tensors[name]
        end = offset + _num_bytes(content)
        header[name] = {
            "dtype": NAMES[_dtype(content)],
            "shape": list(content.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    summing = Summing()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(raw)), raw):
            summing.update(piece)
            file.write(piece)
        for name in order:
            for data in _pieces(tensors[name]):
                summing.update(data)
                file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return summing.finish()


def _dtype(content: Content) -> torch.dtype:
    return content.dtype if isinstance(content, Tensor) else torch_dtype(content)


def _num_bytes(content: Content) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    return content.num_bytes


def _pieces(content: Content) -> Iterator[memoryview]:
    if isinstance(content, Tensor):
        flat = content.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
        return
    dtype = torch_dtype(content)
    buffer = torch.empty(min(CHUNK, content.num_bytes), dtype=torch.uint8)
    with content.open() as file:
        left = content.num_bytes
        while left:
            part = buffer[: min(left, CHUNK)]
            if file.readinto(part.numpy().data) != len(part):
                raise CheckpointError(f"{content.path}: ended inside {content.name}")
            check_finite(content.name, part.view(dtype))
            yield part.numpy().data
            left -= len(part)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
