"""`spectool train-heads METHOD MODEL OUT`: train draft heads for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spectool import methods
from spectool.cli.by_method import Verb
from spectool.cli.common import Output, describe_method, prepare_torch
from spectool.distill.options import AcceptanceOptions, HeadsOptions, JudgeOptions
from spectool.errors import UsageError
from spectool.files import size
from spectool.options import Config, option
from spectool.shared_options import LoadOptions, WriteOptions

if TYPE_CHECKING:
    from spectool.distill.plan import HeadsJob, HeadsPlan
    from spectool.distill.train_acceptance import AcceptanceJob, AcceptancePlan, AcceptanceReport
    from spectool.distill.train_heads import HeadsReport
    from spectool.distill.train_judge import JudgeJob, JudgePlan, JudgeReport
    from spectool.distill.train_weights import WeightsJob, WeightsPlan
    from spectool.distill.training_data import DataPreparation
    from spectool.evaluate.intervals import Interval

RESUME = "run the same command to resume from the last stored state"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsOutput(WriteOptions):
    """Options of what `train-heads` writes."""

    PANEL: ClassVar = "Output"

    metrics: Path | None = option(
        None, "File for losses, learning rates and times, one JSON line per step", written=True
    )
    plot: Path | None = option(
        None,
        "Picture of what --metrics holds, drawn at the end: a .png or .svg file",
        written=True,
    )

    def validate(self) -> None:
        """Check that there is something to draw."""
        if self.plot is not None and self.metrics is None:
            raise UsageError("--plot draws what --metrics holds", hint="--metrics FILE.jsonl")

    def check_plot(self) -> None:
        """Check, before the long run, that the picture can be drawn."""
        if self.plot is not None:
            from spectool.picture import check_picture

            check_picture(self.plot)

    def draw(self, output: Output) -> None:
        """Draw the picture that was asked for."""
        if self.plot is not None and self.metrics is not None:
            from spectool.distill.curve import draw_curve

            draw_curve(self.metrics, self.plot)
            output.say(f"picture: {self.plot}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsTraining(HeadsOutput):
    """Options of what a training of draft heads writes, or would."""

    PANEL: ClassVar = "Output"

    dry_run: bool = option(
        False,
        "Show the plan and, from --trained, the acceptance to expect; write nothing",
        switch=True,
    )
    trained: tuple[str, ...] = option(
        (),
        "Finished draft heads of MODEL, or a folder of them, that --dry-run predicts from; "
        "repeatable",
    )

    def validate(self) -> None:
        """Check what involves more than one option."""
        HeadsOutput.validate(self)
        if self.trained and not self.dry_run:
            raise UsageError("--trained is what --dry-run predicts from", hint="--dry-run")


def train_heads(
    output: Output,
    method: str,
    config: Config,
    options: HeadsOptions,
    load: LoadOptions,
    write: HeadsTraining,
) -> None:
    """Train draft heads for MODEL and write them to the directory OUT."""
    prepare_torch(load.threads)
    from spectool.checkpoint.artifact import check_target
    from spectool.checkpoint.dtypes import parse_dtype
    from spectool.distill import train_heads as training
    from spectool.distill.plan import HeadsJob
    from spectool.distill.processes import connect

    check_target(write.out, overwrite=write.overwrite)
    write.check_plot()
    job = HeadsJob(method=method, config=config, **options.as_dict())
    output.show_plan = lambda plan: _show_plan(output, job, plan)
    device = load.resolve_device()
    if write.dry_run:
        prepared = training.prepare_heads(
            load.open(),
            write.out,
            job,
            dtype=parse_dtype(load.dtype),
            device=device,
            runtime=load.runtime,
            activations=load.activations,
            overwrite=write.overwrite,
            reporter=output,
        )
        _finish_dry_run(output, write, prepared)
        return
    output.resume = RESUME
    with connect(device) as processes:
        with processes.together():
            checkpoint = load.open()
        report = training.train_heads(
            checkpoint,
            write.out,
            job,
            dtype=parse_dtype(load.dtype),
            device=device,
            runtime=load.runtime,
            activations=load.activations,
            overwrite=write.overwrite,
            metrics=write.metrics,
            processes=processes,
            reporter=output,
        )
        if processes.first:
            write.draw(output)
        _finish(output, write.out, report)


def _finish_dry_run(output: Output, write: HeadsTraining, prepared: DataPreparation) -> None:
    """Print what the planned training can be expected to reach."""
    from spectool.evaluate.forecast import forecast, read_finished
    from spectool.evaluate.results import as_json

    job, plan = prepared.job, prepared.plan
    options = job.config.as_dict()
    finished = read_finished(list(map(Path, write.trained)), job.method, options, prepared.identity)
    found = forecast(finished, plan.tokens)
    if found.tokens_per_forward is None or found.accuracy is None:
        output.show(f"expected acceptance: not known; {found.reason}")
        if not finished:
            output.say(
                "hint: finish a few short trainings, with three or more values of --steps, and "
                "give their heads by --trained"
            )
    else:
        reach = found.tokens / found.largest
        output.show(
            f"expected: {_between(found.tokens_per_forward)} tokens per forward with the default "
            f"tree, first guess right {_between(found.accuracy, percent=True)}"
        )
        output.show(
            f"from {found.trainings} finished trainings; this one reads {reach:.1f} times the "
            "tokens of the largest"
        )
    if job.regenerate:
        output.show("the texts to be generated may be shorter or longer than those given")
    output.result(
        {
            "dry_run": True,
            "method": job.method,
            "parameters": plan.parameters,
            "steps": plan.steps,
            "memory_bytes": plan.memory_bytes,
            "disk_bytes": plan.disk_bytes,
            "forecast": as_json(found),
        }
    )


def _between(figure: Interval, *, percent: bool = False) -> str:
    value, lower, upper = (
        f"{each:.1%}" if percent else f"{each:.2f}"
        for each in (figure.value, figure.lower, figure.upper)
    )
    return f"{value} ({lower} to {upper})"


def _show_plan(output: Output, job: HeadsJob, plan: HeadsPlan) -> None:
    output.say(
        f"plan: {describe_method(job.method, job.config)}, {plan.parameters / 1e6:.2f} M "
        f"parameters, {size(plan.file_bytes)} on disk, memory at least {size(plan.memory_bytes)}"
    )
    say_texts(output, job, plan)
    if plan.disk_bytes:
        where = job.store or "OUT.partial"
        output.say(f"plan: features stored in {where}, {size(plan.disk_bytes)}")
    if job.regenerate:
        writer = f"the server at {job.regenerate_url}" if job.regenerate_url else "the model"
        output.say(f"plan: {writer} generates the answers first, temperature {job.temperature}")


def say_texts(
    output: Output,
    job: HeadsJob | AcceptanceJob | WeightsJob,
    plan: HeadsPlan | AcceptancePlan | WeightsPlan,
) -> None:
    """Print how many texts a training reads, and whether they are cut."""
    output.say(
        f"plan: {plan.steps} steps of at most {job.batch_tokens} tokens on {plan.samples} texts "
        f"({plan.loss_tokens} tokens in the loss); {plan.held_out} texts held out"
    )
    if plan.seq_len < job.seq_len:
        output.say(
            f"plan: texts of at most {plan.seq_len} tokens, the model's context; --seq-len "
            f"{job.seq_len} is cut"
        )


def _finish(output: Output, out: Path, report: HeadsReport) -> None:
    record = report.record
    output.show(
        f"{out}: {report.parameters / 1e6:.2f} M parameters, held-out accuracy by head "
        f"{_percentages(record.accuracy)}; given that earlier heads were right "
        f"{_percentages(record.conditional)}"
    )
    output.show(
        f"about {report.tokens_per_forward:.2f} tokens per forward with a tree of {report.nodes} "
        f"nodes, {report.depth} deep; before training {report.initial['score']:.2f}"
    )
    output.show(f"{report.steps} steps, {report.seconds:.1f} s")
    output.result(
        {
            "out": str(out),
            "method": record.method,
            "parameters": report.parameters,
            "steps": report.steps,
            "seconds": report.seconds,
            "accuracy": record.accuracy,
            "conditional": record.conditional,
            "tokens_per_forward_estimate": report.tokens_per_forward,
            "untrained_estimate": report.initial["score"],
            "tree": {"nodes": report.nodes, "depth": report.depth},
        },
        measured=True,
    )


def _percentages(shares: list[float]) -> str:
    return " ".join(f"{share:.1%}" for share in shares)


def train_acceptance(
    output: Output,
    method: str,
    config: Config,
    options: AcceptanceOptions,
    load: LoadOptions,
    write: HeadsOutput,
) -> None:
    """Train an acceptance head for a draft model of MODEL and write it to the directory OUT."""
    prepare_torch(load.threads)
    from spectool.distill import train_acceptance as training

    job = training.AcceptanceJob(config=config, **options.as_dict())  # type: ignore[arg-type]
    output.show_plan = lambda plan: _show_acceptance_plan(output, job, plan)
    report = _train_alone(training.train_acceptance, output, job, load, write)
    _finish_acceptance(output, write.out, job, report)


def _train_alone(
    train: Callable[..., Any], output: Output, job: Any, load: LoadOptions, write: HeadsOutput
) -> Any:
    """Train a head for a pair of models in this process; return the report."""
    from spectool.checkpoint.dtypes import parse_dtype

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("this head is trained by one process", hint="start it without torchrun")
    write.check_plot()
    output.resume = RESUME
    report = train(
        load.open(),
        write.out,
        job,
        dtype=parse_dtype(load.dtype),
        device=load.resolve_device(),
        runtime=load.runtime,
        activations=load.activations,
        overwrite=write.overwrite,
        metrics=write.metrics,
        reporter=output,
    )
    write.draw(output)
    return report


def _show_acceptance_plan(output: Output, job: AcceptanceJob, plan: AcceptancePlan) -> None:
    output.say(
        f"plan: {describe_method('acceptance', job.config)}, {plan.parameters / 1e6:.2f} M "
        f"parameters, {size(plan.file_bytes)} on disk, memory at least {size(plan.memory_bytes)}"
    )
    say_texts(output, job, plan)
    if job.regenerate:
        output.say(f"plan: the model generates the texts first, temperature {job.temperature}")


def _finish_acceptance(
    output: Output, out: Path, job: AcceptanceJob, report: AcceptanceReport
) -> None:
    """Print how well the head that was written is calibrated."""
    best = report.best
    output.show(f"{out}: {report.parameters / 1e6:.2f} M parameters; acceptance on held-out chains")
    for line in calibration_lines(best):
        output.show(line)
    output.show(f"{report.steps} steps, {report.seconds:.1f} s")
    output.show(f"decode with --draft {job.draft_model}:acceptance={out},depth=16")
    output.result(
        {
            "out": str(out),
            "method": report.record.method,
            "parameters": report.parameters,
            "steps": report.steps,
            "seconds": report.seconds,
            "initial": report.initial,
            "best": best,
        },
        measured=True,
    )


def calibration_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of predicted and seen acceptance by bins of the prediction."""
    yield "  predicted    seen  tokens"
    for row in (*metrics["calibration"], {**metrics, "tokens": "all"}):
        yield f"  {row['predicted']:>9.1%} {row['seen']:>7.1%} {row['tokens']:>7}"
    yield f"  mean distance {metrics['calibration_error']:.1%}"


