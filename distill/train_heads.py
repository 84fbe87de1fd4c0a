"""Training of draft heads, from a job to a heads directory, for any method.

The heads are trained on the target's features of the training text, computed online or read from a
store. They are evaluated on text that the target generates greedily after held-out prompts, since
that is what they will draft. Costly intermediate results are kept next to OUT until the end, so
that an interrupted run resumes and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.checkpoint.hub import fetch, is_local
from spectool.checkpoint.tensors import Checkpoint, read_tensors, text_fingerprint
from spectool.decode.heads import convert
from spectool.decode.heads.artifact import HeadsRecord, lineage
from spectool.decode.heads.base import MAX_TREE_NODES, TOP, Heads
from spectool.decode.heads.formats.base import PretrainedHeads
from spectool.decode.tree import best_paths
from spectool.distill.data.samples import read_samples, split
from spectool.distill.data.server import Server
from spectool.distill.metrics import MetricsFile
from spectool.distill.plan import Job, Setup, make_identity, make_plan
from spectool.distill.processes import ALONE, Processes
from spectool.distill.trainer import HeadTrainer
from spectool.distill.training_data import DataPreparation
from spectool.errors import CheckpointError, TextError, UsageError
from spectool.methods import resolve
from spectool.model.architecture import read_config
from spectool.model.loading import (
    check_device,
    default_dtype,
    load_tokenizer,
    own_dtype,
    tokenizer_digest,
)
from spectool.report import SILENT, Reporter, Several, TrainingStarts
from spectool.training import Metrics, OptimizerDefaults, Recipe, Training, make_optimizer

# Number of evaluations on held-out text in a training.
_NUM_EVALUATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Result of a training; `tokens_per_forward` is estimated for the drafter's default tree."""

    record: HeadsRecord
    parameters: int
    steps: int
    seconds: float
    tokens_per_forward: float
    nodes: int
    depth: int
    initial: Metrics


class _Shards:
    """Stored training state next to OUT, in two files, of which one is always complete.

    The first process writes; all processes read.
    """

    NAMES = ("state-0.safetensors", "state-1.safetensors")

    def __init__(self, writer: ArtifactWriter | None, processes: Processes) -> None:
        self.writer, self.processes = writer, processes

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the latest state, if any: tensors and report."""
        latest = None
        if self.writer is not None:
            name = max(self.NAMES, key=self._step)
            if self._step(name) >= 0:
                latest = self.writer.path(name), self.writer.report(name) or {}
        latest = self.processes.share(latest)
        return None if latest is None else (read_tensors(latest[0]), latest[1])

    def save(self, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Write a state in place of the older of the two."""
        if self.writer is not None:
            self.writer.write_shard(min(self.NAMES, key=self._step), tensors, {}, report)

    def _step(self, name: str) -> int:
        """Return the step after which a state was stored, -1 without a state."""
        report = None if self.writer is None else self.writer.report(name)
        return -1 if report is None else int(report["step"])


def train_heads(
    checkpoint: Checkpoint,
    out: Path,
    job: Job,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    overwrite: bool = False,
    metrics: Path | None = None,
    processes: Processes = ALONE,
    reporter: Reporter = SILENT,
) -> Report:
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
        setup = _setup(checkpoint, job, dtype, where, runtime)
        preparation = _prepare(setup, job, out, overwrite, processes, reporter)
        if metrics is not None and processes.first:
            run = {"method": job.method, "run": text_fingerprint(preparation.identity)}
            reporter = Several(MetricsFile(metrics, run), reporter)
    job = preparation.job
    with contextlib.ExitStack() as stack:
        writer: ArtifactWriter | None = None
        with processes.together():
            if processes.first:
                writer = stack.enter_context(
                    ArtifactWriter(out, identity=preparation.identity, overwrite=overwrite)
                )
        training_data = preparation.training_data(writer)
        width, vocab_size = training_data.target.width, training_data.target.vocab_size
        trainer = HeadTrainer(training_data, job, setup.seq_len, processes, preparation.init_from)
        # With stored features only the parts of the target that the heads use remain in memory.
        del training_data
        if not len(trainer.ranks()):
            if writer is not None:
                writer.abandon()
            raise TextError(
                f"{', '.join(job.data)}: the target generated too little text to evaluate on",
                hint="give more data, or a larger --held-out",
            )
        if trainer.steps:
            seconds = trainer.steps * trainer.step_seconds()
            reporter.event(TrainingStarts(trainer.steps, seconds))

        training = _make_training(job, trainer, reporter, _Shards(writer, processes))
        history = training.run()
        # Evaluated in the precision in which they are stored.
        stored = own_dtype(setup.checkpoint.layout)
        trainer.heads.to(stored).float()
        ranks_RK = trainer.ranks()
        measured = trainer.metrics(ranks_RK)
        paths = best_paths(ranks_RK, nodes=MAX_TREE_NODES, top=TOP)
        record = HeadsRecord(
            method=job.method,
            options=job.config.as_dict(),
            target={
                "fingerprint": preparation.identity["source"]["fingerprint"],
                "lineage": lineage(setup.checkpoint),
                "hidden_size": width,
                "vocab_size": vocab_size,
                "tokenizer": setup.tokenizer_digest,
            },
            accuracy=measured["accuracy"],
            conditional=measured["conditional"],
            tree=[list(path) for path, _ in paths],
            shares=[share for _, share in paths],
            training={
                **preparation.identity,
                "steps_done": trainer.steps,
                "places": len(ranks_RK),
                "evaluations": history.evaluations,
            },
        )
        if writer is not None:
            record = _write(writer, record, trainer.heads, stored)
    return Report(
        record=record,
        parameters=sum(parameter.numel() for parameter in trainer.heads.parameters()),
        steps=trainer.steps,
        seconds=time.monotonic() - began,
        tokens_per_forward=measured["score"],
        nodes=min(trainer.nodes, len(paths)),
        depth=max((len(path) for path, _ in paths[: trainer.nodes]), default=0),
        initial=history.evaluations[0],
    )


