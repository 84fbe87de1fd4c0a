"""`eval`: run a list of measures on a checkpoint, and check gates on their metrics."""

from __future__ import annotations

from dataclasses import dataclass

from spectool import methods
from spectool.errors import UsageError
from spectool.evaluate.context import Context, Need
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.results import as_json

# What gives each need, for the error where it is missing.
_GIVEN_BY: dict[Need, str] = {
    "windows": "a text",
    "reference": "--reference",
    "source": "--reference CHECKPOINT, from which MODEL was quantized",
    "walkers": "--reference CHECKPOINT with decoder layers like MODEL's",
    "prompts": "--prompts",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of the measures, and of the gates."""

    measures: list[Measure]
    gates: list[Checked]

    def as_json(self) -> dict[str, object]:
        """Return the fields of all measures as one object."""
        fields = {
            key: value for measure in self.measures for key, value in as_json(measure).items()
        }
        return {**fields, "gates": as_json(self.gates)}


def evaluate(context: Context) -> Evaluation:
    """Run the measures that the options name, or all whose needs they give, and check the gates.

    Raises:
        InputError: checkpoint, text, reference or options are unusable.
    """
    chosen = _choose(context)
    known = [metric for measure in chosen for metric in measure.metrics()]
    parsed = parse_gates(context.options.gate, known)
    if context.options.save_reference is not None and "windows" not in context.needs:
        raise UsageError("--save-reference needs a measure of a text, such as perplexity")
    results = [measure.run(context) for measure in chosen]
    return Evaluation(results, [gate.check(results) for gate in parsed])


def _choose(context: Context) -> list[type[Measure]]:
    """Return the measures that run, with what they need opened.

    Raises:
        UsageError: the options name a measure without what it needs.
    """
    chosen: list[type[Measure]] = []
    for name in dict.fromkeys(context.options.measure) or methods.list_methods("measure"):
        measure: type[Measure] = methods.import_method(name, "measure")
        missing = [need for need in measure.needs if getattr(context, need) is None]
        if not missing:
            chosen.append(measure)
            context.needs.update(measure.needs)
        elif context.options.measure:
            raise UsageError(f"--measure {name} needs {_GIVEN_BY[missing[0]]}")
    return chosen
