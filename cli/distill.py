"""`spectool distill METHOD MODEL OUT`: train the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spectool import methods
from spectool.cli.by_method import Verb
from spectool.cli.common import Output, describe_method, prepare_torch
from spectool.cli.quantize import QuantizeOutput
from spectool.cli.train_heads import RESUME, HeadsOutput, say_texts
from spectool.distill.options import WeightsOptions
from spectool.files import size
from spectool.options import Config, same_option
from spectool.shared_options import PlaceOptions

if TYPE_CHECKING:
    from spectool.distill.train_weights import WeightsPlan, WeightsReport


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsOutput(HeadsOutput):
    """Options of what `distill` writes."""

    PANEL: ClassVar = "Output"

    dry_run: bool = same_option(QuantizeOutput, "dry_run")


def distill(
    output: Output,
    method: str,
    config: Config,
    options: WeightsOptions,
    place: PlaceOptions,
    write: WeightsOutput,
) -> None:
    """Train the weights of MODEL and write them to the directory OUT, in the form of MODEL."""
    prepare_torch(place.threads)
    from spectool.distill.processes import connect
    from spectool.distill.train_weights import WeightsJob, train_weights

    job = WeightsJob(method=method, config=config, **options.as_dict())
    output.show_plan = lambda plan: _show_plan(output, plan, dry_run=write.dry_run)
    output.resume = RESUME
    write.check_plot()
    device = place.resolve_device()
    with connect(device) as processes:
        with processes.together():
            checkpoint = place.open()
        report = train_weights(
            checkpoint,
            write.out,
            job,
            device=device,
            overwrite=write.overwrite,
            dry_run=write.dry_run,
            metrics=write.metrics,
            processes=processes,
            reporter=output,
        )
        if report is not None and processes.first:
            write.draw(output)
    if report is not None:
        _finish(output, write.out, report)


def _finish(output: Output, out: Path, report: WeightsReport) -> None:
    """Print what the weights that were written are worth."""
    for key in (key for key in report.best if key not in ("step", "score")):
        name = key.replace("_", " ")
        output.show(f"held-out {name}: {report.initial[key]:.4f} to {report.best[key]:.4f}")
    output.show(f"{out}: best after {report.best['step']} of {report.steps} steps")
    if not report.best["step"]:
        output.show("no trained weights were better: the output has those of the beginning")
    if report.is_draft:
        output.show(f"decode MODEL with --draft {out}:exits=auto: the text is MODEL's own")
    elif report.draft is not None and report.best["step"]:
        output.show(
            f"decode with --draft {report.draft}: the text is that of {out} without a "
            "drafter, and not that of MODEL"
        )
    output.result(
        {
            "out": str(out),
            **_plan_record(report.plan),
            "steps": report.steps,
            "draft": report.draft,
            "seconds": report.seconds,
            "initial": report.initial,
            "best": report.best,
        },
        measured=True,
    )


def _show_plan(output: Output, plan: WeightsPlan, *, dry_run: bool) -> None:
    """Print the plan; in a dry run it is the result."""
    job = plan.job
    output.say(
        f"plan: {describe_method(job.method, job.config)}, {plan.trained / 1e6:.2f} M parameters "
        f"train {plan.changed_tensors} tensors with {plan.changed_weights / 1e6:.2f} M of "
        f"{plan.parameters / 1e6:.2f} M weights, memory at least {size(plan.memory_bytes)}, disk "
        f"{size(plan.disk_bytes)}"
    )
    say_texts(output, job, plan)
    if plan.generated_tokens:
        output.say(
            f"plan: the model first generates up to {plan.generated_tokens} tokens to train on, so "
            "the number of steps is an estimate"
        )
    if dry_run:
        sizes = {"memory_bytes": plan.memory_bytes, "disk_bytes": plan.disk_bytes}
        output.result({"dry_run": True, **_plan_record(plan), **sizes})


def _plan_record(plan: WeightsPlan) -> dict[str, Any]:
    return {
        "method": plan.job.method,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "steps": plan.steps,
    }


DISTILL = Verb(
    name="distill",
    help="Train weights",
    kind="objective",
    known=lambda: methods.list_methods("objective"),
    config=lambda objective: objective.Config,
    run=distill,
)
