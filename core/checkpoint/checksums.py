"""Checksums of an artifact's files: computed at writing, compared before the first read.

Every shard has two: SHA-256, which `inspect --checksums` compares, and XXH3 of 64 bits, fast enough
to compare at every load. Knows neither tensors nor torch. Imports that `--help` does not need are
made on use.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool import processors
from spectool.errors import CheckpointError
from spectool.files import read_errors

# Bytes mapped at once: each window is hashed in one call without the interpreter's lock, and no
# more of a file is resident. Copying into a buffer first takes 1.5 times as long.
WINDOW = 1 << 26
# Bytes read at once for both checksums; SHA-256 is slower than the read.
CHUNK = 1 << 20
# One thread compares about 10 GB of cached pages per second; a few saturate the memory bandwidth.
MAX_THREADS = 4

# Predicate of a sentence about an artifact without checksums.
NO_CHECKSUMS = "has no checksums to compare its files with: an older spectool wrote it"


@dataclass(frozen=True, slots=True)
class Checksums:
    """The two checksums of one file, in hexadecimal digits."""

    sha256: str
    xxh3_64: str


class Hasher:
    """Incremental computation of both checksums."""

    def __init__(self) -> None:
        import hashlib

        import xxhash

        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._sha256.update(data)
        self._xxh3.update(data)

    def finish(self) -> Checksums:
        """Return the checksums of all bytes added."""
        return Checksums(self._sha256.hexdigest(), self._xxh3.hexdigest())


class Guard:
    """A file and its expected XXH3, compared once, before tensors are read from it."""

    def __init__(self, path: Path, expected: str) -> None:
        self.path = path
        self.expected = expected
        self._lock = threading.Lock()
        self._matches = False

    def check(self) -> None:
        """Raise a CheckpointError if the file is not the one that was written; compared once."""
        with self._lock:
            if not self._matches:
                found = _compute_xxh3(self.path)
                if found != self.expected:
                    raise _mismatch(self.path, "XXH3", found, self.expected)
                self._matches = True


def make_guard(path: Path, stored: Mapping[str, Checksums]) -> Guard | None:
    """Return the guard of a file with its checksum in `stored`; None if `stored` is empty.

    Raises:
        CheckpointError: other files have a checksum and this one has none.
    """
    if not stored:
        return None
    if path.name not in stored:
        raise CheckpointError(f"{path}: has no checksum, but {min(stored)} next to it has one")
    return Guard(path, stored[path.name].xxh3_64)


class BackgroundCheck:
    """Comparison of several files in background threads.

    Only `finish` waits for the threads: a load that fails or is interrupted ends at once.
    """

    def __init__(self, guards: Iterable[Guard]) -> None:
        self._waiting = deque(guards)
        self._errors: list[Exception] = []
        num_threads = min(MAX_THREADS, processors.allowed().threads, len(self._waiting))
        self._threads = [
            threading.Thread(target=self._check_waiting, name="checksums", daemon=True)
            for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _check_waiting(self) -> None:
        """Check one waiting file after another until none is left or one fails."""
        while not self._errors:
            try:
                guard = self._waiting.popleft()
            except IndexError:
                return
            try:
                guard.check()
            except Exception as error:
                # Any error: a file that was not compared must not be accepted.
                self._errors.append(error)

    def finish(self) -> None:
        """Wait for the end of the comparison; raises as `Guard.check`."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def of_file(path: Path) -> Checksums:
    """Compute both checksums of a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    hasher, buffer = Hasher(), memoryview(bytearray(CHUNK))
    with read_errors(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hasher.update(buffer[:size])
    return hasher.finish()


def verify(folder: Path, stored: Mapping[str, Checksums]) -> None:
    """Raise a CheckpointError unless all files in `folder` have the checksums in `stored`."""
    if not stored:
        raise CheckpointError(
            f"{folder}: no checksums to compare with",
            hint="`quantize`, `distill` and `train-heads` write them since spectool 0.2",
        )
    unlisted = sorted({path.name for path in folder.glob("*.safetensors")} - stored.keys())
    if unlisted:
        raise CheckpointError(f"{folder / unlisted[0]}: has no checksum: it is no part of {folder}")
    for name, expected in sorted(stored.items()):
        found = of_file(folder / name)
        if found.sha256 != expected.sha256:
            raise _mismatch(folder / name, "SHA-256", found.sha256, expected.sha256)
        if found.xxh3_64 != expected.xxh3_64:
            raise _mismatch(folder / name, "XXH3", found.xxh3_64, expected.xxh3_64)


def parse(raw: Any, path: Path) -> dict[str, Checksums]:
    """Parse checksums by file name from the index or record in `path`; None gives no checksums.

    Raises:
        CheckpointError: they are invalid.
    """
    if raw is None:
        return {}
    try:
        parsed = {name: Checksums(**entry) for name, entry in raw.items()}
        if all(
            Path(name).name == name
            and isinstance(sums.sha256, str)
            and isinstance(sums.xxh3_64, str)
            for name, sums in parsed.items()
        ):
            return parsed
    except (TypeError, AttributeError):
        pass
    raise CheckpointError(f"{path}: its checksums cannot be read: expected two for each file")


def _compute_xxh3(path: Path) -> str:
    """Compute the XXH3 of a file, in hexadecimal digits."""
    import xxhash

    digest = xxhash.xxh3_64()
    with read_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as part:
                if hasattr(mmap, "MADV_SEQUENTIAL"):
                    part.madvise(mmap.MADV_SEQUENTIAL)
                digest.update(part)
    return digest.hexdigest()


def _mismatch(path: Path, kind: str, found: str, expected: str) -> CheckpointError:
    """Make the error of a file with another checksum than expected."""
    return CheckpointError(
        f"{path}: damaged, or not the file that belongs here: its {kind} is {found}, "
        f"expected {expected}",
        hint="copy it again, or make it again; `inspect` shows the command",
    )