def _prepare(
    setup: Setup,
    job: Job,
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
        optimizer_defaults: OptimizerDefaults = resolve(
            job.method, "drafter"
        ).Heads.optimizer_defaults
        job = replace(job, learning_rate=optimizer_defaults.rate)
    samples = read_samples(
        job.data,
        setup.tokenizer,
        seq_len=setup.seq_len,
        field=job.field,
        template=job.template or None,
        # Twice the tokens of all steps: a part is held out, and steps should differ.
        max_tokens=None if job.steps is None else 2 * (job.steps + 1) * job.batch_tokens,
        reporter=reporter,
    )
    server = None
    if job.regenerate_url is not None:
        server = Server(job.regenerate_url, job.regenerate_model)
        job = replace(job, regenerate=True, regenerate_model=server.model)
    train_indices, held_out_indices = split(samples, held_out=job.held_out, seed=job.seed)
    train = [samples[i] for i in train_indices]
    held_out = [samples[i] for i in held_out_indices]
    if init_from is not None:
        vocab = read_config(setup.checkpoint).get_text_config(decoder=True).vocab_size
        size = resolve(job.method, "drafter").Heads.draft_vocab_size(job.config, vocab)
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


def _read_pretrained(name: str, setup: Setup, job: Job) -> PretrainedHeads:
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


def _make_training(job: Job, trainer: HeadTrainer, reporter: Reporter, store: _Shards) -> Training:
    optimizer_defaults = trainer.heads.optimizer_defaults
    assert job.learning_rate is not None
    optimizer = make_optimizer(
        job.optimizer,
        trainer.heads.parameters(),
        rate=job.learning_rate,
        betas=optimizer_defaults.betas,
        weight_decay=optimizer_defaults.weight_decay,
    )
    return Training(
        name=job.method,
        module=trainer.heads,
        optimizers=[optimizer],
        recipe=Recipe(steps=trainer.steps, warmup=job.warmup, final=optimizer_defaults.final,
                      every=max(1, trainer.steps // _NUM_EVALUATIONS)),
        accumulate=trainer.accumulate,
        evaluate=trainer.evaluate,
        reporter=reporter,
        store=store,
    )  # fmt: skip


def _write(
    writer: ArtifactWriter, record: HeadsRecord, heads: Heads, dtype: torch.dtype
) -> HeadsRecord:
    """Write the heads and finish OUT; return the record with checksums, as written."""
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in heads.state_dict().items()
    }
    metadata = {"method": record.method, "options": record.options, "target": record.target}
    writer.write_shard(HEADS_FILE, tensors, metadata, {})
    for shard in sorted(writer.manifest["shards"]):
        if shard != HEADS_FILE:
            writer.discard(shard)
    record = replace(record, checksums=writer.checksums())
    writer.finish({HEADS: record.as_bytes()})
    return record


def _setup(
    checkpoint: Checkpoint,
    job: Job,
    dtype: torch.dtype | None,
    device: torch.device,
    runtime: str,
) -> Setup:
    """Open the target's tokenizer, and decide how the target computes.

    Raises:
        InputError: no usable tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    return Setup(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        dtype=dtype or default_dtype(checkpoint.layout, device),
        device=device,
        runtime=runtime,
        seq_len=min(job.seq_len, checkpoint.layout.context or job.seq_len),
    )
