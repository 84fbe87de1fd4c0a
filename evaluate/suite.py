"""`eval`: run a list of measures on a checkpoint, and check gates on their metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectool import methods
from spectool.errors import UnsupportedError, UsageError
from spectool.evaluate.baseline import Baseline, Change
from spectool.evaluate.context import Context, Need
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.results import as_json, read_numbers
from spectool.report import NotMeasured

# What gives each need, for the error where it is missing.
_GIVEN_BY: dict[Need, str] = {
    "windows": "a text",
    "reference": "--reference",
    "source": "--reference CHECKPOINT, from which MODEL was quantized",
    "walkers": "--reference CHECKPOINT with decoder layers like MODEL's",
    "transcoder": "--reference CHECKPOINT, which fits in memory as a whole, as MODEL must",
    "prompts": "--prompts",
    "tasks": "--task",
    "openings": "a model that fits in memory as a whole",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of the measures and of the gates, the setting, and changes from a baseline."""

    measures: list[Measure]
    gates: list[Checked]
    setting: dict[str, object]
    changes: list[Change] | None = None

    def as_json(self) -> dict[str, object]:
        """Return the fields of all measures as one object."""
        fields = {
            key: value for measure in self.measures for key, value in as_json(measure).items()
        }
        changes = {}
        if self.changes is not None:
            changes = {"changes": {each.metric: each.as_json() for each in self.changes}}
        return {**fields, **changes, "gates": as_json(self.gates), "setting": self.setting}


def evaluate(context: Context) -> Evaluation:
    """Run the measures that the options name, or all whose needs they give, and check the gates.

    Raises:
        InputError: checkpoint, text, reference or options are unusable.
    """
    chosen = _choose(context)
    known = [metric for measure in chosen for metric in measure.metrics(context)]
    path, setting = context.options.baseline, context.setting()
    baseline = None if path is None else Baseline(path)
    parsed = parse_gates(context.options.gate, known, has_baseline=baseline is not None)
    if baseline is not None:
        baseline.check(setting)
        for gate in parsed:
            if gate.change and math.isnan(baseline.number(gate.metric)):
                raise UsageError(f"--gate {gate.expression!r}: {path} has no {gate.metric}")
    if context.options.save_reference is not None and "windows" not in context.needs:
        raise UsageError("--save-reference needs a measure of a text, such as perplexity")
    results: list[Measure] = []
    for measure in chosen:
        try:
            results.append(measure.run(context))
        except UnsupportedError as error:
            # An architecture may be scored and yet not decoded.
            metrics = measure.metrics(context)
            if context.options.measure or any(gate.metric in metrics for gate in parsed):
                raise
            context.reporter.event(NotMeasured(measure.__name__.lower(), str(error)))
    numbers = read_numbers(*results)
    checked = [gate.check(numbers, baseline) for gate in parsed]
    changes = None if baseline is None else baseline.changes(numbers, known)
    return Evaluation(results, checked, setting, changes)


def _choose(context: Context) -> list[type[Measure]]:
    """Return the measures that run, with what they need opened.

    Raises:
        UsageError: the options name a measure without what it needs.
    """
    chosen: list[type[Measure]] = []
    for name in dict.fromkeys(context.options.measure) or methods.list_methods("measure"):
        measure: type[Measure] = methods.import_method(name, "measure")
        if not (measure.by_default or context.options.measure):
            continue
        missing = [need for need in measure.needs if getattr(context, need) is None]
        if not missing:
            chosen.append(measure)
            context.needs.update(measure.needs)
        elif context.options.measure:
            raise UsageError(f"--measure {name} needs {_GIVEN_BY[missing[0]]}")
    return chosen
