"""Write a file whole or not at all, and find the user's folders. Imports neither torch nor more."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectool.errors import CheckpointError, InputError, SpectoolError

# Answers of the operating system about a path that cannot be written, whatever the data.
_NOT_WRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EISDIR,
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into one line about `path`.

    Raises:
        InputError: the path cannot be written.
        SpectoolError: the disk is full, or failed.
    """
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise SpectoolError(
                f"{path}: the disk is full",
                hint="what is written there is whole; make room and run the same command again",
            ) from error
        reason = error.strerror or str(error)
        if error.errno in _NOT_WRITABLE:
            raise InputError(f"{path}: cannot be written: {reason}") from error
        raise SpectoolError(f"{path}: {reason}") from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into a CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; the file written there replaces `path`.

    If the block fails, `path` is what it was and nothing is left. The temporary name keeps the
    ending of `path`, which tells some writers the format. Several processes may do it at once.

    Raises:
        InputError: the folder cannot be written.
        SpectoolError: the disk is full, or failed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    with disk_errors(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def replace_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(part) for part in value]
    return value


# File of the cache folder with the draft options that `tune` found.
TUNED = "tuned.json"


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def cache_folder() -> Path:
    """Return the folder for what can be made again: spectool's in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectool"


def read_cache(name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the cache folder; empty if it is absent or damaged."""
    try:
        found: Any = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(name: str, value: dict[str, Any]) -> None:
    """Write a JSON object to a file of the cache folder."""
    path = cache_folder() / name
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def state_folder() -> Path:
    """Return the folder for what a user would miss: spectool's in the user's state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "spectool"


def json_bytes(value: Any) -> bytes:
    """Encode a JSON file, indented and with sorted keys."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
