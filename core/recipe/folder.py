"""The folder of a run: what each stage left there, and one run at a time.

    RUN/run.json             recipe, machine, versions; of each stage command, key, times, exit code
    RUN/results/NN-STAGE.json    what the command printed with --json
    RUN/distilled, RUN/packed, RUN/heads    what the stages wrote

With a matrix RUN/VARIANT is such a folder for each variant. A stage that several variants share is
in the folder of the first one; its result is in all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectool import machine
from spectool.errors import UsageError
from spectool.files import disk_errors, json_bytes, replacing
from spectool.recipe.fingerprints import versions
from spectool.recipe.plan import STAGES, PlannedStage, VariantPlan

RUN_FILE = "run.json"
DIGESTS = "digests.json"
RESULTS = "results"
_LOCK = ".lock"
FORMAT_VERSION = 1

# Seconds to wait for the processes of a run that was just killed.
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A stage's entry in run.json; `output` is the digest of the directory that it wrote."""

    stage: str
    command: list[str]
    key: str
    output: str | None
    exit_code: int
    seconds: float
    finished: str


class RunFolder:
    """The folder of one variant."""

    def __init__(self, run: Path, variant: VariantPlan) -> None:
        self.path = run / variant.variant.name
        self.plan = variant

    @property
    def name(self) -> str:
        """The variant's name, or that of the whole run."""
        return self.plan.variant.name or self.path.name

    def result_path(self, planned: PlannedStage) -> Path:
        """Return where the result of a stage lies."""
        return self.path / RESULTS / planned.result

    def read_result(self, planned: PlannedStage) -> dict[str, Any] | None:
        """Return the result of a stage; None if there is none."""
        try:
            found = json.loads(self.result_path(planned).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_result(self, planned: PlannedStage, result: Mapping[str, Any]) -> None:
        """Keep the result of a stage."""
        path = self.result_path(planned)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")

    def forget(self, planned: PlannedStage) -> None:
        """Remove the result of a stage that runs again."""
        self.result_path(planned).unlink(missing_ok=True)

    def forget_others(self) -> None:
        """Remove the results of stages that the recipe no longer has."""
        kept = {planned.result for planned in self.plan.stages}
        for number, stage in enumerate(STAGES, start=1):
            if (name := f"{number:02}-{stage}.json") not in kept:
                (self.path / RESULTS / name).unlink(missing_ok=True)

    def read_records(self) -> dict[str, Record]:
        """Return the records of the stages that ran, by stage, as far as they can be read."""
        found = _read_run(self.path)
        records = {}
        for each in (found or {}).get("stages", ()):
            with contextlib.suppress(TypeError, KeyError):
                records[each["stage"]] = Record(**each)
        return records

    def write_records(self, records: Mapping[str, Record]) -> None:
        """Write run.json, with the records of the recipe's stages in their order."""
        variant = self.plan.variant
        kept = [records[planned.stage] for planned in self.plan.stages if planned.stage in records]
        sections = {
            stage: {name: given.value for name, given in section.items()}
            for stage, section in {"all": variant.every, **variant.sections}.items()
        }
        write_run(
            self.path,
            {
                "model": variant.model.value,
                "values": dict(variant.values),
                "recipe": sections,
                "machine": machine.describe_hardware(),
                "versions": versions(),
                "stages": [asdict(record) for record in kept],
            },
        )


def check_folder(run: Path) -> None:
    """Raise UsageError if the folder holds something, and no run made it."""
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: is a file; expected the folder of a run")
    if run.is_dir() and any(run.iterdir()) and _read_run(run) is None:
        raise UsageError(
            f"{run}: exists, and no run made it", hint="--out DIR names another directory"
        )


@contextlib.contextmanager
def locked(run: Path, plans: Sequence[VariantPlan]) -> Iterator[int]:
    """Make the folder of a run, for this process alone; yield the lock, for its children too.

    Raises:
        UsageError: another run has it.
        InputError: it cannot be written.
    """
    check_folder(run)
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        if _read_run(run) is None:
            write_run(run, {"variants": [plan.variant.name for plan in plans if plan.variant.name]})
        lock = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        began = time.monotonic()
        while not _lock(lock):
            if time.monotonic() - began > _PATIENCE:
                raise UsageError(f"{run}: another run is going on there")
            time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


def _lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_run(path: Path) -> dict[str, Any] | None:
    """Return run.json of a folder; None without one, or if it cannot be read."""
    try:
        found = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "format_version" in found else None


def write_run(path: Path, content: Mapping[str, Any]) -> None:
    """Write run.json of a folder."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with replacing(path / RUN_FILE) as temporary:
        temporary.write_bytes(json_bytes({"format_version": FORMAT_VERSION, **content}))
