"""`spectool quantize METHOD MODEL OUT`: a subcommand per method, options from its `Config`."""

from __future__ import annotations

import functools
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectool import methods
from spectool.cli.by_method import Verb
from spectool.cli.common import (
    Debug,
    Device,
    Field,
    Json,
    Model,
    Output,
    Revision,
    Seed,
    TemplateArg,
    Threads,
    TrustRemoteCode,
    prepare_torch,
    session,
    size,
    template_arguments,
)
from spectool.cli.events import unused_line
from spectool.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from spectool.model.architecture import Architecture
    from spectool.quantize.auto import Picked
    from spectool.quantize.base import FitReport, Quantizer
    from spectool.quantize.job import QuantizeJob
    from spectool.quantize.plan import QuantizePlan
    from spectool.quantize.report import QuantizeReport


# --embeddings is suggested when the linears take fewer bits per weight than this and the embedding
# and lm_head make up more than this share of the file.
SUGGEST_BELOW_BITS = 3.0
SUGGEST_ABOVE_SHARE = 0.2


def quantize(
    method: str,
    options: dict[str, Any],
    invocation: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; "
            "repeatable; data-free methods use it to measure output errors"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration sequences")] = 128,
    seq_len: Annotated[
        int, typer.Option(min=2, help="Maximum tokens per calibration sequence")
    ] = 2048,
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train low-rank updates of the quantized model on, which are merged into "
            "the weights before the final quantization; repeatable; needs memory for the whole "
            "model"
        ),
    ] = None,
    preprocess_steps: Annotated[
        int, typer.Option(min=1, help="Training steps for --preprocess")
    ] = 1000,
    preprocess_rank: Annotated[
        int, typer.Option(min=1, help="Rank of the low-rank updates for --preprocess")
    ] = 64,
    preprocess_rate: Annotated[
        float, typer.Option(min=0.0, help="Peak learning rate for --preprocess")
    ] = 1e-4,
    field: Field = None,
    template_arg: TemplateArg = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave linears with this name or glob dense; repeatable"),
    ] = None,
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense", help="Quantize even if over 10% of the block weights stay dense"
        ),
    ] = False,
    rules: Annotated[
        Path | None,
        typer.Option(help="YAML file that sets another method, or dense, for some linears"),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Quantize the embedding and lm_head too, with a data-free method such as int8: "
            "METHOD[:key=value,...]"
        ),
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(
            help="Fit a quantized lm_head on the calibration text (research): vq[:key=value,...]"
        ),
    ] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Choose each linear's bits by measured errors, with this average of stored bits "
            "per weight as the maximum",
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidate for --bits-budget: METHOD[:key=value,...]; repeatable; default: the "
            "method at each of its --bits"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan from the file headers; write nothing")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of calibration sequences run together")
    ] = 4,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the calibration passes: float32, bfloat16 or float16")
    ] = "float32",
    device: Device = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize MODEL and write the result to the directory OUT."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(threads)
        from spectool.checkpoint.artifact import check_target
        from spectool.checkpoint.dense import check_dense
        from spectool.checkpoint.dtypes import parse_dtype
        from spectool.checkpoint.tensors import open_checkpoint
        from spectool.model.architecture import Architecture
        from spectool.model.loading import check_device
        from spectool.quantize import auto, run
        from spectool.quantize.base import parse_quantizer
        from spectool.quantize.budget import widths
        from spectool.quantize.job import Budget, QuantizeJob
        from spectool.quantize.preprocess import Preprocess
        from spectool.quantize.rules import read_rules, skipping

        opened = functools.partial(
            open_checkpoint, model, revision=revision, trust_remote_code=trust_remote_code
        )
        if candidate and bits_budget is None:
            raise UsageError("--candidate: only with --bits-budget, which is not given")
        if not preprocess:
            for name in ("preprocess_steps", "preprocess_rank", "preprocess_rate"):
                if _is_given(invocation, name):
                    option = name.replace("_", "-")
                    raise UsageError(f"--{option}: only with --preprocess, which is not given")
        rule_list = read_rules(rules) if rules else []
        embedding_method = parse_quantizer(embeddings) if embeddings else None
        lm_head_method = parse_quantizer(lm_head) if lm_head else None
        budget = None
        if method in methods.names("chooser"):
            if bits_budget is not None:
                raise UsageError("auto: --bits takes a fraction; leave --bits-budget out")
            headers = opened(headers_only=True)
            check_dense(headers)
            picked = auto.pick(
                Architecture(headers),
                auto.Auto.Config.from_dict(options),
                rules=[*skipping(skip or ()), *rule_list],
                embeddings=embedding_method,
                lm_head=lm_head_method,
                allow_dense=allow_dense,
            )
            quantizer, embedding_method, budget = picked.quantizer, picked.embeddings, picked.budget
            output.say(f"auto: {picked.why}")
            output.say(f"auto: the same by hand: {_explicit_command(picked, options, invocation)}")
        else:
            kind: type[Quantizer] = methods.resolve(method, "quantizer")
            quantizer = kind(kind.Config.from_dict(options))
            if bits_budget is not None:
                given = tuple(map(parse_quantizer, candidate or ()))
                budget = Budget(bits_budget, given or widths(quantizer, bits_budget))
        if dry_run and budget is not None:
            raise UsageError(
                f"--dry-run reads headers only, but a budget of {budget.bits:g} bits needs "
                "measured errors"
            )
        job = QuantizeJob(
            method=quantizer.name,
            config=quantizer.config,
            rules=rule_list,
            embeddings=embedding_method,
            lm_head=lm_head_method,
            budget=budget,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            text_field=field,
            template=template_arguments(template_arg),
            skip=skip or (),
            allow_dense=allow_dense,
            seed=seed,
            preprocess=Preprocess(
                text=preprocess,
                steps=preprocess_steps,
                rank=preprocess_rank,
                rate=preprocess_rate,
            )
            if preprocess
            else None,
        )
        check_device(device)
        if dry_run:
            headers = opened(headers_only=True)
            planned = run.prepare(headers, job, device=device, batch_size=batch_size)
            show_plan(output, planned, job)
            result = {"dry_run": True, "method": quantizer.name, **_plan_record(planned)}
            output.result({**result, "unused": planned.architecture.unused})
            return
        check_target(out, overwrite=overwrite)
        output.show_plan = lambda plan: show_plan(output, plan, job)
        compute = parse_dtype(dtype)
        assert compute is not None
        try:
            report = run.quantize(
                opened(),
                out,
                job,
                device=device,
                dtype=compute,
                batch_size=batch_size,
                overwrite=overwrite,
                reporter=output,
            )
        except KeyboardInterrupt:
            again = "run the same command to resume after the last finished block"
            raise Interrupted("interrupted", hint=again) from None
        finish(output, quantizer.name, out, report)