def train_judge(
    output: Output,
    method: str,
    config: Config,
    options: JudgeOptions,
    load: LoadOptions,
    write: HeadsOutput,
) -> None:
    """Train a judge head for a draft model of MODEL and write it to the directory OUT."""
    prepare_torch(load.threads)
    from spectool.distill import train_judge as training

    job = training.JudgeJob(config=config, **options.as_dict())  # type: ignore[arg-type]
    output.show_plan = lambda plan: _show_judge_plan(output, job, plan)
    report = _train_alone(training.train_judge, output, job, load, write)
    _finish_judge(output, write.out, job, report)


def _show_judge_plan(output: Output, job: JudgeJob, plan: JudgePlan) -> None:
    output.say(
        f"plan: {describe_method('judge', job.config)}, {plan.parameters} parameters, "
        f"{size(plan.file_bytes)} on disk, memory at least {size(plan.memory_bytes)}"
    )
    output.say(
        f"plan: MODEL answers {plan.prompts} prompts and {plan.held_out} held-out ones in at most "
        f"{job.max_new_tokens} tokens, and again after each token that the draft model would change"
    )


def _finish_judge(output: Output, out: Path, job: JudgeJob, report: JudgeReport) -> None:
    """Print the curve of the head that was written, and how the pair decodes with it."""
    output.show(
        f"{out}: {report.parameters} parameters; what the judge accepts on held-out prompts"
    )
    for line in judge_lines(report.found):
        output.show(line)
    output.show(f"{report.seconds:.1f} s")
    output.show(f"decode with --draft {job.draft_model}:judge={out},depth=8 --lossy")
    output.result(
        {
            "out": str(out),
            "method": report.record.method,
            "lossless": False,
            "parameters": report.parameters,
            "seconds": report.seconds,
            **report.found,
        },
        measured=True,
    )


def judge_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield tables of thresholds and of decoded held-out prompts, accuracy first."""
    yield "  important caught  unimportant accepted  threshold"
    # Several shares to catch may have one threshold.
    for row in {each["threshold"]: each for each in found["curve"]}.values():
        mark = "  <- used" if row["threshold"] == found["threshold"] else ""
        yield (f"  {row['recall']:>16.1%} {row['accepted']:>21.1%} {row['threshold']:>10.4f}{mark}")
    yield "  decoding  accuracy  accepted of a chain  tokens per forward"
    for name, row in found["held_out_prompts"].items():
        yield (
            f"  {name:<8} {row['accuracy']:>9.1%} {row['accepted_length']:>20.2f} "
            f"{row['tokens_per_forward']:>19.2f}"
        )


TRAIN_HEADS = Verb(
    name="train-heads",
    help="Train draft heads",
    kind="drafter",
    known=lambda: [*methods.list_trainable(), *methods.list_methods("head")],
    config=lambda method: getattr(method, "Heads", method).Config,
    run=train_heads,
    others={"acceptance": train_acceptance, "judge": train_judge},
)
