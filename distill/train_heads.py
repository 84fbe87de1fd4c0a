"""Training of draft heads, from a job to a heads directory, for any method.

The heads are trained on the target's features of the training text, computed online or read from a
store. They are evaluated on text that the target generates greedily after held-out prompts, since
that is what they will draft. Costly intermediate results are kept next to OUT until the end, so
that an interrupted run resumes and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.hub import fetch, is_local
from spectool.checkpoint.tensors import Checkpoint, hash_json
from spectool.decode.heads import convert
from spectool.decode.heads.artifact import HeadsRecord
from spectool.decode.heads.formats.base import PretrainedHeads
from spectool.distill.data.samples import read_corpus, split
from spectool.distill.data.server import Server
from spectool.distill.metrics import MetricsFile
from spectool.distill.objective import train
from spectool.distill.objectives.heads import HeadsObjective
from spectool.distill.plan import HeadsJob, Setup, make_identity, make_plan
from spectool.distill.processes import ALONE, Processes
from spectool.distill.training_data import DataPreparation
from spectool.errors import CheckpointError, TextError, UsageError
from spectool.methods import import_method
from spectool.model.loading import (
    check_device,
    default_dtype,
    hash_vocabulary,
    load_tokenizer,
)
from spectool.model.meta import read_config
from spectool.report import SILENT, Reporter, ReporterGroup
from spectool.training import Metrics, OptimizerDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsReport:
    """Result of a training; `tokens_per_forward` is estimated for the drafter's default tree."""

    record: HeadsRecord
    parameters: int
    steps: int
    seconds: float
    tokens_per_forward: float
    nodes: int
    depth: int
    initial: Metrics


def train_heads(
    checkpoint: Checkpoint,
    out: Path,
    job: HeadsJob,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    activations: str = "auto",
    overwrite: bool = False,
    metrics: Path | None = None,
    processes: Processes = ALONE,
    reporter: Reporter = SILENT,
) -> HeadsReport:
    """Train heads for a checkpoint and write them to the directory `out`.

    The metrics of all steps are also written to the file `metrics`. With several `processes` all
    call this with equal arguments, and the first one writes.

    Raises:
        InputError: checkpoint, data or options are unusable, or `out` cannot be written.
        SpectoolError: the loss is not finite, or the disk is full.
    """
    began = time.monotonic()
    with processes.together():
        where = processes.device(check_device(device))
        setup = _setup(checkpoint, job, dtype, where, runtime, activations)
        preparation = _prepare(setup, job, out, overwrite, processes, reporter)
        if metrics is not None and processes.first:
            run = {"method": job.method, "run": hash_json(preparation.identity)}
            reporter = ReporterGroup(MetricsFile(metrics, run), reporter)
    job = preparation.job
    with contextlib.ExitStack() as stack:
        writer: ArtifactWriter | None = None
        with processes.together():
            if processes.first:
                writer = stack.enter_context(
                    ArtifactWriter(out, identity=preparation.identity, overwrite=overwrite)
                )
        training_data = preparation.training_data(writer)
        objective = HeadsObjective(training_data, preparation)
        # With stored features only the parts of the target that the heads use remain in memory.
        del training_data
        if not len(objective.ranks()):
            if writer is not None:
                writer.delete()
            raise TextError(
                f"{', '.join(job.data)}: the target generated too little text to evaluate on",
                hint="give more data, or a larger --held-out",
            )
        history = train(objective, writer, processes=processes, reporter=reporter)
    paths = objective.record.tree
    return HeadsReport(
        record=objective.record,
        parameters=sum(parameter.numel() for parameter in objective.heads.parameters()),
        steps=objective.recipe.steps,
        seconds=time.monotonic() - began,
        tokens_per_forward=objective.measured["score"],
        nodes=min(objective.nodes, len(paths)),
        depth=max(map(len, paths[: objective.nodes]), default=0),
        initial=history.evaluations[0],
    )


