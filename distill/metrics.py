"""Training metrics of every step, as JSON lines in a file.

The artifact itself holds no times, so that equal runs give equal bytes. The first line identifies
the run: a resumed run keeps its own earlier lines, drops those of steps it repeats, and never
writes to the file of another run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectool.errors import InputError, UsageError
from spectool.files import disk_errors, replace_nonfinite, replacing
from spectool.report import Reporter, TrainingStep


class MetricsFile(Reporter):
    """JSON lines in the file `path`, one per reported step. `run` identifies the run.

    Raises:
        UsageError: the file exists and is of another run.
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._first_line = json.dumps(run, sort_keys=True)
        self._fresh = True
        if not path.absolute().parent.exists():
            raise InputError(f"{path}: cannot be written: its directory is not there")
        with disk_errors(path):
            # Fail now if the file cannot be written, not after an hour of work.
            path.open("a").close()
            if next(iter(self._lines()), self._first_line) != self._first_line:
                raise UsageError(
                    f"{path}: is not the metrics of this run",
                    hint="move it away, or name another file",
                )

    def event(self, event: Any) -> None:
        """Append a step's line; the first call drops older lines of this step and later ones."""
        if not isinstance(event, TrainingStep):
            return
        line = {"step": event.step, **event.metrics}
        if event.metrics:
            line["tokens_per_second"] = line["tokens"] / max(1e-9, line["seconds"])
        if event.evaluation is not None:
            line["held_out"] = event.evaluation
        with disk_errors(self.path):
            if self._fresh:
                self._begin(event.step)
            with self.path.open("a", encoding="utf-8") as file:
                # A gradient norm may be infinite.
                file.write(json.dumps(replace_nonfinite(line), allow_nan=False) + "\n")

    def _begin(self, step: int) -> None:
        kept = [line for line in self._lines()[1:] if json.loads(line)["step"] < step]
        with replacing(self.path) as temporary:
            lines = (self._first_line, *kept)
            temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        self._fresh = False

    def _lines(self) -> list[str]:
        """Read the complete lines of the file: a killed run may have left part of one."""
        return self.path.read_text("utf-8", errors="replace").split("\n")[:-1]
