"""Quantization of a checkpoint, from a job to an artifact: plan, reshape, choose, pack."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint import artifact
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.checkpoint.trained import check_dense
from spectool.data.text import builtin_text
from spectool.distill.objectives.base import training_bytes
from spectool.errors import UsageError
from spectool.machine import reproducible
from spectool.model.architecture import Architecture
from spectool.model.blocks import BlockStream, Compute
from spectool.quantize.budget import (
    choose,
    list_candidates,
    measure_candidates,
    remove_measurements,
)
from spectool.quantize.calibration import (
    TOKENIZED_BYTES,
    Calibration,
    count_characters,
    read_calibration,
    read_windows,
)
from spectool.quantize.footprint import BASE_BYTES, TextSize
from spectool.quantize.job import QuantizeJob
from spectool.quantize.pack import Packing
from spectool.quantize.plan import QuantizePlan, make_plan
from spectool.quantize.preprocess import PreprocessRun
from spectool.quantize.report import QuantizeReport
from spectool.quantize.rules import make_skip_rules
from spectool.quantize.small_files import make_small_files
from spectool.quantize.stream import CalibratedStream, open_stream
from spectool.report import SILENT, Reporter


def plan_job(
    checkpoint: Checkpoint, job: QuantizeJob, *, device: str, batch_size: int = 4
) -> QuantizePlan:
    """Return the plan of a job; for a budget that of its first candidate.

    Reads headers only, except the values of tied matrices that are both stored.

    Raises:
        UsageError: a rule matches nothing, or no candidate fits the budget.
        UnsupportedError: the source is quantized already, or cannot be packed.
    """
    check_dense(checkpoint)
    if job.preprocess is not None:
        for quantizer in job.list_quantizers():
            if quantizer.rounds_inputs:
                raise UsageError(f"--preprocess trains weights; {quantizer.name} rounds inputs too")
    plan = _plan(Architecture(checkpoint), job, device=device, batch_size=batch_size)
    if job.budget is not None:
        list_candidates(plan, job.budget, job.rules)
    return plan


def _plan(
    architecture: Architecture, job: QuantizeJob, *, device: str, batch_size: int
) -> QuantizePlan:
    """Make the plan of a job, with the memory of tokenizing and of preprocessing."""
    length = job.sequence_length(architecture)
    plan = make_plan(
        architecture,
        job.quantizer,
        rules=[*make_skip_rules(job.skip), *job.rules],
        embeddings=job.embeddings,
        lm_head=job.lm_head,
        allow_dense=job.allow_dense,
        text=TextSize(
            total=job.samples * length if job.needs_text else 0,
            sequence=length,
            batch=batch_size * length,
        ),
        on_device=device != "cpu",
    )
    # Peaks before packing: tokenizing, and training the whole model for --preprocess.
    characters = count_characters(job.calibration)
    if job.needs_text and not job.calibration:
        characters = len(builtin_text())
    host, on_device = TOKENIZED_BYTES * characters, 0
    if job.preprocess is not None:
        host = max(host, TOKENIZED_BYTES * count_characters(job.preprocess.text))
        training = training_bytes(architecture, job.preprocess.batch_size * length)
        # After training on a device the merged matrices are copied to the host.
        host = max(host, 4 * plan.num_weights if plan.device_bytes else training)
        on_device = BASE_BYTES + training
    return replace(
        plan,
        host_bytes=max(plan.host_bytes, BASE_BYTES + host),
        device_bytes=plan.device_bytes and max(plan.device_bytes, on_device),
    )


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    job: QuantizeJob,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> QuantizeReport:
    """Quantize a checkpoint into the directory `out`.

    Calibration computes in `dtype`; weights are always packed from float32.

    Raises:
        InputError: the checkpoint, the text, the options or `out` cannot be used.
        SpectoolError: the disk is full; the same call resumes.
    """
    artifact.check_target(out, overwrite=overwrite)
    artifact.check_paths(checkpoint.path, out)
    compute = Compute(dtype=dtype, device=torch.device(device), batch_size=batch_size)
    plan = plan_job(checkpoint, job, device=device, batch_size=batch_size)
    if job.budget is None:
        reporter.plan(plan)
    blocks = open_stream(plan, compute)
    calibration = _start_calibration(plan, job, blocks, reporter) if job.needs_text else None
    ids_SL = None if calibration is None else calibration.ids_SL
    source = {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision}
    identity = {"source": source, **job.record(ids_SL, compute)}
    preprocessing, metrics = None, None
    if job.preprocess is not None:
        preprocessing, identity = _prepare_preprocessing(
            plan, job, out, compute, identity, reporter
        )
        preprocessing.check(overwrite=overwrite)
    with (
        reproducible(compute.device),
        ArtifactWriter(out, identity=identity, overwrite=overwrite) as writer,
    ):
        if preprocessing is not None:
            merged, metrics = preprocessing.run(
                lambda path: quantize(
                    checkpoint,
                    path,
                    replace(job, preprocess=None),
                    device=device,
                    dtype=dtype,
                    batch_size=batch_size,
                    reporter=_Progress(reporter),
                )
            )
            trusted = checkpoint.trust_remote_code
            reshaped = open_checkpoint(merged, trust_remote_code=trusted)
            plan = replace(plan, architecture=Architecture(reshaped))
            blocks = open_stream(plan, compute)
        stream = CalibratedStream(
            plan=plan, blocks=blocks, calibration=calibration, seed=job.seed, scratch=writer.partial
        )
        if job.budget is not None:
            job = _resolve_budget(stream, job, writer, reporter)
            plan = _plan(plan.architecture, job, device=device, batch_size=batch_size)
            stream = replace(stream, plan=plan)
            reporter.plan(plan)
        packing = Packing(stream=stream, writer=writer, metadata=identity, reporter=reporter)
        report = QuantizeReport(*packing.run(), metrics)
        remove_measurements(plan, writer)
        writer.finish(make_small_files(checkpoint, plan, job, writer))
    if preprocessing is not None:
        shutil.rmtree(preprocessing.scratch)
    return report


def _start_calibration(
    plan: QuantizePlan, job: QuantizeJob, blocks: BlockStream, reporter: Reporter
) -> Calibration:
    """Read the calibration text; refuse a model that cannot be walked, before the work."""
    calibration = read_calibration(plan.architecture, job, reporter)
    # Packing holds neither the lm_head in memory nor weights from before preprocessing.
    if job.lm_head is not None or job.preprocess is not None:
        blocks = open_stream(plan, blocks.compute, with_lm_head=job.lm_head is not None)
    blocks.call(0, 1, calibration.ids_SL.shape[1])
    return calibration


def _resolve_budget(
    stream: CalibratedStream, job: QuantizeJob, writer: ArtifactWriter, reporter: Reporter
) -> QuantizeJob:
    """Return the job with a rule for each matrix instead of its budget."""
    assert job.budget is not None
    candidates = list_candidates(stream.plan, job.budget, job.rules)
    errors = measure_candidates(stream, candidates, writer, reporter)
    chosen = choose(stream.plan, job.budget, candidates, errors)
    return replace(job, budget=None, rules=(*job.rules, *chosen))


def _prepare_preprocessing(
    plan: QuantizePlan,
    job: QuantizeJob,
    out: Path,
    compute: Compute,
    identity: Mapping[str, Any],
    reporter: Reporter,
) -> tuple[PreprocessRun, dict[str, Any]]:
    """Prepare the preprocessing of a job; also return the identity with its options and text."""
    assert job.preprocess is not None
    windows = read_windows(plan.architecture, job, reporter)
    options = {**asdict(job.preprocess), **job.record_compute(compute), **windows.record}
    identity = {**identity, "preprocess": options}
    preprocessing = PreprocessRun(
        options=job.preprocess,
        windows=windows,
        scratch=out.with_name(out.name + ".preprocess"),
        identity=identity,
        plan=plan,
        device=compute.device,
        seed=job.seed,
        reporter=reporter,
    )
    return preprocessing, identity


class _Progress(Reporter):
    """Reporter that passes on the progress alone, of a run inside another."""

    def __init__(self, outer: Reporter) -> None:
        self._outer = outer

    def progress(self, done: float, total: int, what: str) -> None:
        self._outer.progress(done, total, what)
