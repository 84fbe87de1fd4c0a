"""`spectool quantize METHOD MODEL OUT`: a subcommand per method, options from its `Config`."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spectool import methods
from spectool.cli.by_method import Verb
from spectool.cli.common import Output, describe_method, prepare_torch
from spectool.errors import UsageError
from spectool.files import size
from spectool.options import Config, command_words, option, options_of
from spectool.quantize.options import JobOptions, QuantizeOptions
from spectool.shared_options import PlaceOptions, WriteOptions

if TYPE_CHECKING:
    from spectool.quantize.auto import Picked
    from spectool.quantize.base import FitReport, Quantizer
    from spectool.quantize.job import QuantizeJob
    from spectool.quantize.plan import QuantizePlan
    from spectool.quantize.report import QuantizeReport
    from spectool.quantize.rules import Rule


# --embeddings is suggested when the linears take fewer bits per weight than this and the embedding
# and lm_head make up more than this share of the file.
SUGGEST_BELOW_BITS = 3.0
SUGGEST_ABOVE_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOutput(WriteOptions):
    """Options of what `quantize` writes."""

    PANEL: ClassVar = "Output"

    dry_run: bool = option(False, "Show the plan and write nothing", switch=True)


def quantize(
    output: Output,
    method: str,
    config: Config,
    options: QuantizeOptions,
    load: PlaceOptions,
    write: QuantizeOutput,
) -> None:
    """Quantize MODEL and write the result to the directory OUT."""
    prepare_torch(load.threads)
    from spectool.checkpoint.artifact import check_target
    from spectool.checkpoint.dtypes import parse_dtype
    from spectool.model.loading import check_device
    from spectool.quantize import run

    job = _make_job(output, method, config, options, load, write)
    device = load.resolve_device()
    check_device(device)
    if write.dry_run:
        planned = run.plan_job(
            load.open(headers_only=True), job, device=device, batch_size=options.batch_size
        )
        _show_plan(output, planned, job)
        result = {"dry_run": True, "method": job.method, **_plan_record(planned)}
        output.result({**result, "unused": planned.architecture.unused})
        return
    check_target(write.out, overwrite=write.overwrite)
    output.show_plan = lambda plan: _show_plan(output, plan, job)
    compute = parse_dtype(options.dtype)
    assert compute is not None
    output.resume = "run the same command to resume after the last finished block"
    report = run.quantize(
        load.open(),
        write.out,
        job,
        device=device,
        dtype=compute,
        batch_size=options.batch_size,
        overwrite=write.overwrite,
        reporter=output,
    )
    _finish(output, job.method, write.out, report)


def _make_job(
    output: Output,
    method: str,
    config: Config,
    options: QuantizeOptions,
    load: PlaceOptions,
    write: QuantizeOutput,
) -> QuantizeJob:
    """Return the job that the options describe, with what `auto` picks.

    Raises:
        UsageError: options that exclude each other, or that cannot be read.
    """
    from spectool.quantize.base import parse_quantizer
    from spectool.quantize.budget import list_widths
    from spectool.quantize.job import Budget, QuantizeJob
    from spectool.quantize.preprocess import Preprocess
    from spectool.quantize.rules import read_rules

    rules = read_rules(options.rules) if options.rules else []
    embeddings = parse_quantizer(options.embeddings) if options.embeddings else None
    lm_head = parse_quantizer(options.lm_head) if options.lm_head else None
    budget = None
    if method in methods.list_methods("chooser"):
        picked = _pick(config, options, load, rules, embeddings, lm_head)
        quantizer, embeddings, budget = picked.quantizer, picked.embeddings, picked.budget
        output.say(f"auto: {picked.why}")
        explicit = replace(
            options,
            embeddings=None if embeddings is None else str(embeddings),
            bits_budget=None if budget is None else budget.bits,
        )
        words = ["spectool", "quantize", quantizer.name]
        words += command_words(load, write, quantizer.config, explicit)
        output.say(f"auto: the same by hand: {shlex.join(words)}")
    else:
        quantizer = methods.import_method(method, "quantizer")(config)
        if options.bits_budget is not None:
            given = tuple(map(parse_quantizer, options.candidate))
            budget = Budget(
                options.bits_budget, given or list_widths(quantizer, options.bits_budget)
            )
    if write.dry_run and budget is not None:
        raise UsageError(
            f"--dry-run reads headers only, but a budget of {budget.bits:g} bits needs "
            "measured errors"
        )
    preprocess = Preprocess(
        text=options.preprocess,
        steps=options.preprocess_steps,
        rank=options.preprocess_rank,
        rate=options.preprocess_rate,
    )
    return QuantizeJob(
        method=quantizer.name,
        config=quantizer.config,
        rules=rules,
        embeddings=embeddings,
        lm_head=lm_head,
        budget=budget,
        preprocess=preprocess if options.preprocess else None,
        **{each.name: getattr(options, each.name) for each in options_of(JobOptions)},
    )


def _pick(
    config: Config,
    options: QuantizeOptions,
    load: PlaceOptions,
    rules: Sequence[Rule],
    embeddings: Quantizer | None,
    lm_head: Quantizer | None,
) -> Picked:
    """Let `auto` pick the method.

    Raises:
        UsageError: a budget is given too, or nothing fits.
    """
    from spectool.checkpoint.trained import check_dense
    from spectool.model.architecture import Architecture
    from spectool.quantize import auto
    from spectool.quantize.rules import make_skip_rules

    if options.bits_budget is not None:
        raise UsageError("auto: --bits takes a fraction; leave --bits-budget out")
    headers = load.open(headers_only=True)
    check_dense(headers)
    assert isinstance(config, auto.Auto.Config)
    return auto.pick(
        Architecture(headers),
        config,
        rules=[*make_skip_rules(options.skip), *rules],
        embeddings=embeddings,
        lm_head=lm_head,
        allow_dense=options.allow_dense,
    )


def _show_plan(output: Output, plan: QuantizePlan, job: QuantizeJob) -> None:
    for line in _plan_lines(plan, job):
        output.say(f"plan: {line}")


def _plan_lines(plan: QuantizePlan, job: QuantizeJob) -> Iterator[str]:
    """Yield what will be packed and left dense, with which text, memory and bits."""
    from spectool.cli.events import unused_line

    architecture = plan.architecture
    numbers = Counter(plan.quantizers[name] for block in plan.matrices.values() for name in block)
    counts = [
        _describe(quantizer) + (f" on {number}" if len(numbers) > 1 else "")
        for quantizer, number in numbers.most_common()
    ]
    yield (
        f"{', '.join(counts)}{' of' if len(counts) > 1 else ' on'} {numbers.total()} linears in "
        f"{len(plan.matrices)} blocks of {architecture.config.model_type}, "
        f"{plan.num_weights / 1e6:.2f} M of {plan.num_parameters / 1e6:.2f} M parameters"
    )
    for name, matrix in plan.outside.items():
        also = f" and {matrix.tied}, which share it" if matrix.tied else ""
        yield f"{_describe(plan.quantizers[name])} on {name}{also}"
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"{len(names)} left dense ({reason}): {names[0]}, ..."
    if architecture.unused:
        line = unused_line(architecture.unused, type(architecture.model).__name__)
        yield f"{line}; they are not written to OUT"
    yield f"everything{' else' if plan.outside else ''} outside the blocks is copied"
    share = plan.outside_bytes / plan.file_bytes
    is_large = plan.bits_linears < SUGGEST_BELOW_BITS and share > SUGGEST_ABOVE_SHARE
    if not plan.outside and is_large:
        yield (
            f"embedding and lm_head will be {share:.0%} of the file; --embeddings int8 quantizes "
            "them too"
        )
    if job.needs_text:
        yield from _calibration_lines(job, job.sequence_length(architecture))
    buffers = plan.num_buffers * plan.buffer_bytes
    calibrated = f", activations {size(buffers)}" if buffers else ""
    device = f", device {size(plan.device_bytes)}" if plan.device_bytes else ""
    memory = f"memory at most {size(plan.host_bytes)}{calibrated}{device}"
    yield f"disk {size(plan.file_bytes)}, {memory}"
    yield (
        f"expected bits per weight: {plan.bits_linears:.3f} of the linears, "
        f"{plan.bits_file:.3f} of the file"
    )


def _calibration_lines(job: QuantizeJob, length: int) -> Iterator[str]:
    """Yield the calibration text, and how much of it is used."""
    from spectool.data.text import BUILTIN

    cut = f" (the model's context; --seq-len {job.seq_len} is cut)" if length < job.seq_len else ""
    yield (
        f"calibrated on {', '.join(job.calibration or [f'the {BUILTIN}'])}, at most "
        f"{job.samples} sequences of {length} tokens{cut}"
    )
    if not job.calibration:
        yield (
            "--calibration FILE with text of the kind the model will see loses less, much less "
            "below 3 bits"
        )


def _describe(quantizer: Quantizer) -> str:
    return describe_method(quantizer.name, quantizer.config)


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


def _finish(output: Output, method: str, out: Path, report: QuantizeReport) -> None:
    """Print the result: sizes measured from the written files, errors, time and memory."""
    from spectool.checkpoint.headers import read_layout
    from spectool.machine import peak_device_bytes, peak_rss_bytes
    from spectool.quantize.ledger import measure

    ledger = measure(read_layout(out))
    seconds = time.monotonic() - output.began
    output.show(
        f"{out}: {size(ledger.file_bytes)}, {ledger.linears:.3f} bits per weight of the linears, "
        f"{ledger.file:.3f} of the file"
    )
    for line in _report_lines(report):
        output.show(line)
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
        },
        measured=True,
    )


def _report_lines(report: QuantizeReport) -> Iterator[str]:
    """Yield the errors of the matrices, and what trainings and fits gained."""
    worst = max(report.layers, key=lambda layer: layer.error)
    yield f"largest relative squared error of a linear: {worst.error:.2e} ({worst.name})"
    if report.preprocess is not None:
        yield (
            "held-out perplexity for --preprocess: "
            f"{report.preprocess['packed']:.3f} quantized before training, "
            f"{report.preprocess['merged']:.3f} after it (a lower bound for the final perplexity)"
        )
    if data_free := [name for block in report.blocks for name in block.data_free]:
        yield (
            f"matrices with too few calibration tokens, quantized without data: {len(data_free)} "
            f"({data_free[0]}, ...)"
        )
    if lm_head := report.outside.lm_head:
        nats = lm_head.nats_within_codes
        entropy = "" if nats is None else f"; entropy of a token given its code {nats:.3f} nats"
        yield (
            f"lm_head: KL from the original on held-out calibration text "
            f"{lm_head.loss_start:.4f} before the fit, {lm_head.loss_after:.4f} after it{entropy}"
        )
    if fits := [(index, fit) for index, block in enumerate(report.blocks) for fit in block.fits]:
        yield from fit_lines(fits)


def fit_lines(numbered: list[tuple[int, FitReport]]) -> Iterator[str]:
    """Yield what the fits of the blocks gained; `numbered` pairs a block's index and its fit."""
    fits = [fit for _, fit in numbered]
    shares = [fit.loss_after / (fit.loss_start or 1.0) for fit in fits]
    lower = sum(share < 1 for share in shares)
    yield (
        f"block loss after the fit: {min(shares):.3f} to {max(shares):.3f} of that at its start, "
        f"lower in {lower} of {len(fits)} fits"
    )
    if flipped := sum(fit.rows_flipped or 0 for fit in fits):
        yield f"rows flipped by a negative scale: {flipped}"
    if moved := [fit.codes_moved for fit in fits if fit.codes_moved is not None]:
        further = max(fit.codes_moved_further or 0 for fit in fits)
        yield (
            f"codes changed: {min(moved):.1%} to {max(moved):.1%} of a block, at most "
            f"{further:.2%} by more than one level"
        )
    if skipped := sum(fit.steps_skipped for fit in fits):
        yield f"steps skipped for a gradient that was not finite: {skipped}"
    if turned := sorted({index for index, fit in numbered if fit.least_cosine <= 0}):
        yield (
            "output with a negative cosine to the original's on some calibration text, in blocks "
            f"{', '.join(map(str, turned))}: try more --epochs, or more bits"
        )


QUANTIZE = Verb(
    name="quantize",
    help="Quantize a checkpoint",
    kind="quantizer",
    known=lambda: [*methods.list_methods("chooser"), *methods.list_methods("quantizer")],
    config=lambda method: method.Config,
    run=quantize,
)
