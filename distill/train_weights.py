"""Training of a checkpoint's weights, from a job to a dense checkpoint, for any objective."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectool.checkpoint.artifact import ArtifactWriter, check_paths, check_target, free_for
from spectool.checkpoint.headers import Layout
from spectool.checkpoint.tensors import Checkpoint, hash_json, open_checkpoint, torch_dtype
from spectool.checkpoint.trained import check_dense
from spectool.data.text import check_ids
from spectool.distill.data.samples import Sample, batches, by_length, read_corpus, split
from spectool.distill.metrics import MetricsFile
from spectool.distill.objective import train
from spectool.distill.objectives.base import (
    TextBatches,
    WeightObjective,
    WeightTask,
    activation_bytes,
    check_writable,
)
from spectool.distill.options import WeightsOptions
from spectool.distill.processes import ALONE, Processes
from spectool.distill.stored_teacher import StoredTeacher
from spectool.errors import CheckpointError, TextError, UnsupportedError, UsageError
from spectool.machine import available_memory, reproducible, software_versions
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.model.exchange import field_specs, replace_with_packed
from spectool.model.loading import check_device, hash_vocabulary, load_model, load_tokenizer
from spectool.model.meta import build_meta, read_config
from spectool.options import Config, options_of
from spectool.report import SILENT, Reporter, ReporterGroup
from spectool.training import OPTIMIZERS, Metrics, check_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsJob(WeightsOptions):
    """A training of weights: its options, the objective and the objective's own."""

    method: str
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlan:
    """Estimate of a training, made before weights are read.

    `trained` parameters change `changed_weights` of the model's `parameters`. `disk_bytes`: the
    checkpoint, and what is stored next to it until it is complete. `loss_tokens`:
    training tokens that are in the loss. `generated_tokens`: what the model generates at most
    before the training; `steps` is an estimate then. `seq_len`: maximum tokens of a text, bounded
    by the contexts of the model and its teacher.
    """

    job: WeightsJob
    parameters: int
    trained: int
    changed_tensors: int
    changed_weights: int
    memory_bytes: int
    disk_bytes: int
    samples: int
    loss_tokens: int
    held_out: int
    steps: int
    generated_tokens: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReport:
    """Result of a training: held-out metrics before it and of the weights that were written.

    `draft`: the drafter that they were trained for, if any. `is_draft`: they draft for the source.
    """

    plan: WeightsPlan
    steps: int
    draft: str | None
    is_draft: bool
    initial: Metrics
    best: Metrics
    seconds: float


def train_weights(
    checkpoint: Checkpoint,
    out: Path,
    job: WeightsJob,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    metrics: Path | None = None,
    processes: Processes = ALONE,
    reporter: Reporter = SILENT,
) -> WeightsReport | None:
    """Train the weights of a dense checkpoint and write them to the directory `out`.

    `dry_run`: only report the plan. The metrics of all steps are also written to the file
    `metrics`. With several `processes` all call this with equal arguments, and the first one
    writes.

    Raises:
        InputError: checkpoint, data or options are unusable, or `out` cannot be written.
        SpectoolError: the loss is not finite, or the disk is full.
    """
    began = time.monotonic()
    with processes.together():
        where = processes.device(check_device(device))
        prepared = _prepare(checkpoint, out, job, where, overwrite, processes, reporter)
    plan, task, teacher = prepared
    if dry_run:
        return None
    identity = dict(task.record)
    if metrics is not None and processes.first:
        lines = MetricsFile(metrics, {"method": job.method, "run": hash_json(identity)})
        reporter = ReporterGroup(lines, reporter)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reproducible(where))
        writer: ArtifactWriter | None = None
        with processes.together():
            if processes.first:
                opened = ArtifactWriter(out, identity=identity, overwrite=overwrite)
                writer = stack.enter_context(opened)
        with processes.together():
            task = replace(
                task,
                model=_load(task.source, where, "packed"),
                teacher=None if teacher is None else _load(teacher, where, "dense"),
            )
        objective = import_method(job.method, "objective")(task, job.config)
        objective.prepare(writer, reporter)
        history = train(objective, writer, processes=processes, reporter=reporter)
    assert history.best is not None
    return WeightsReport(
        plan=plan,
        steps=objective.recipe.steps,
        draft=objective.draft,
        is_draft=objective.is_draft,
        initial=history.evaluations[0],
        best=history.best,
        seconds=time.monotonic() - began,
    )


