"""The tree of spectool's errors, with their exit codes.

SpectoolError            1   the run failed after it began
├── Interrupted        130   Ctrl-C or SIGTERM; the run can be resumed
├── NotFinite            1   the model computes NaN or infinite values
└── InputError           2   the input or the usage was wrong; nothing was changed
    ├── UsageError           an option, a name or a combination of them
    ├── CheckpointError      a checkpoint's files: missing, damaged, inconsistent
    ├── TextError            a text or prompt file
    ├── UnsupportedError     a model or a format that spectool cannot handle rightly
    └── MissingExtra         an optional package is not installed

A message is one line: what was found, what was expected, what to do. `hint` is printed on a line
of its own.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar


class SpectoolError(Exception):
    """Base of all spectool errors; raised itself if a run fails and its input is not the cause."""

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


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return a hint with the nearest of the known names; None if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else None


def require(module: str, *, extra: str, reason: str) -> ModuleType:
    """Import a module of an optional package; `extra` is the extra of spectool that installs it.

    Raises:
        MissingExtra: the package is not installed.
    """
    package = module.split(".")[0]
    try:
        # The import may warn about packages that are not needed here, as that of bitsandbytes does.
        with silence_logger(package):
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{reason} needs the package {package}, which is not installed",
            hint=f"pip install 'spectool[{extra}]'",
        ) from error


# Characters shown of a message of foreign code.
_MAX_REASON = 300


@contextlib.contextmanager
def wrap_errors(path: str | Path, problem: str) -> Iterator[None]:
    """Turn the errors of foreign code that reads `path` into one line, `path: problem: reason`.

    Raises:
        CheckpointError: instead of any error that is neither spectool's nor a lack of memory.
    """
    try:
        yield
    except (SpectoolError, MemoryError):
        raise
    except BaseException as error:
        # A panic of Rust code (the tokenizers library) is not an Exception.
        kind = type(error).__name__
        if not isinstance(error, Exception) and kind != "PanicException":
            raise
        reason = " ".join(str(error).split())
        if kind == "OutOfMemoryError" or "can't allocate memory" in reason:
            raise
        if isinstance(error, (LookupError, TypeError, AttributeError)) or not reason:
            reason = f"{kind}: {reason}" if reason else kind
        if len(reason) > _MAX_REASON:
            reason = reason[:_MAX_REASON] + "..."
        raise CheckpointError(f"{path}: {problem}: {reason}") from error


@contextlib.contextmanager
def silence_logger(package: str) -> Iterator[None]:
    """Suppress what the package logs below the level of errors."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
