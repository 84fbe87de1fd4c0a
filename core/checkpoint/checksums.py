"""Checksums of an artifact's files: made while they are written, compared before they are used.

Every shard has two. SHA-256 is what `inspect --checksums` compares; XXH3 of 64 bits is quick enough
to compare at every load. The module knows bytes and names of files; neither tensors nor torch.
What `--help` does not need is imported on use.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectool import processors
from spectool.errors import CheckpointError

# Bytes mapped at once: each piece is a call without the interpreter's lock, and no more than this
# of a file is in the resident set. Copying into a buffer first takes 1.5 times as long.
WINDOW = 1 << 26
# Bytes read at once where every byte goes through SHA-256, which is the slower part.
CHUNK = 1 << 20
# One thread compares about 10 GB of cached pages a second; a few reach what memory gives.
MOST_THREADS = 4

# What is said of files that nothing is stored about.
NONE = "has no checksums to compare its files with: an older spectool wrote it"


@dataclass(frozen=True, slots=True)
class Checksums:
    """The two checksums of one file, in hexadecimal digits."""

    sha256: str
    xxh3_64: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class Summing:
    """Both checksums of bytes that come one piece after the other."""

    def __init__(self) -> None:
        import hashlib

        import xxhash

        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._xxh3.update(data)

    def finish(self) -> Checksums:
        return Checksums(self._sha256.hexdigest(), self._xxh3.hexdigest())


class Guard:
    """A file and the XXH3 that it was written with; compared once, before its tensors are read."""

    def __init__(self, path: Path, expected: str) -> None:
        self.path = path
        self.expected = expected
        self._lock = threading.Lock()
        self._sound = False

    def check(self) -> None:
        """Raises: CheckpointError: the file's bytes are not those that were written."""
        with self._lock:
            if not self._sound:
                found = _xxh3(self.path)
                if found != self.expected:
                    raise _mismatch(self.path, "XXH3", found, self.expected)
                self._sound = True


def guard(path: Path, stored: Mapping[str, Checksums]) -> Guard | None:
    """Return the guard that compares a file with its checksum in `stored`; None without any.

    Raises:
        CheckpointError: others have one, and it has not.
    """
    if not stored:
        return None
    if path.name not in stored:
        raise CheckpointError(f"{path}: has no checksum, but {min(stored)} beside it has one")
    return Guard(path, stored[path.name].xxh3_64)


class Checking:
    """The comparison of several files, which goes on beside whatever else is done.

    Nothing waits for its threads but `finish`: a load that fails or is interrupted ends at once,
    however much is left to read.
    """

    def __init__(self, guards: Iterable[Guard]) -> None:
        self._left = deque(guards)
        self._found: list[Exception] = []
        number = min(MOST_THREADS, processors.allowed().threads, len(self._left))
        self._threads = [
            threading.Thread(target=self._work, name="checksums", daemon=True)
            for _ in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while not self._found:
            try:
                guard = self._left.popleft()
            except IndexError:
                return
            try:
                guard.check()
            except Exception as error:
                # Whatever it is: a file that was not compared must not pass.
                self._found.append(error)

    def finish(self) -> None:
        """Wait for the end of it. Raises: CheckpointError: see `Guard.check`."""
        for thread in self._threads:
            thread.join()
        if self._found:
            raise self._found[0]


def of_file(path: Path) -> Checksums:
    """Both checksums of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    summing, buffer = Summing(), memoryview(bytearray(CHUNK))
    with _reading(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            summing.update(buffer[:size])
    return summing.finish()


def verify(folder: Path, said: Mapping[str, Checksums]) -> None:
    """Compare both checksums of all files in `folder` that `said` names.

    Raises:
        CheckpointError: there are none to compare with; a file is absent, is another, or holds
            tensors and has no checksum.
    """
    if not said:
        raise CheckpointError(
            f"{folder}: no checksums to compare with",
            hint="`quantize` and `train-heads` write them since spectool 0.2",
        )
    foreign = sorted({path.name for path in folder.glob("*.safetensors")} - said.keys())
    if foreign:
        raise CheckpointError(f"{folder / foreign[0]}: has no checksum: it is no part of {folder}")
    for name, expected in sorted(said.items()):
        found = of_file(folder / name)
        if found.sha256 != expected.sha256:
            raise _mismatch(folder / name, "SHA-256", found.sha256, expected.sha256)
        if found.xxh3_64 != expected.xxh3_64:
            raise _mismatch(folder / name, "XXH3", found.xxh3_64, expected.xxh3_64)


def parse(said: Any, place: Path) -> dict[str, Checksums]:
    """Checksums by file name, as an index or a record stores them; none where it has none.

    Raises:
        CheckpointError: they cannot be read.
    """
    if said is None:
        return {}
    try:
        found = {name: Checksums(**each) for name, each in said.items()}
        if all(
            Path(name).name == name
            and isinstance(each.sha256, str)
            and isinstance(each.xxh3_64, str)
            for name, each in found.items()
        ):
            return found
    except (TypeError, AttributeError):
        pass
    raise CheckpointError(f"{place}: its checksums cannot be read: expected two for each file")


def _xxh3(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as part:
                if hasattr(mmap, "MADV_SEQUENTIAL"):
                    part.madvise(mmap.MADV_SEQUENTIAL)
                digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _mismatch(path: Path, kind: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged, or not the file that belongs here: its {kind} is {found}, "
        f"expected {expected}",
        hint="copy it again, or make it again; `inspect` shows the command",
    )
