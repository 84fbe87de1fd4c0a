"""`spectool run RECIPE`: the commands of a recipe as one run that can be continued."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spectool.cli import bench, evaluate, report, tune
from spectool.cli.by_method import Verb
from spectool.cli.common import Output
from spectool.cli.derive import configs_of
from spectool.cli.distill import DISTILL
from spectool.cli.quantize import QUANTIZE
from spectool.cli.train_heads import TRAIN_HEADS
from spectool.errors import UsageError
from spectool.files import replacing
from spectool.options import Config, option
from spectool.report import Reporter

if TYPE_CHECKING:
    from spectool.recipe.execute import Outcome
    from spectool.recipe.plan import Command, VariantPlan

# What each stage of a recipe runs.
BODIES: dict[str, Verb | Callable[..., None]] = {
    "distill": DISTILL,
    "quantize": QUANTIZE,
    "train-heads": TRAIN_HEADS,
    "tune": tune.tune,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "report": report.report,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(Config):
    """The recipe, and where its run is kept."""

    recipe: Path = option(..., "YAML file of the recipe", argument=True)
    override: tuple[str, ...] = option(
        (), "Values in place of the recipe's, as quantize.bits=3; repeatable", argument=True
    )
    out: Path | None = option(
        None,
        "Directory of the run; default: the recipe's name without its ending, here",
        written=True,
    )
    junit: Path | None = option(
        None,
        "File for stages and gates as JUnit XML, written whatever comes of them; until the run "
        "ends it holds an error",
        written=True,
    )
    summary: Path | None = option(
        None, "File for a summary in Markdown, written whatever comes of the run", written=True
    )
    dry_run: bool = option(
        False, "Show the commands, and which of them are done already; write nothing", switch=True
    )


def run(output: Output, options: RunOptions) -> None:
    """Run the stages of a recipe that are not done already: compress, train, measure."""
    from spectool.cli.cards import write_cards
    from spectool.recipe.document import read_recipe
    from spectool.recipe.execute import Execution, exit_code, start_process
    from spectool.recipe.folder import check_folder, locked
    from spectool.recipe.plan import STAGES, make_plan, plan_report

    recipe = read_recipe(options.recipe, options.override, list(STAGES))
    folder = options.out or Path(options.recipe.stem)
    check_folder(folder)
    for path in (options.junit, options.summary):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no directory {path.parent}")
    commands = make_commands()
    page = plan_report(recipe, commands)
    plans = make_plan(recipe, commands)
    _check_gates(plans)
    execution = Execution(folder, plans, page, reporter=_Teller(output))
    if options.dry_run:
        found = execution.foresee()
        _show_dry(output, found)
        output.result({"run": str(folder), "dry_run": True, "variants": _as_json(found)})
        return
    output.resume = "run the same command to continue"
    with locked(folder, plans) as lock:
        # Killed, this run must not leave the reports of an earlier one.
        _write_reports(options, folder.name, {})
        found = execution.run(functools.partial(start_process, lock=lock))
    _write_reports(options, folder.name, found)
    for path in write_cards(found, {plan.variant.name: plan.model for plan in plans}):
        output.say(f"{path / 'README.md'}: the card has the figures")
    code = exit_code(found)
    for line in _closing_lines(found):
        output.show(line)
    output.result({"run": str(folder), "exit_code": code, "variants": _as_json(found)})
    if code:
        raise typer.Exit(code)


def _write_reports(options: RunOptions, name: str, found: Mapping[str, Sequence[Outcome]]) -> None:
    """Write what CI services read; without outcomes, that the run did not end."""
    from spectool.recipe.junit import as_junit
    from spectool.recipe.summary import as_markdown

    reports = {options.junit: as_junit(name, found), options.summary: as_markdown(name, found)}
    for path, content in reports.items():
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_bytes(content)


def make_commands() -> dict[str, Command]:
    """Return the commands of the stages."""
    from spectool.recipe.plan import Command

    return {
        stage: Command(
            methods=body.known() if isinstance(body, Verb) else (),
            shared=functools.partial(_shared, body),
            classes=functools.partial(_all, body),
        )
        for stage, body in BODIES.items()
    }


def _shared(body: Verb | Callable[..., None], method: str | None) -> list[type[Config]]:
    """Return the classes of a command's options but the method's own, which needs torch."""
    command = body
    if isinstance(body, Verb):
        assert method is not None
        command = body.others.get(method, body.run)
    assert not isinstance(command, Verb)
    return [config for name, config in configs_of(command).items() if name != "config"]


def _all(body: Verb | Callable[..., None], method: str | None) -> list[type[Config]]:
    """Return the classes of a command's options, in the order of its arguments."""
    if isinstance(body, Verb):
        assert method is not None
        return list(body.configs(method).values())
    return list(configs_of(body).values())


