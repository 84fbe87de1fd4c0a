"""What can go wrong, and the exit code that says so.

SpectoolError            1   the run failed after it began
├── Interrupted        130   Ctrl-C or SIGTERM; what was written can be resumed
├── NotFinite            1   the model computes NaN or infinite values
└── InputError           2   the input or the usage was wrong; nothing was changed
    ├── UsageError           an option, a name or a combination of them
    ├── CheckpointError      a checkpoint's files: missing, damaged, inconsistent
    ├── TextError            a text or prompt file
    ├── UnsupportedError     a model or a format that spectool cannot handle rightly
    └── MissingExtra         an optional package is needed

A message is one line: what was found, what was expected, what to do. `hint` goes on a line of
its own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar


class SpectoolError(Exception):
    """Root of the tree; raised itself where a run failed through no fault of its input."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Interrupted(SpectoolError):
    exit_code = 130


class NotFinite(SpectoolError):
    pass


class InputError(SpectoolError):
    exit_code = 2


class UsageError(InputError):
    pass


class CheckpointError(InputError):
    pass


class TextError(InputError):
    pass


class UnsupportedError(InputError):
    pass


class MissingExtra(InputError):
    pass


def require(module: str, *, extra: str, reason: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    What it remarks on meanwhile is kept from the user: bitsandbytes, say, misses an optional
    package for other processors.

    Raises:
        MissingExtra: the package is not installed.
    """
    package = module.split(".")[0]
    try:
        with hushed(package):
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{reason} needs the package {package}, which is not installed",
            hint=f"pip install 'spectool[{extra}]'",
        ) from error


# Characters of a foreign message that are shown.
_LONGEST = 300


@contextlib.contextmanager
def opening(place: str | Path, problem: str) -> Iterator[None]:
    """While open, whatever foreign code raises becomes the one line `place: problem: reason`.

    For the calls that open files of others: these may contradict themselves in any way.

    Raises:
        CheckpointError: in place of any error but our own and a lack of memory.
    """
    try:
        yield
    except (SpectoolError, MemoryError):
        raise
    except BaseException as error:
        # A panic in Rust, as of the tokenizers library, is no Exception.
        kind = type(error).__name__
        if not isinstance(error, Exception) and kind != "PanicException":
            raise
        reason = " ".join(str(error).split())
        if kind == "OutOfMemoryError" or "can't allocate memory" in reason:
            raise
        if isinstance(error, (LookupError, TypeError, AttributeError)) or not reason:
            reason = f"{kind}: {reason}" if reason else kind
        if len(reason) > _LONGEST:
            reason = reason[:_LONGEST] + "..."
        raise CheckpointError(f"{place}: {problem}: {reason}") from error


@contextlib.contextmanager
def hushed(package: str) -> Iterator[None]:
    """While open, the package logs nothing below an error."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