def _prepare(
    checkpoint: Checkpoint,
    out: Path,
    job: WeightsJob,
    device: torch.device,
    overwrite: bool,
    processes: Processes,
    reporter: Reporter,
) -> tuple[WeightsPlan, WeightTask, Checkpoint | None]:
    """Read the texts and estimate the cost; return the plan, the task without weights, the teacher.

    Raises:
        InputError: see `train_weights`.
    """
    check_target(out, overwrite=overwrite)
    check_paths(checkpoint.path, out)
    kind: Any = import_method(job.method, "objective")
    if not (kind.takes_packed and checkpoint.layout.is_packed):
        check_dense(checkpoint)
    check_optimizer(job.optimizer, device)
    if kind.needs_teacher and job.teacher is None:
        raise UsageError(f"{job.method}: no teacher to learn from", hint="--teacher MODEL")
    if job.teacher is not None and not kind.takes_teacher:
        raise UsageError(f"--teacher: {job.method} learns from the model itself")
    student, teacher = kind.choose_student(checkpoint, job.config)
    architecture, stored = Architecture(student), None
    if job.teacher is not None and Path(job.teacher).is_file():
        stored = _open_stored(job, checkpoint, architecture, is_taken=kind.takes_stored)
    elif job.teacher is not None:
        teacher = _open_teacher(job.teacher, checkpoint)
    contexts = [each.layout.context for each in (checkpoint, teacher) if each is not None]
    seq_len = min(job.seq_len, *(context or job.seq_len for context in contexts))
    samples = _read_samples(checkpoint, job, stored, seq_len, reporter)
    texts = _group_texts(samples, job, seq_len)
    for sample in samples:
        check_ids(sample.tokens, _vocabulary(architecture), f"{checkpoint.name}: its tokenizer")
    task = WeightTask(
        name=job.method,
        # The weights come after the plan.
        model=_copy_without_weights(architecture),
        source=student,
        architecture=architecture,
        texts=texts,
        stored=stored,
        learning_rate=job.learning_rate,
        device=device,
        optimizer=job.optimizer,
        seed=job.seed,
        record=_make_identity(checkpoint, job, texts, teacher or stored, device, processes),
        processes=processes,
    )
    plan = _make_plan(job, task, teacher)
    if plan.disk_bytes > (free := free_for(out)):
        raise UnsupportedError(
            f"{out}: the training stores about {plan.disk_bytes / 1e9:.1f} GB there, and "
            f"{free / 1e9:.1f} GB are free"
        )
    reporter.plan(plan)
    return plan, task, teacher


def _copy_without_weights(architecture: Architecture) -> PreTrainedModel:
    """Return the model on the meta device, with the packed matrices of its checkpoint."""
    model, layout = copy.deepcopy(architecture.model), architecture.layout
    tensors = {name: (torch_dtype(each), each.shape) for name, each in layout.tensors.items()}
    with torch.device("meta"):
        replace_with_packed(model, layout.modules, field_specs(tensors), dtype=torch.float32)
    return model


def _load(checkpoint: Checkpoint, device: torch.device, runtime: str) -> PreTrainedModel:
    """Load a model in float32."""
    return load_model(
        checkpoint, dtype=torch.float32, device=str(device), runtime=runtime, keep_fields=True
    )