def _check_gates(plans: Sequence[VariantPlan]) -> None:
    """Raise UsageError for a gate on a metric that no measure has, before hours of work.

    Only lm-evaluation-harness knows what its tasks are called, and which metrics a task has: any
    name passes there, and `eval` checks it.
    """
    from spectool.evaluate.options import EvalOptions

    for plan in plans:
        for config in (config for planned in plan.stages for config in planned.configs):
            if isinstance(config, EvalOptions) and config.gate:
                from spectool import methods
                from spectool.evaluate.gates import parse_gates
                from spectool.evaluate.measures.tasks import METRIC, TASK
                from spectool.evaluate.tasks.load import list_local

                names = config.measure or methods.list_methods("measure")
                measures = [methods.import_method(name, "measure") for name in names]
                tasks = config.task if {*config.task} <= {*list_local()} else (TASK,)
                known = [
                    metric.replace(TASK, task)
                    for measure in measures
                    if measure.by_default or config.measure
                    for metric in measure.metrics()
                    for task in (tasks if TASK in metric else ("",))
                ]
                try:
                    parse_gates(
                        config.gate,
                        known,
                        has_baseline=config.baseline is not None,
                        placeholders=(TASK, METRIC),
                    )
                except UsageError as error:
                    place = plan.variant.sections["eval"]["gate"].place
                    raise UsageError(f"{place}: eval: {error}", hint=error.hint) from None


class _Teller(Reporter):
    """Reporter of a run's stages, as lines on stderr."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def event(self, event: Any) -> None:
        from spectool.recipe.execute import StageStarts

        outcome: Outcome = event.outcome
        named = (
            f"{event.variant}: {outcome.planned.stage}" if event.variant else outcome.planned.stage
        )
        if isinstance(event, StageStarts):
            self._output.say(f"\n[{event.number}/{event.total}] {named}: {outcome.reason}")
            self._output.say(f"$ spectool {shlex.join(outcome.command)}")
        else:
            self._output.say(f"{named}: {_describe(outcome)}")


def _describe(outcome: Outcome) -> str:
    """Say what became of a stage, or will."""
    words = {
        "runs": "runs",
        "done": f"done in {outcome.seconds:.1f} s",
        "cached": "cached",
        "gate": "a gate does not hold",
        "failed": "failed",
        "skipped": "does not run",
    }
    said = words[outcome.state]
    return f"{said}: {outcome.reason}" if outcome.reason and outcome.state != "gate" else said


def _show_dry(output: Output, found: Mapping[str, Sequence[Outcome]]) -> None:
    for variant, outcomes in found.items():
        if variant:
            output.show(f"{variant}:")
        for outcome in outcomes:
            output.show(f"{outcome.planned.stage}: {_describe(outcome)}")
            output.show(f"  spectool {shlex.join(outcome.command)}")


def _closing_lines(found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return a line for each stage, and for each gate."""
    lines = []
    for variant, outcomes in found.items():
        for outcome in outcomes:
            named = f"{variant}: " if variant else ""
            lines.append(f"{named}{outcome.planned.stage}: {_describe(outcome)}")
            for gate in outcome.gates:
                word = "holds" if gate["holds"] else "does not hold"
                value = "nan" if gate["value"] is None else f"{gate['value']:.4g}"
                lines.append(f"{named}gate {gate['expression']}: {word} ({value})")
    return lines


def _as_json(found: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    return [
        {
            "name": variant,
            "stages": [
                {
                    "stage": outcome.planned.stage,
                    "state": outcome.state,
                    "reason": outcome.reason,
                    "exit_code": outcome.code,
                    "seconds": outcome.seconds,
                    "command": ["spectool", *outcome.command],
                    "gates": outcome.gates,
                }
                for outcome in outcomes
            ],
        }
        for variant, outcomes in found.items()
    ]