def prepare_heads(
    checkpoint: Checkpoint,
    out: Path,
    job: HeadsJob,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    activations: str = "auto",
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> DataPreparation:
    """Plan a training as `train_heads` would, check that it can run, and write nothing.

    Raises:
        InputError: checkpoint, data or options are unusable, or `out` cannot be written.
    """
    setup = _setup(checkpoint, job, dtype, check_device(device), runtime, activations)
    return _prepare(setup, job, out, overwrite, ALONE, reporter)


def _prepare(
    setup: Setup,
    job: HeadsJob,
    out: Path,
    overwrite: bool,
    processes: Processes,
    reporter: Reporter,
) -> DataPreparation:
    """Read the texts and estimate the cost; nothing is written yet.

    Raises:
        InputError: see `train_heads`.
    """
    init_from = None
    if job.init_from is not None:
        init_from = _read_pretrained(job.init_from, setup, job)
        # Options given by the user override those of the heads; a default counts as not given.
        defaults = type(job.config)().as_dict()
        given = {k: value for k, value in job.config.as_dict().items() if value != defaults[k]}
        job = replace(job, config=type(job.config).from_dict({**init_from.options, **given}))
    if job.learning_rate is None:
        optimizer_defaults: OptimizerDefaults = import_method(
            job.method, "drafter"
        ).Heads.optimizer_defaults
        job = replace(job, learning_rate=optimizer_defaults.rate)
    samples = read_corpus(job, setup.tokenizer, setup.seq_len, reporter)
    server = None
    if job.regenerate_url is not None:
        server = Server(job.regenerate_url, job.regenerate_model)
        job = replace(job, regenerate=True, regenerate_model=server.model)
    train_indices, held_out_indices = split(samples, held_out=job.held_out, seed=job.seed)
    train = [samples[i] for i in train_indices]
    held_out = [samples[i] for i in held_out_indices]
    if init_from is not None:
        vocab = read_config(setup.checkpoint).get_text_config(decoder=True).vocab_size
        size = import_method(job.method, "drafter").Heads.draft_vocab_size(job.config, vocab)
        stored_size = 0 if init_from.token_map is None else len(init_from.token_map)
        if size != stored_size:
            raise UsageError(
                f"--draft-vocab: the heads in {job.init_from} guess {stored_size or vocab} tokens"
            )
    plan = make_plan(
        setup,
        job,
        train,
        held_out,
        path=job.store or out,
        processes=processes,
        init_from=init_from,
    )
    reporter.plan(plan)
    preparation = DataPreparation(
        job=job,
        setup=setup,
        plan=plan,
        train=train,
        held_out=held_out,
        needs=plan.needs,
        identity=make_identity(setup, job, samples, processes, init_from),
        init_from=init_from,
        server=server,
        overwrite=overwrite,
        processes=processes,
        reporter=reporter,
    )
    preparation.check()
    return preparation


def _read_pretrained(name: str, setup: Setup, job: HeadsJob) -> PretrainedHeads:
    """Read the heads to start from, in a directory or a hub repository.

    Raises:
        InputError: they are of another method or tokenizer, or cannot be read.
    """
    config = read_config(setup.checkpoint)
    directory = Path(name) if is_local(name) else fetch(name, None)
    heads = convert.read(directory, config, checksums=setup.checkpoint.checksums)
    if heads.method != job.method:
        raise UsageError(f"--init-from {name}: holds {heads.method} heads, not {job.method}")
    if heads.tokenizer not in (None, setup.tokenizer_digest):
        raise CheckpointError(f"{name}: its heads were trained with another tokenizer")
    return heads


def _setup(
    checkpoint: Checkpoint,
    job: HeadsJob,
    dtype: torch.dtype | None,
    device: torch.device,
    runtime: str,
    activations: str,
) -> Setup:
    """Open the target's tokenizer, and decide how the target computes.

    Raises:
        InputError: no usable tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    return Setup(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        tokenizer_digest=hash_vocabulary(tokenizer),
        dtype=dtype or default_dtype(checkpoint.layout, device),
        device=device,
        runtime=runtime,
        activations=activations,
        seq_len=min(job.seq_len, checkpoint.layout.context or job.seq_len),
    )
