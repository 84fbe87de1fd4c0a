"""`spectool train-heads METHOD MODEL OUT`: train draft heads for a checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectool import methods
from spectool.cli.by_method import Verb
from spectool.cli.common import (
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    Model,
    NoChecksums,
    Output,
    Revision,
    Runtime,
    Seed,
    TemplateArg,
    Threads,
    TrustRemoteCode,
    is_other_process,
    prepare_torch,
    session,
    size,
    template_arguments,
)
from spectool.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from spectool.distill.plan import Job, Plan
    from spectool.distill.train_heads import Report


def train_heads(
    method: str,
    options: dict[str, Any],
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="Directory to write the draft heads to; must not exist")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; repeatable"
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            help="Draft heads to start from, a directory or a hub id, in spectool's, vLLM's "
            "Medusa, EAGLE-3 or speculators format",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps; 0: write untrained heads")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training text, instead of --steps; default: 1"),
    ] = None,
    regenerate: Annotated[
        bool,
        typer.Option(
            "--regenerate",
            help="Train on answers that MODEL generates in place of those in the data",
        ),
    ] = False,
    regenerate_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible server that generates the answers to train on: "
            "http://HOST:PORT/v1"
        ),
    ] = None,
    regenerate_model: Annotated[
        str | None,
        typer.Option(
            help="Model name on the --regenerate-url server; required if it serves several"
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Sampling temperature for --regenerate and --regenerate-url"),
    ] = 0.8,
    seq_len: Annotated[
        int, typer.Option(min=32, help="Maximum tokens per training sequence")
    ] = 1024,
    batch_tokens: Annotated[
        int, typer.Option(min=32, help="Maximum tokens per step, padding included")
    ] = 4096,
    sequence_packing: Annotated[
        bool,
        typer.Option(
            "--sequence-packing",
            help="Pack several texts into each sequence, masked from each other",
        ),
    ] = False,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak learning rate; default: set by the method")
    ] = None,
    warmup: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the steps with a rising learning rate"),
    ] = 0.05,
    features: Annotated[
        str,
        typer.Option(
            help="Hidden states of MODEL that the heads read: computed at every step (online), "
            "computed once and stored for this run (hybrid), or stored in a directory for later "
            "runs too (offline:DIR)"
        ),
    ] = "online",
    optimizer: Annotated[
        str,
        typer.Option(
            help="Optimizer: adamw, or adamw8bit with its moments in 8 bits (bitsandbytes)"
        ),
    ] = "adamw",
    autocast: Annotated[
        str | None,
        typer.Option(
            help="Dtype the heads compute in, bfloat16; default: float32, as their weights"
        ),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of texts held out for evaluation, at most a fifth"
        ),
    ] = 32,
    metrics: Annotated[
        Path | None,
        typer.Option(help="File for losses, learning rates and times, one JSON line per step"),
    ] = None,
    field: Field = None,
    template_arg: TemplateArg = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete")
    ] = False,
    dtype: Dtype = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train draft heads for MODEL and write them to the directory OUT."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(session(json_wanted=json_output, debug=debug))
        output.quiet = is_other_process()
        if not data:
            raise UsageError("no data", hint="--data FILE, with text like that to be generated")
        if steps is not None and epochs is not None:
            raise UsageError("--steps and --epochs exclude each other")
        prepare_torch(threads)
        from spectool.checkpoint.artifact import check_target
        from spectool.checkpoint.dtypes import parse_dtype
        from spectool.checkpoint.tensors import open_checkpoint
        from spectool.distill import train_heads as training
        from spectool.distill.plan import Job
        from spectool.distill.processes import connect

        check_target(out, overwrite=overwrite)
        config = methods.resolve(method, "drafter").Heads.Config.from_dict(options)
        job = Job(
            method=method,
            config=config,
            data=data,
            init_from=init_from,
            steps=steps,
            epochs=epochs or 1,
            seq_len=seq_len,
            batch_tokens=batch_tokens,
            sequence_packing=sequence_packing,
            learning_rate=learning_rate,
            warmup=warmup,
            features=features,
            optimizer=optimizer,
            autocast=autocast,
            held_out=held_out,
            regenerate=regenerate or regenerate_url is not None,
            regenerate_url=regenerate_url,
            regenerate_model=regenerate_model,
            temperature=temperature,
            text_field=field,
            template=template_arguments(template_arg),
            seed=seed,
        )

        output.show_plan = lambda plan: _show_plan(output, job, plan)
        processes = stack.enter_context(connect(device))
        with processes.together():
            checkpoint = open_checkpoint(
                model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                checksums=not no_checksums,
            )
        try:
            report = training.train_heads(
                checkpoint,
                out,
                job,
                dtype=parse_dtype(dtype),
                device=device,
                runtime=runtime,
                overwrite=overwrite,
                metrics=metrics,
                processes=processes,
                reporter=output,
            )
        except KeyboardInterrupt:
            again = "run the same command to resume from the last stored state"
            raise Interrupted("interrupted", hint=again) from None
        _finish(output, out, report)


def _show_plan(output: Output, job: Job, plan: Plan) -> None:
    options = ", ".join(f"{key}={value}" for key, value in job.config.as_dict().items())
    output.say(
        f"plan: {job.method} ({options}), {plan.parameters / 1e6:.2f} M parameters, "
        f"{size(plan.file_bytes)} on disk, memory at least {size(plan.memory_bytes)}"
    )
    output.say(
        f"plan: {plan.steps} steps of at most {job.batch_tokens} tokens on {plan.samples} texts "
        f"({plan.loss_tokens} tokens in the loss); {plan.held_out} texts held out"
    )
    if plan.seq_len < job.seq_len:
        output.say(
            f"plan: texts of at most {plan.seq_len} tokens, the model's context; --seq-len "
            f"{job.seq_len} is cut"
        )
    if plan.disk_bytes:
        where = job.store or "OUT.partial"
        output.say(f"plan: features stored in {where}, {size(plan.disk_bytes)}")
    if job.regenerate:
        writer = f"the server at {job.regenerate_url}" if job.regenerate_url else "the model"
        output.say(f"plan: {writer} generates the answers first, temperature {job.temperature}")


def _finish(output: Output, out: Path, report: Report) -> None:
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
        }
    )


def _percentages(shares: list[float]) -> str:
    return " ".join(f"{share:.1%}" for share in shares)


TRAIN_HEADS = Verb(
    name="train-heads",
    help="Train draft heads",
    kind="drafter",
    known=methods.trained,
    config=lambda drafter: drafter.Heads.Config,
    run=train_heads,
    panels={
        "Data": (
            "data", "field", "template_arg", "seq_len", "held_out", "regenerate",
            "regenerate_url", "regenerate_model", "temperature",
        ),
        "Training": (
            "init_from", "steps", "epochs", "batch_tokens", "sequence_packing", "features",
            "learning_rate",
            "warmup", "optimizer", "autocast", "seed",
        ),
        "Model": ("dtype", "runtime", "no_checksums", "revision", "trust_remote_code"),
        "Resources": ("device", "threads"),
        "Output": ("metrics", "overwrite", "json_output", "debug"),
    },
)  # fmt: skip
