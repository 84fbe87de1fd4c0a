"""Training of an acceptance head for a draft model and its target, from a job to a directory.

It reads the states of the draft model, where draft heads read the target's, so it has a run of its
own; options of the training and what is stored are theirs. The result is a directory of heads whose
record names both checkpoints by their fingerprints.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint.artifact import ArtifactWriter, check_target
from spectool.checkpoint.tensors import Checkpoint, hash_json
from spectool.decode.generate import Runner
from spectool.decode.heads.acceptance import METHOD, AcceptanceHead
from spectool.decode.heads.artifact import HeadsRecord
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.regenerate import regenerate
from spectool.distill.data.samples import Sample, batches, read_corpus, split
from spectool.distill.data.texts import GroupWriter, as_samples, as_tensors
from spectool.distill.metrics import MetricsFile
from spectool.distill.objective import train
from spectool.distill.objectives.acceptance import (
    OPTIMIZER,
    AcceptanceObjective,
    AcceptanceTexts,
    Pair,
    count_places,
)
from spectool.distill.options import AcceptanceOptions
from spectool.distill.pair import PairOfCheckpoints, open_pair
from spectool.distill.processes import ALONE
from spectool.errors import TextError
from spectool.machine import reproducible
from spectool.model.loading import (
    check_device,
)
from spectool.report import SILENT, Reporter, ReporterGroup
from spectool.training import OPTIMIZERS, Metrics, check_optimizer

# Texts that the target generates together.
_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceJob(AcceptanceOptions):
    """A training of an acceptance head: its options, and those of the head."""

    config: AcceptanceHead.Config


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptancePlan:
    """Estimate of a training, made before weights are read.

    `loss_tokens`: training tokens that are in the loss. `seq_len`: maximum tokens of a text,
    bounded by the contexts of both models.
    """

    parameters: int
    file_bytes: int
    memory_bytes: int
    samples: int
    loss_tokens: int
    held_out: int
    steps: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceReport:
    """Result of a training: held-out metrics before it and of the head that was written."""

    record: HeadsRecord
    parameters: int
    steps: int
    seconds: float
    initial: Metrics
    best: Metrics


def train_acceptance(
    checkpoint: Checkpoint,
    out: Path,
    job: AcceptanceJob,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    activations: str = "auto",
    overwrite: bool = False,
    metrics: Path | None = None,
    reporter: Reporter = SILENT,
) -> AcceptanceReport:
    """Train an acceptance head for a target and its draft model, into the directory `out`.

    The metrics of all steps are also written to the file `metrics`.

    Raises:
        InputError: checkpoints, data or options are unusable, or `out` cannot be written.
        SpectoolError: the loss is not finite, or the disk is full.
    """
    began = time.monotonic()
    check_target(out, overwrite=overwrite)
    where = check_device(device)
    check_optimizer(job.optimizer, where)
    both = open_pair(
        checkpoint,
        job.draft_model,
        dtype=dtype,
        device=where,
        runtime=runtime,
        activations=activations,
    )
    seq_len = min(job.seq_len, both.context or job.seq_len)
    samples = read_corpus(job, both.tokenizer, seq_len, reporter)
    chosen = split(samples, held_out=job.held_out, seed=job.seed)
    texts = [[samples[i] for i in indices] for indices in chosen]
    plan = _make_plan(both, job, texts, seq_len)
    reporter.plan(plan)
    identity = _make_identity(both, job, samples, seq_len)
    if metrics is not None:
        run = {"method": METHOD, "run": hash_json(identity)}
        reporter = ReporterGroup(MetricsFile(metrics, run), reporter)
    with (
        reproducible(where),
        ArtifactWriter(out, identity=identity, overwrite=overwrite) as writer,
    ):
        target = both.load(both.target, reporter)
        if job.regenerate:
            runner = Runner(target, tokenizer=both.tokenizer)
            texts = _regenerate(runner, job, texts, seq_len, writer, reporter)
        pair = Pair(
            AttentionTarget(both.load(both.draft, reporter)), target, float(job.temperature)
        )
        prepared = AcceptanceTexts(texts[0], _make_steps(texts[0], job), texts[1])
        objective = AcceptanceObjective(
            pair, job.config, prepared, identity, _make_record(both, job, pair)
        )
        history = train(objective, writer, reporter=reporter)
    return AcceptanceReport(
        record=objective.record,
        parameters=plan.parameters,
        steps=objective.recipe.steps,
        seconds=time.monotonic() - began,
        initial=history.evaluations[0],
        best=objective.measured,
    )


def _make_steps(samples: Sequence[Sample], job: AcceptanceJob) -> list[list[int]]:
    """Return the indices of the texts of each step."""
    return batches(
        samples, batch_tokens=job.batch_tokens, steps=job.steps, epochs=job.epochs, seed=job.seed
    )


def _make_plan(
    both: PairOfCheckpoints, job: AcceptanceJob, texts: Sequence[Sequence[Sample]], seq_len: int
) -> AcceptancePlan:
    """Estimate what the training takes, and check that it can run.

    Raises:
        UnsupportedError: memory is too small, or the draft model cannot draft.
        CheckpointError: the tokenizer does not fit a model.
        TextError: no held-out text is in the loss.
    """
    models = both.build_meta([sample.tokens for part in texts for sample in part])
    draft = AttentionTarget(models[1])
    if not count_places(texts[1]):
        raise TextError(f"{', '.join(job.data)}: no held-out text to evaluate on")
    with torch.device("meta"):
        head = AcceptanceHead(job.config, draft.width)
    parameters = sum(p.numel() for p in head.parameters())
    # Probabilities and logits of both models for the tokens of a step.
    logits = 4 * 6 * models[0].get_output_embeddings().out_features * job.batch_tokens
    memory = both.weight_bytes(models) + (16 + OPTIMIZERS[job.optimizer]) * parameters + logits
    both.check_memory(memory, hint="a smaller --batch-tokens needs less")
    return AcceptancePlan(
        parameters=parameters,
        file_bytes=4 * parameters,
        memory_bytes=memory,
        samples=len(texts[0]),
        loss_tokens=sum(sum(sample.loss_mask) for sample in texts[0]),
        held_out=len(texts[1]),
        steps=len(_make_steps(texts[0], job)),
        seq_len=seq_len,
    )


def _regenerate(
    runner: Runner,
    job: AcceptanceJob,
    texts: Sequence[Sequence[Sample]],
    seq_len: int,
    writer: ArtifactWriter,
    reporter: Reporter,
) -> list[list[Sample]]:
    """Let the target write the training and held-out texts anew; a resumed run reads them again.

    Raises:
        TextError: it wrote too little.
    """
    generate = GroupWriter(writer, ALONE, reporter, as_tensors, as_samples)

    def write(group: Sequence[Sample], number: int) -> list[Sample]:
        return regenerate(
            runner,
            group,
            seq_len=seq_len,
            temperature=job.temperature,
            seed=job.seed + number,
            batch_size=_TOGETHER,
        )

    names = ("regenerated", "held-out")
    made = [generate(name, given, write) for name, given in zip(names, texts, strict=True)]
    if not all(made):
        writer.delete()
        raise TextError(f"{', '.join(job.data)}: the target generated too little text")
    return made


def _make_record(both: PairOfCheckpoints, job: AcceptanceJob, pair: Pair) -> HeadsRecord:
    """Return the record of what is trained, without the training."""
    return HeadsRecord(
        method=METHOD,
        options=job.config.as_dict(),
        target=both.describe(
            pair.target.get_output_embeddings().in_features, pair.vocab_size, pair.draft.width
        ),
        accuracy=[],
        tree=[],
        shares=[],
        training={},
    )


def _make_identity(
    both: PairOfCheckpoints, job: AcceptanceJob, samples: Sequence[Sample], seq_len: int
) -> dict[str, Any]:
    """Return everything that decides the bytes of OUT, without paths."""
    left_out = ("data", "field", "template_arg", "draft_model")
    rate = OPTIMIZER.rate if job.learning_rate is None else job.learning_rate
    return {
        **{key: value for key, value in job.as_dict().items() if key not in left_out},
        "method": METHOD,
        "learning_rate": rate,
        "seq_len": seq_len,
        "options": job.config.as_dict(),
        "data": hash_json([[sample.tokens, sample.loss_mask] for sample in samples]),
        **both.identity(),
    }
