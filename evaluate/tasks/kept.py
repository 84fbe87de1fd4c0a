"""Answers kept as they come: a file of JSON lines, which is appended to.

A line holds an answer to a request of a checkpoint under given settings, or says which checkpoint
and settings a name stands for. A run that was killed goes on from the last whole line.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spectool.errors import UsageError

# Every line begins so; the file of something else is left alone.
_BEGIN = b'{"of": "'


class KeptAnswers:
    """Answers of one checkpoint under given settings; without a path they are in memory alone.

    Raises:
        UsageError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path, self._owner = path, _digest(settings)
        self._found: dict[str, Any] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._read(path):
                self._write({"of": self._owner, "settings": settings})
        except OSError as error:
            raise UsageError(f"--task-log {path}: {error.strerror}") from error

    def _read(self, path: Path) -> bool:
        """Read the answers of this owner; return whether the file knows it. Cut a torn last line.

        Raises:
            OSError, UsageError: the file cannot be read, or holds something else.
        """
        known = False
        text = path.read_bytes() if path.is_file() else b""
        whole = text.rfind(b"\n") + 1
        torn = text[whole:]
        if not torn.startswith(_BEGIN[: len(torn)]):
            raise UsageError(f"--task-log {path}: its last line is no answer")
        for number, line in enumerate(text[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                owner = entry["of"]
                request = entry["request"] if "settings" not in entry else None
            except (ValueError, TypeError, KeyError) as error:
                raise UsageError(f"--task-log {path}: line {number} is no answer") from error
            if owner == self._owner:
                known = True
                if request is not None:
                    self._found[request] = entry["answer"]
        if torn:
            with path.open("r+b") as file:
                file.truncate(whole)
        return known

    def get(self, request: Any) -> Any:
        """Return the answer to a request (any JSON), None if there is none yet."""
        return self._found.get(_digest(request))

    def add(self, request: Any, answer: Any) -> None:
        """Keep an answer (any JSON but null), in the file at once."""
        key = _digest(request)
        if key not in self._found:
            self._found[key] = answer
            if self._path is not None:
                self._write({"of": self._owner, "request": key, "answer": answer})

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def __len__(self) -> int:
        return len(self._found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
