"""What a training tells of every step, as lines of JSON in a file beside the run.

An artifact holds neither times nor what led to it; this file does. The first line names the run,
so that a run that goes on finds its own lines, drops those of steps that it takes again, and never
writes into another run's file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectool.errors import InputError, UsageError
from spectool.files import disk_errors, replacing


class MetricsFile:
    """Lines for `path`, each with its `step`. `run` names the run and says what it is.

    Raises:
        UsageError: the file is there and is not this run's.
        InputError: its place cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._head = json.dumps(run, sort_keys=True)
        self._fresh = True
        if not path.absolute().parent.exists():
            raise InputError(f"{path}: cannot be written: its directory is not there")
        with disk_errors(path):
            # Told now whether the place will do, not after an hour of work.
            path.open("a").close()
            if next(iter(self._lines()), self._head) != self._head:
                raise UsageError(
                    f"{path}: is not the metrics of this run", hint="move it away, or name another"
                )

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a step's line. Lines of this step and later ones that were there are dropped."""
        with disk_errors(self.path):
            if self._fresh:
                self._begin(step)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, **metrics}))

    def _begin(self, step: int) -> None:
        kept = [line for line in self._lines()[1:] if _step_of(line) < step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in (self._head, *kept)), "utf-8")
        self._fresh = False

    def _lines(self) -> list[str]:
        """The whole lines that are there: a killed run may have left a part of one."""
        return self.path.read_text("utf-8", errors="replace").split("\n")[:-1]


def _step_of(line: str) -> int:
    return int(json.loads(line)["step"])


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps({key: _finite(part) for key, part in value.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity, and the norm of a gradient may be that."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
