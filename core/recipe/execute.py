"""Execution of a recipe's stages: each is a process of its own that runs its command.

Why processes, and not calls of the commands' functions: torch keeps the memory of a GPU that it has
used, and `eval` decides by the free memory whether a model is loaded whole; the peak memory that a
command reports is its process's; numbers of threads and deterministic modes are settings of a
process, and speed is measured beside whatever else it keeps; and a stage that the system kills for
memory leaves a run that can say so. What is recorded as a stage's command is what ran. The price is
a start of Python and torch for each stage that is not cached.

A stage is not run again if its key is that of its last run and all that it wrote is there; an
interrupted one continues by its own command. A gate that does not hold (exit code 3) ends its
variant: no later stage runs. After another failure only stages that take something from the failed
one do not run.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spectool.checkpoint.headers import HEADS
from spectool.errors import Interrupted
from spectool.files import TUNED, read_cache
from spectool.recipe.fingerprints import Digests, key_of
from spectool.recipe.folder import DIGESTS, Record, RunFolder
from spectool.recipe.plan import STAGES, PlannedStage, VariantPlan, texts_of
from spectool.report import SILENT, Reporter

GATE = 3
INTERRUPTED = 130

State = Literal["runs", "done", "cached", "gate", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a stage, or in a dry run the one foreseen (`runs`); `reason` says why.

    `result` is the JSON object that the command printed; None if there is none.
    """

    planned: PlannedStage
    command: list[str]
    state: State
    reason: str = ""
    code: int = 0
    seconds: float = 0.0
    result: Mapping[str, Any] | None = None

    @property
    def gates(self) -> list[Mapping[str, Any]]:
        """The gates of the stage: `expression`, `value` and `holds` of each."""
        return list((self.result or {}).get("gates", ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarts:
    """A stage runs, the `number`th of `total` of all variants."""

    outcome: Outcome
    variant: str
    number: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnds:
    """A stage ended, or does not run."""

    outcome: Outcome
    variant: str


# Starts a command with these words, waits for it, and returns its exit code and what it printed.
Start = Callable[[Sequence[str]], tuple[int, str]]


class Execution:
    """A plan in its folder: what will run, and the run itself.

    `report` shows the results of all variants, at the end of each run; its outcome is under the
    name of no variant.
    """

    def __init__(
        self,
        run: Path,
        plans: Sequence[VariantPlan],
        report: PlannedStage | None = None,
        *,
        reporter: Reporter = SILENT,
    ) -> None:
        self.run_path, self.report, self.reporter = run, report, reporter
        self.folders = {plan.variant.name: RunFolder(run, plan) for plan in plans}
        self._records = {name: folder.read_records() for name, folder in self.folders.items()}
        self._digests = Digests(run / DIGESTS)
        self._ended: dict[str, Outcome] = {}
        self._tunings: dict[str, str] = {}

    def foresee(self) -> dict[str, list[Outcome]]:
        """Return by variant which stages are cached and which will run; nothing is written."""
        found: dict[str, list[Outcome]] = {}
        for name, folder in self.folders.items():
            found[name] = []
            for planned in folder.plan.stages:
                found[name].append(self._foresee(planned, found[name]))
        if self.report is not None:
            found.setdefault("", []).append(self._pending_report(self.report))
        return found

    def _foresee(self, planned: PlannedStage, before: Sequence[Outcome]) -> Outcome:
        if (blocked := _find_block(planned, before, self._ended)) is not None:
            return self._skipped(planned, blocked)
        if (known := self._ended.get(planned.identity)) is not None:
            return _shared(known)
        first = next(
            (each.stage for each in planned.takes if self._ended[each.identity].state == "runs"),
            None,
        )
        if first is not None:
            outcome = self._pending(planned, f"{first} runs")
        elif (reason := self._reason_to_run(planned, self._key(planned))) is not None:
            outcome = self._pending(planned, reason)
        else:
            outcome = self._cached(planned)
        self._ended[planned.identity] = outcome
        return outcome

    def _pending(self, planned: PlannedStage, reason: str) -> Outcome:
        return Outcome(planned=planned, command=self._words(planned), state="runs", reason=reason)

    def _skipped(self, planned: PlannedStage, reason: str) -> Outcome:
        command = self._words(planned)
        return Outcome(planned=planned, command=command, state="skipped", reason=reason)

    def _cached(self, planned: PlannedStage) -> Outcome:
        """Return the outcome of a stage's last run."""
        record = self._records[planned.home][planned.stage]
        if planned.stage == "tune":
            self._tunings[planned.identity] = record.key
        held = record.exit_code != GATE
        return Outcome(
            planned=planned,
            command=self._words(planned),
            state="cached" if held else "gate",
            reason="" if held else "a gate did not hold in the last run",
            code=record.exit_code,
            result=self.folders[planned.home].read_result(planned),
        )

    def run(self, start: Start) -> dict[str, list[Outcome]]:
        """Run what is not cached; return the outcomes by variant.

        Raises:
            Interrupted: a stage was interrupted; the run can be continued.
        """
        total = len(
            {planned.identity for each in self.folders.values() for planned in each.plan.stages}
        )
        total += self.report is not None
        found: dict[str, list[Outcome]] = {}
        for name, folder in self.folders.items():
            folder.forget_others()
            found[name] = []
            for planned in folder.plan.stages:
                outcome = self._end(name, planned, found[name], total, start)
                found[name].append(outcome)
                self.reporter.event(StageEnds(outcome=outcome, variant=name))
                if outcome.result is not None and name != planned.home:
                    self._forget(name, planned)
                    folder.write_result(planned, outcome.result)
                    self._keep_record(name, self._records[planned.home][planned.stage])
        self._forget_skipped(found)
        if self.report is not None:
            pending = self._pending_report(self.report)
            self.reporter.event(StageStarts(outcome=pending, variant="", number=total, total=total))
            outcome = _call(pending, start)
            self.reporter.event(StageEnds(outcome=outcome, variant=""))
            found.setdefault("", []).append(outcome)
        return found

    def _pending_report(self, report: PlannedStage) -> Outcome:
        command = report.words({"run": str(self.run_path)})
        return Outcome(planned=report, command=command, state="runs", reason="as at each run's end")

    def _forget_skipped(self, found: Mapping[str, Sequence[Outcome]]) -> None:
        """Remove results of an earlier run from stages that did not run in this one."""
        for name, outcomes in found.items():
            for planned in (outcome.planned for outcome in outcomes if outcome.state == "skipped"):
                # In its home another variant, whose gates hold, may have run it.
                if planned.home != name or planned.identity not in self._ended:
                    self._forget(name, planned)

    def _forget(self, variant: str, planned: PlannedStage) -> None:
        """Remove a stage's result and record, so that no record ever stands beside a later result.

        A kill between the two would leave one that is taken for cached once its options are back.
        """
        self.folders[variant].forget(planned)
        if self._records[variant].pop(planned.stage, None) is not None:
            self.folders[variant].write_records(self._records[variant])

    def _end(
        self,
        variant: str,
        planned: PlannedStage,
        before: Sequence[Outcome],
        total: int,
        start: Start,
    ) -> Outcome:
        """Run a stage unless it is cached, shared or may not run."""
        # A skipped stage of one variant may run in another, whose gates hold, before it or after.
        if (blocked := _find_block(planned, before, self._ended)) is not None:
            return self._skipped(planned, blocked)
        if (known := self._ended.get(planned.identity)) is not None:
            return _shared(known)
        if (reason := self._reason_to_run(planned, key := self._key(planned))) is None:
            outcome = self._cached(planned)
        else:
            number = len(self._ended) + 1
            pending = self._pending(planned, reason)
            self.reporter.event(
                StageStarts(outcome=pending, variant=variant, number=number, total=total)
            )
            outcome = self._run(planned, key, start)
        self._ended[planned.identity] = outcome
        return outcome

    def _run(self, planned: PlannedStage, key: str, start: Start) -> Outcome:
        folder = self.folders[planned.home]
        self._forget(planned.home, planned)
        outcome = _call(self._pending(planned, ""), start)
        if outcome.result is not None:
            folder.write_result(planned, outcome.result)
        record = Record(
            stage=planned.stage,
            command=["spectool", *outcome.command],
            key=key,
            output=self._output(planned),
            exit_code=outcome.code,
            seconds=round(outcome.seconds, 3),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self._keep_record(planned.home, record)
        self._digests.save()
        if planned.stage == "tune":
            self._tunings[planned.identity] = key
        return outcome

    def _keep_record(self, variant: str, record: Record) -> None:
        self._records[variant][record.stage] = record
        self.folders[variant].write_records(self._records[variant])

    def _key(self, planned: PlannedStage) -> str:
        return key_of(planned, self._names(planned), self._digests, self._tunings)

    def _names(self, planned: PlannedStage) -> dict[str, str]:
        """Return what the placeholders of a stage stand for."""
        places = {
            take.stage: str(self.folders[take.home].path / (STAGES[take.stage] or ""))
            for take in planned.takes
        }
        return {"run": str(self.folders[planned.home].path), **places}

    def _words(self, planned: PlannedStage) -> list[str]:
        return planned.words(self._names(planned))

    def _output(self, planned: PlannedStage) -> str | None:
        """Return the digest of the directory that a stage wrote; None without one."""
        folder = STAGES[planned.stage]
        path = self.folders[planned.home].path / (folder or "")
        return self._digests.of(path) if folder is not None and path.is_dir() else None

    def _reason_to_run(self, planned: PlannedStage, key: str) -> str | None:
        """Return why a stage has to run; None if it is cached."""
        record, folder = self._records[planned.home].get(planned.stage), self.folders[planned.home]
        if record is None:
            return "it did not run yet"
        if record.key != key:
            return "its options, inputs or versions changed"
        if record.exit_code not in (0, GATE):
            return f"it ended with exit code {record.exit_code}"
        if folder.read_result(planned) is None:
            return "its result is gone"
        if record.output != self._output(planned):
            return "what it wrote is gone or changed"
        for config in planned.filled(self._names(planned)):
            for path in texts_of(config, written=True).values():
                if not Path(path).exists():
                    return f"{path} is gone"
        if planned.stage == "tune" and not self._is_tuned(planned):
            return "the cache folder of this user lacks what it found"
        return None

    def _is_tuned(self, planned: PlannedStage) -> bool:
        """Whether the cache folder has the options that `tune` found for these heads."""
        heads = next(Path(texts["heads"]) for texts in self._texts(planned) if "heads" in texts)
        # The fingerprint of heads is that of their record (`decode/heads/artifact.py`).
        digest = hashlib.sha256((heads / HEADS).read_bytes()).hexdigest()
        return any(key.startswith(f"sha256:{digest};") for key in read_cache(TUNED))

    def _texts(self, planned: PlannedStage) -> Iterator[dict[str, str]]:
        yield from map(texts_of, planned.filled(self._names(planned)))


def _call(pending: Outcome, start: Start) -> Outcome:
    """Run the command of a stage, and return its outcome; raises Interrupted if it was stopped."""
    began = time.monotonic()
    code, printed = start(pending.command)
    seconds = time.monotonic() - began
    if code == INTERRUPTED:
        raise Interrupted("interrupted", hint="run the same command to continue")
    result = _parse(printed)
    error = (result or {}).get("error") or {}
    reason = "a gate does not hold" if code == GATE else _describe_exit(code)
    if result is None or error:
        reason = str(error.get("message") or _describe_exit(code) or "it printed no result")
        result, code = None, code or 1
    states: dict[int, State] = {0: "done", GATE: "gate"}
    return replace(
        pending,
        state=states.get(code, "failed"),
        reason=reason,
        code=code,
        seconds=seconds,
        result=result,
    )


def _shared(known: Outcome) -> Outcome:
    """Return the outcome of a stage that an earlier variant has too."""
    if known.state not in ("done", "runs"):
        return known
    reason = f"shared with {known.planned.home}"
    return replace(known, state="cached", reason=reason, seconds=0.0)


def _find_block(
    planned: PlannedStage, before: Sequence[Outcome], ended: Mapping[str, Outcome]
) -> str | None:
    """Return why a stage may not run; None if it may."""
    for outcome in before:
        if outcome.state == "gate":
            failed = [gate["expression"] for gate in outcome.gates if not gate["holds"]]
            named = f"the gate {failed[0]}" if failed else "a gate"
            return f"{named} of {outcome.planned.stage} does not hold"
    for take in planned.takes:
        if take.identity not in ended:
            return f"{take.stage} did not run"
        if ended[take.identity].state == "failed":
            return f"{take.stage} failed"
    return None


def _parse(printed: str) -> dict[str, Any] | None:
    """Return the one JSON object that a command printed; None if it printed none."""
    try:
        found = json.loads(printed)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}" if code else ""
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", perhaps for lack of memory" if -code == signal.SIGKILL else "")


def exit_code(found: Mapping[str, Sequence[Outcome]]) -> int:
    """Return the exit code of a run: that of a failed stage, else 3 if a gate does not hold."""
    codes = [outcome.code for outcomes in found.values() for outcome in outcomes]
    failed = [code if code > 0 else 1 for code in codes if code not in (0, GATE)]
    return failed[0] if failed else max(codes, default=0)


def start_process(words: Sequence[str], *, lock: int) -> tuple[int, str]:
    """Run a command in a process, whose stderr is this one's; return its exit code and stdout.

    It inherits the run's lock and ends with this process, so that a killed run leaves nothing
    behind that still writes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "spectool", *words, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        pass_fds=[lock],
        preexec_fn=functools.partial(_end_with_parent, os.getpid()),
    )
    try:
        printed, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        # Read on, or a stage that is just printing a long result could not end.
        process.communicate()
        raise
    return process.returncode, printed


def _end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, and end if it did already."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        # A parent killed before that call, as on a busy machine, sends nothing any more.
        if os.getppid() != parent:
            os._exit(1)