def _open_teacher(name: str, checkpoint: Checkpoint) -> Checkpoint:
    """Open the teacher.

    Raises:
        CheckpointError: it has another tokenizer than the checkpoint.
    """
    teacher = open_checkpoint(name, trust_remote_code=checkpoint.trust_remote_code)
    digests = {hash_vocabulary(load_tokenizer(each)) for each in (teacher, checkpoint)}
    if len(digests) > 1:
        raise CheckpointError(
            f"--teacher {name}: its tokenizer is not that of {checkpoint.name}, so their "
            "probabilities are of different tokens"
        )
    return teacher


def _open_stored(
    job: WeightsJob, checkpoint: Checkpoint, architecture: Architecture, *, is_taken: bool
) -> StoredTeacher:
    """Open the file of a teacher's probabilities.

    Raises:
        UsageError: the method needs the teacher itself.
        CheckpointError: the file is unusable; see `StoredTeacher`.
    """
    if not is_taken:
        raise UsageError(f"--teacher {job.teacher}: {job.method} needs the model itself")
    return StoredTeacher(Path(str(job.teacher)), checkpoint, _vocabulary(architecture))


def _read_samples(
    checkpoint: Checkpoint,
    job: WeightsJob,
    stored: StoredTeacher | None,
    seq_len: int,
    reporter: Reporter,
) -> list[Sample]:
    """Read the texts, of at most `seq_len` tokens, from the data or a stored teacher.

    Raises:
        InputError: there are none, or both, or they cannot be read.
    """
    if stored is None:
        if not job.data:
            raise UsageError("no data", hint="--data FILE, with text like that to be generated")
        return read_corpus(job, load_tokenizer(checkpoint), seq_len, reporter)
    if job.data or job.field:
        raise UsageError(f"--teacher {stored.path}: contains the texts; leave --data out")
    samples = stored.samples(seq_len)
    if len(samples) < 2:
        raise TextError(f"{stored.path}: has one text, and at least 2 are needed")
    return samples


def _group_texts(samples: Sequence[Sample], job: WeightsJob, seq_len: int) -> TextBatches:
    """Split the texts into those of the steps and held-out ones."""
    train_indices, held_out_indices = split(samples, held_out=job.held_out, seed=job.seed)
    train_samples = [samples[i] for i in train_indices]
    held_out = by_length(samples, held_out_indices, job.batch_tokens)
    group = functools.partial(
        batches,
        batch_tokens=job.batch_tokens,
        steps=job.steps,
        epochs=job.epochs,
        seed=job.seed,
    )
    held_out_batches = [[samples[i] for i in batch] for batch in held_out]
    return TextBatches(train_samples, group, held_out_batches, seq_len)


def _vocabulary(architecture: Architecture) -> int:
    table: Any = architecture.model.get_input_embeddings()
    return int(table.num_embeddings)