def _explicit_command(picked: Picked, options: dict[str, Any], invocation: typer.Context) -> str:
    """Return the command that does without `auto`, with all other options as given."""
    words = ["spectool", "quantize", picked.quantizer.name]
    words += [str(invocation.params[name]) for name in ("model", "out")]
    if picked.budget is not None:
        words += ["--bits-budget", f"{picked.budget.bits:g}"]
    pairs = str(picked.quantizer).partition(":")[2]
    for pair in filter(None, pairs.split(",")):
        key, _, value = pair.partition("=")
        words += [f"--{key.replace('_', '-')}", value]
    if picked.embeddings is not None:
        words += ["--embeddings", str(picked.embeddings)]
    for parameter in invocation.command.params:
        name = parameter.name or ""
        if not _is_given(invocation, name) or name in (*options, "model", "out", "embeddings"):
            continue
        given = invocation.params[name]
        for value in given if isinstance(given, list) else [given]:
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join(words)


def _is_given(invocation: typer.Context, name: str) -> bool:
    source = invocation.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def show_plan(output: Output, plan: QuantizePlan, job: QuantizeJob) -> None:
    """Print the plan before the run starts."""
    architecture = plan.architecture
    by_method: dict[Any, int] = {}
    for block in plan.matrices.values():
        for name in block:
            quantizer = plan.quantizers[name]
            by_method[quantizer] = by_method.get(quantizer, 0) + 1
    num_matrices = sum(by_method.values())
    counts = [
        f"{_describe(quantizer)}{f' on {count}' if len(by_method) > 1 else ''}"
        for quantizer, count in sorted(by_method.items(), key=lambda item: -item[1])
    ]
    output.say(
        f"plan: {', '.join(counts)}{' of' if len(counts) > 1 else ' on'} {num_matrices} linears in "
        f"{len(plan.matrices)} blocks of {architecture.config.model_type}, "
        f"{plan.num_weights / 1e6:.2f} M of {plan.num_parameters / 1e6:.2f} M parameters"
    )
    for name, matrix in plan.outside.items():
        also = f" and {matrix.tied}, which share it" if matrix.tied else ""
        output.say(f"plan: {_describe(plan.quantizers[name])} on {name}{also}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        output.say(f"plan: {len(names)} left dense ({reason}): {names[0]}, ...")
    if architecture.unused:
        name = type(architecture.model).__name__
        output.say(f"plan: {unused_line(architecture.unused, name)}; they are not written to OUT")
    output.say(f"plan: everything{' else' if plan.outside else ''} outside the blocks is copied")
    share = plan.outside_bytes / plan.file_bytes
    is_large = plan.bits_linears < SUGGEST_BELOW_BITS and share > SUGGEST_ABOVE_SHARE
    if not plan.outside and is_large:
        output.say(
            f"plan: embedding and lm_head will be {share:.0%} of the file; "
            "--embeddings int8 quantizes them too"
        )
    _show_calibration(output, architecture, job)
    buffers = plan.num_buffers * plan.buffer_bytes
    calibrated = f", activations {size(buffers)}" if buffers else ""
    device = f", device {size(plan.device_bytes)}" if plan.device_bytes else ""
    output.say(
        f"plan: disk {size(plan.file_bytes)}, memory at most {size(plan.host_bytes)}"
        f"{calibrated}{device}"
    )
    output.say(
        f"plan: expected bits per weight: {plan.bits_linears:.3f} of the linears, "
        f"{plan.bits_file:.3f} of the file"
    )


def _show_calibration(output: Output, architecture: Architecture, job: QuantizeJob) -> None:
    """Print the calibration text, if any, and how much of it is used."""
    from spectool.data.text import BUILTIN

    if not job.needs_text:
        return
    length = job.sequence_length(architecture)
    cut = f" (the model's context; --seq-len {job.seq_len} is cut)" if length < job.seq_len else ""
    output.say(
        f"plan: calibrated on {', '.join(job.calibration or [f'the {BUILTIN}'])}, at most "
        f"{job.samples} sequences of {length} tokens{cut}"
    )
    if not job.calibration:
        output.say(
            "plan: --calibration FILE with text of the kind the model will see loses less, much "
            "less below 3 bits"
        )


def _describe(quantizer: Quantizer) -> str:
    options = ", ".join(f"{key}={value}" for key, value in quantizer.config.as_dict().items())
    return f"{quantizer.name}{f' ({options})' if options else ''}"


def _plan_record(plan: QuantizePlan) -> dict[str, Any]:
    return {
        "expected_bits_per_weight": {"linears": plan.bits_linears, "file": plan.bits_file},
        "disk_bytes": plan.file_bytes,
        "host_bytes": plan.host_bytes,
        "device_bytes": plan.device_bytes,
        "linears": [name for block in plan.matrices.values() for name in block],
        "outside": list(plan.outside),
        "skipped": [{"name": name, "reason": why} for name, why in plan.skipped.items()],
    }


def finish(output: Output, method: str, out: Path, report: QuantizeReport) -> None:
    """Print the result: sizes measured from the written files, errors, time and memory."""
    from spectool.checkpoint.headers import read_layout
    from spectool.machine import peak_device_bytes, peak_rss_bytes
    from spectool.quantize.ledger import measure

    layout = read_layout(out)
    ledger = measure(layout)
    seconds = time.monotonic() - output.began
    worst = max(report.layers, key=lambda layer: layer.error)
    output.show(
        f"{out}: {size(ledger.file_bytes)}, {ledger.linears:.3f} bits per weight of the linears, "
        f"{ledger.file:.3f} of the file"
    )
    output.show(f"largest relative squared error of a linear: {worst.error:.2e} ({worst.name})")
    if report.preprocess is not None:
        output.show(
            "held-out perplexity for --preprocess: "
            f"{report.preprocess['packed']:.3f} quantized before training, "
            f"{report.preprocess['merged']:.3f} after it (a lower bound for the final perplexity)"
        )
    data_free = [name for block in report.blocks for name in block.data_free]
    if data_free:
        output.show(
            f"matrices with too few calibration tokens, quantized without data: {len(data_free)} "
            f"({data_free[0]}, ...)"
        )
    if lm_head := report.outside.lm_head:
        output.show(
            f"lm_head: KL from the original on held-out calibration text "
            f"{lm_head.loss_start:.4f} before the fit, {lm_head.loss_after:.4f} after it; "
            f"entropy of a token given its code {lm_head.nats_within_codes:.3f} nats"
        )
    fits = [(index, fit) for index, block in enumerate(report.blocks) for fit in block.fits]
    if fits:
        show_fits(output, fits)
    on_device = peak_device_bytes()
    device = f", of the device {size(on_device)}" if on_device else ""
    output.show(f"{seconds:.1f} s, peak memory {size(peak_rss_bytes())}{device}")
    output.result(
        {
            "out": str(out),
            "method": method,
            "bits_per_weight": {"linears": ledger.linears, "file": ledger.file},
            "bytes": ledger.file_bytes,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": on_device,
            "layers": [asdict(layer) for layer in report.layers],
            "preprocess": report.preprocess,
            "lm_head": report.outside.as_json()["lm_head"],
            "blocks": [
                {key: value for key, value in block.as_json().items() if key != "layers"}
                for block in report.blocks
            ],
        }
    )


def show_fits(output: Output, numbered: list[tuple[int, FitReport]]) -> None:
    """Print what the fits of the blocks gained; `numbered` pairs a block's index and its fit."""
    fits = [fit for _, fit in numbered]
    shares = [fit.loss_after / (fit.loss_start or 1.0) for fit in fits]
    lower = sum(share < 1 for share in shares)
    output.show(
        f"block loss after the fit: {min(shares):.3f} to {max(shares):.3f} of that at its start, "
        f"lower in {lower} of {len(fits)} fits"
    )
    flipped = sum(fit.rows_flipped or 0 for fit in fits)
    if flipped:
        output.show(f"rows flipped by a negative scale: {flipped}")
    moved = [fit.codes_moved for fit in fits if fit.codes_moved is not None]
    if moved:
        further = max(fit.codes_moved_further or 0 for fit in fits)
        output.show(
            f"codes changed: {min(moved):.1%} to {max(moved):.1%} of a block, at most "
            f"{further:.2%} by more than one level"
        )
    turned = sorted({index for index, fit in numbered if fit.least_cosine <= 0})
    skipped = sum(fit.steps_skipped for fit in fits)
    if skipped:
        output.show(f"steps skipped for a gradient that was not finite: {skipped}")
    if turned:
        output.show(
            "output with a negative cosine to the original's on some calibration text, in blocks "
            f"{', '.join(map(str, turned))}: try more --epochs, or more bits"
        )


QUANTIZE = Verb(
    name="quantize",
    help="Quantize a checkpoint",
    kind="quantizer",
    known=lambda: [*methods.names("chooser"), *methods.names("quantizer")],
    config=lambda method: method.Config,
    run=quantize,
    panels={
        "What to quantize": (
            "skip", "allow_dense", "rules", "bits_budget", "candidate", "embeddings",
            "lm_head",
            "revision", "trust_remote_code",
        ),
        "Calibration": ("calibration", "field", "template_arg", "samples", "seq_len", "seed"),
        "Training before quantization": (
            "preprocess", "preprocess_steps", "preprocess_rank", "preprocess_rate",
        ),
        "Resources": ("device", "dtype", "batch_size", "threads"),
        "Output": ("dry_run", "overwrite", "json_output", "debug"),
    },
)  # fmt: skip
