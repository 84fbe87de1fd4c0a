"""Execution of a recipe's steps: each is a process of its own that runs its command.

Why processes, and not calls of the commands' functions: torch keeps the memory of a GPU that it has
used, and `eval` decides by the free memory whether a model is loaded whole; the peak memory that a
command reports is its process's; numbers of threads and deterministic modes are settings of a
process, and speed is measured beside whatever else it keeps; and a stage that the system kills for
memory leaves a run that can say so. What is recorded as a step's command is what ran. The price is
a start of Python and torch for each step that is not cached.

A step is not run again if its key is that of its last run and all that it wrote is there; an
interrupted one continues by its own command. A gate that does not hold (exit code 3) ends its
variant: no later step runs. After another failure only steps that take something from the failed
one do not run.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
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
from spectool.recipe.plan import STAGES, Step, VariantPlan, texts_of
from spectool.report import SILENT, Reporter

GATE = 3
INTERRUPTED = 130

State = Literal["runs", "done", "cached", "gate", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a step, or will (`runs`, in a dry run): `reason` says why.

    `result` is the JSON object that the command printed; None if there is none.
    """

    step: Step
    command: list[str]
    state: State
    reason: str = ""
    code: int = 0
    seconds: float = 0.0
    result: Mapping[str, Any] | None = None

    @property
    def gates(self) -> list[Mapping[str, Any]]:
        """The gates of the step: `expression`, `value` and `holds` of each."""
        return list((self.result or {}).get("gates", ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarts:
    """A step runs, the `number`th of `total` of all variants."""

    outcome: Outcome
    variant: str
    number: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnds:
    """A step ended, or does not run."""

    outcome: Outcome
    variant: str


# Starts a command with these words, waits for it, and returns its exit code and what it printed.
Start = Callable[[Sequence[str]], tuple[int, str]]


class Execution:
    """A plan in its folder: what will run, and the run itself."""

    def __init__(
        self, run: Path, plans: Sequence[VariantPlan], *, reporter: Reporter = SILENT
    ) -> None:
        self.run_path, self.reporter = run, reporter
        self.folders = {plan.variant.name: RunFolder(run, plan) for plan in plans}
        self._records = {name: folder.read_records() for name, folder in self.folders.items()}
        self._digests = Digests(run / DIGESTS)
        self._ended: dict[str, Outcome] = {}
        self._tunings: dict[str, str] = {}

    def foresee(self) -> dict[str, list[Outcome]]:
        """Return by variant which steps are cached and which will run; nothing is written."""
        found: dict[str, list[Outcome]] = {}
        for name, folder in self.folders.items():
            found[name] = []
            for step in folder.plan.steps:
                found[name].append(self._foresee(step, found[name]))
        return found

    def _foresee(self, step: Step, before: Sequence[Outcome]) -> Outcome:
        if (known := self._ended.get(step.identity)) is not None:
            return _shared(known)
        blocked = _find_block(step, before, self._ended)
        if blocked is not None:
            return Outcome(step=step, command=self._words(step), state="skipped", reason=blocked)
        first = next(
            (each.stage for each in step.takes if self._ended[each.identity].state == "runs"), None
        )
        if first is not None:
            outcome = self._pending(step, f"{first} runs")
        elif (reason := self._reason_to_run(step, self._key(step))) is not None:
            outcome = self._pending(step, reason)
        else:
            outcome = self._cached(step)
        self._ended[step.identity] = outcome
        return outcome

    def _pending(self, step: Step, reason: str) -> Outcome:
        return Outcome(step=step, command=self._words(step), state="runs", reason=reason)

    def _cached(self, step: Step) -> Outcome:
        """Return the outcome of a step's last run."""
        record = self._records[step.home][step.stage]
        if step.stage == "tune":
            self._tunings[step.identity] = record.key
        held = record.exit_code != GATE
        return Outcome(
            step=step,
            command=self._words(step),
            state="cached" if held else "gate",
            reason="" if held else "a gate did not hold in the last run",
            code=record.exit_code,
            result=self.folders[step.home].read_result(step),
        )

    def run(self, start: Start) -> dict[str, list[Outcome]]:
        """Run what is not cached; return the outcomes by variant.

        Raises:
            Interrupted: a step was interrupted; the run can be continued.
        """
        total = len({step.identity for each in self.folders.values() for step in each.plan.steps})
        found: dict[str, list[Outcome]] = {}
        for name, folder in self.folders.items():
            folder.forget_others()
            found[name] = []
            for step in folder.plan.steps:
                outcome = self._end(name, step, found[name], total, start)
                found[name].append(outcome)
                self.reporter.event(StepEnds(outcome=outcome, variant=name))
                if outcome.result is not None and name != step.home:
                    folder.write_result(step, outcome.result)
                    self._keep_record(name, self._records[step.home][step.stage])
        self._forget_skipped(found)
        return found

    def _forget_skipped(self, found: Mapping[str, Sequence[Outcome]]) -> None:
        """Remove results of an earlier run from stages that did not run in this one."""
        for name, outcomes in found.items():
            for step in (outcome.step for outcome in outcomes if outcome.state == "skipped"):
                # In its home another variant, whose gates hold, may have run it.
                if step.home != name or step.identity not in self._ended:
                    self.folders[name].forget(step)

    def _end(
        self, variant: str, step: Step, before: Sequence[Outcome], total: int, start: Start
    ) -> Outcome:
        """Run a step unless it is cached, shared or may not run."""
        if (known := self._ended.get(step.identity)) is not None:
            return _shared(known)
        blocked = _find_block(step, before, self._ended)
        if blocked is not None:
            outcome = Outcome(step=step, command=self._words(step), state="skipped", reason=blocked)
        elif (reason := self._reason_to_run(step, key := self._key(step))) is None:
            outcome = self._cached(step)
        else:
            number = len(self._ended) + 1
            pending = self._pending(step, reason)
            self.reporter.event(
                StepStarts(outcome=pending, variant=variant, number=number, total=total)
            )
            outcome = self._run(step, key, start)
        # A skipped step of one variant may run in another, whose gates hold.
        if outcome.state != "skipped":
            self._ended[step.identity] = outcome
        return outcome

    def _run(self, step: Step, key: str, start: Start) -> Outcome:
        folder, command = self.folders[step.home], self._words(step)
        folder.forget(step)
        began = time.monotonic()
        code, printed = start(command)
        seconds = time.monotonic() - began
        result = _parse(printed)
        error = (result or {}).get("error") or {}
        if code == INTERRUPTED:
            raise Interrupted("interrupted", hint="run the same command to continue")
        if result is None or error:
            reason = str(error.get("message") or _describe_exit(code))
            result = None
            code = code or 1
        else:
            folder.write_result(step, result)
            reason = "a gate does not hold" if code == GATE else _describe_exit(code)
        record = Record(
            stage=step.stage,
            command=["spectool", *command],
            key=key,
            output=self._output(step),
            exit_code=code,
            seconds=round(seconds, 3),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self._keep_record(step.home, record)
        self._digests.save()
        if step.stage == "tune":
            self._tunings[step.identity] = key
        states: dict[int, State] = {0: "done", GATE: "gate"}
        return Outcome(
            step=step,
            command=command,
            state=states.get(code, "failed"),
            reason=reason,
            code=code,
            seconds=seconds,
            result=result,
        )

    def _keep_record(self, variant: str, record: Record) -> None:
        self._records[variant][record.stage] = record
        self.folders[variant].write_records(self._records[variant])

    def _key(self, step: Step) -> str:
        return key_of(step, self._names(step), self._digests, self._tunings)

    def _names(self, step: Step) -> dict[str, str]:
        """Return what the placeholders of a step stand for."""
        places = {
            take.stage: str(self.folders[take.home].path / (STAGES[take.stage] or ""))
            for take in step.takes
        }
        return {"run": str(self.folders[step.home].path), **places}

    def _words(self, step: Step) -> list[str]:
        return step.words(self._names(step))

    def _output(self, step: Step) -> str | None:
        """Return the digest of the directory that a step wrote; None without one."""
        folder = STAGES[step.stage]
        path = self.folders[step.home].path / (folder or "")
        return self._digests.of(path) if folder is not None and path.is_dir() else None

    def _reason_to_run(self, step: Step, key: str) -> str | None:
        """Return why a step has to run; None if it is cached."""
        record, folder = self._records[step.home].get(step.stage), self.folders[step.home]
        if record is None:
            return "it did not run yet"
        if record.key != key:
            return "its options, inputs or versions changed"
        if record.exit_code not in (0, GATE):
            return f"it ended with exit code {record.exit_code}"
        if folder.read_result(step) is None:
            return "its result is gone"
        if record.output != self._output(step):
            return "what it wrote is gone or changed"
        for config in step.filled(self._names(step)):
            for path in texts_of(config, written=True).values():
                if not Path(path).exists():
                    return f"{path} is gone"
        if step.stage == "tune" and not self._is_tuned(step):
            return "the cache folder of this user lacks what it found"
        return None

    def _is_tuned(self, step: Step) -> bool:
        """Whether the cache folder has the options that `tune` found for these heads."""
        heads = next(Path(texts["heads"]) for texts in self._texts(step) if "heads" in texts)
        # The fingerprint of heads is that of their record (`decode/heads/artifact.py`).
        digest = hashlib.sha256((heads / HEADS).read_bytes()).hexdigest()
        return any(key.startswith(f"sha256:{digest};") for key in read_cache(TUNED))

    def _texts(self, step: Step) -> Iterator[dict[str, str]]:
        yield from map(texts_of, step.filled(self._names(step)))


def _shared(known: Outcome) -> Outcome:
    """Return the outcome of a step that an earlier variant has too."""
    if known.state not in ("done", "runs"):
        return known
    reason = f"shared with {known.step.home}"
    return replace(known, state="cached", reason=reason, seconds=0.0)


def _find_block(step: Step, before: Sequence[Outcome], ended: Mapping[str, Outcome]) -> str | None:
    """Return why a step may not run; None if it may."""
    for outcome in before:
        if outcome.state == "gate":
            failed = [gate["expression"] for gate in outcome.gates if not gate["holds"]]
            named = f"the gate {failed[0]}" if failed else "a gate"
            return f"{named} of {outcome.step.stage} does not hold"
    for take in step.takes:
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
    """Return the exit code of a run: that of a failed step, else 3 if a gate does not hold."""
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
        preexec_fn=_end_with_parent,
    )
    try:
        printed, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return process.returncode, printed


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