def _make_plan(job: WeightsJob, task: WeightTask, teacher: Checkpoint | None) -> WeightsPlan:
    """Estimate what the training takes, and check that it can run; the task has no weights yet.

    Raises:
        UnsupportedError: too little memory, or weights stored in a way that cannot be written.
        MissingExtra: a package of the objective is not installed.
    """
    architecture, texts = task.architecture, task.texts
    parameters = sum(p.numel() for p in architecture.model.parameters())
    objective: WeightObjective = import_method(job.method, "objective")(task, job.config)
    trained = sum(p.numel() for p in objective.module.parameters() if p.requires_grad)
    changed = objective.weights.changed()
    if not objective.new_model:
        check_writable(architecture, changed)
    changed_weights = sum(tensor.numel() for tensor in changed.values())
    layout = task.source.layout
    models = _packed_bytes(layout) if layout.is_packed else 4 * parameters
    models += 4 * objective.frozen_copies * parameters
    if teacher is not None:
        config, trusted = read_config(teacher), teacher.trust_remote_code
        model = build_meta(config, trust_remote_code=trusted)
        models += 4 * sum(p.numel() for p in model.parameters())
    # Of trained parameters also the gradient, the optimizer's moments, and three copies: the best,
    # and two while they are stored.
    held = models + 4 * changed_weights + (16 + OPTIMIZERS[job.optimizer]) * trained
    if objective.weights.can_split and task.processes.size > 1:
        if job.optimizer != "adamw":
            raise UsageError(
                f"--optimizer {job.optimizer} does not take weights that are split among processes",
                hint="--optimizer adamw",
            )
        # Models are whole until the training begins.
        held = max(held // task.processes.size, models)
    # Logits with their gradient and log probabilities.
    copies = 6 if teacher is not None or task.stored is not None or objective.frozen_copies else 3
    logits = 4 * copies * _vocabulary(architecture) * job.batch_tokens * objective.logits_per_token
    needed = held + activation_bytes(architecture, job.batch_tokens) + logits
    if task.device.type == "cpu":
        needed *= task.processes.local_size
    free = available_memory(task.device)
    if needed > free:
        raise UnsupportedError(
            f"training in float32 takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free",
            hint="a smaller --batch-tokens needs less",
        )
    return WeightsPlan(
        job=job,
        parameters=trained if objective.new_model else parameters,
        trained=trained,
        changed_tensors=len(changed),
        changed_weights=changed_weights,
        memory_bytes=needed,
        disk_bytes=_disk_bytes(objective, trained, OPTIMIZERS[job.optimizer]),
        samples=len(texts.samples),
        loss_tokens=sum(sum(sample.loss_mask) for sample in texts.samples),
        held_out=sum(map(len, texts.held_out)),
        steps=objective.recipe.steps,
        generated_tokens=objective.generated_tokens,
        seq_len=texts.seq_len,
    )


def _disk_bytes(objective: WeightObjective, trained: int, moments: int) -> int:
    """Estimate the bytes of the checkpoint, and of two states until it is complete."""
    files = objective.task.source.layout.files
    written = 4 * trained if objective.new_model else sum(path.stat().st_size for path in files)
    # A state holds the weights, the best of them and the optimizer's moments.
    return written + 2 * (8 + moments) * trained


def _packed_bytes(layout: Layout) -> int:
    """Estimate the bytes of a packed model in training, unpacked matrices included."""
    tensors = layout.tensors.items()
    size = sum(each.num_bytes if ".q." in name else 4 * each.num_elements for name, each in tensors)
    weights = {name: math.prod(entry["shape"]) for name, entry in layout.modules.items()}
    # The backward pass unpacks a linear again; those of experts stay unpacked from the forward on,
    # with their codes as numbers.
    experts = sum(weights[name] for name, each in layout.modules.items() if each.get("expert"))
    return int(size + 8 * (experts + max(weights.values(), default=0)))


def _make_identity(
    checkpoint: Checkpoint,
    job: WeightsJob,
    texts: TextBatches,
    teacher: Checkpoint | StoredTeacher | None,
    device: torch.device,
    processes: Processes,
) -> dict[str, Any]:
    """Return everything that decides the bytes of OUT, without paths."""
    everything: Sequence[Sample] = [*texts.samples, *(s for b in texts.held_out for s in b)]
    paths = {each.name for each in options_of(type(job.config)) if each.type is Path}
    left_out = ("data", "field", "template_arg", "teacher")
    return {
        "method": job.method,
        "options": {k: v for k, v in job.config.as_dict().items() if k not in paths},
        **{key: value for key, value in job.as_dict().items() if key not in left_out},
        "teacher": None if teacher is None else teacher.fingerprint(),
        # Tokens kept of each position of a stored teacher; 0: all.
        "stored_top_k": teacher.top_k if isinstance(teacher, StoredTeacher) else None,
        "data": hash_json([[sample.tokens, sample.loss_mask] for sample in everything]),
        "source": {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision},
        "device": device.type,
        "processes": processes.size,
        # The number of threads changes the last bits of sums, and training amplifies them.
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }
