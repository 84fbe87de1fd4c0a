"""Training of a judge head for a draft model and its target, from a job to a directory.

The target's replies are labelled first (`distill/data/substitutions.py`), in groups that a resumed
run reads again. The head is then fitted (`distill/objectives/judge.py`), and the held-out prompts
are decoded with and without it. The result is a directory of heads whose record names both
checkpoints by their fingerprints.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint.artifact import ArtifactWriter, check_target
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.checkpoint.tensors import Checkpoint, hash_json
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import HeadsRecord
from spectool.decode.heads.judge import METHOD, JudgeHead
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import split
from spectool.distill.data.substitutions import (
    TOGETHER,
    Labeller,
    Question,
    Rule,
    as_labelled,
    as_tensors,
    read_questions,
)
from spectool.distill.data.texts import GroupWriter
from spectool.distill.metrics import MetricsFile
from spectool.distill.objectives.judge import fit_head
from spectool.distill.options import JudgeOptions
from spectool.distill.pair import PairOfCheckpoints, open_pair
from spectool.distill.processes import ALONE
from spectool.errors import TextError, UsageError
from spectool.machine import reproducible
from spectool.model.loading import check_device
from spectool.report import SILENT, Reporter, ReporterGroup

# Tokens of the chains that held-out prompts are decoded with.
_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeJob(JudgeOptions):
    """A training of a judge head: its options, and those of the head."""

    config: JudgeHead.Config


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgePlan:
    """Estimate of a training, made before weights are read.

    `memory_bytes`: both models' weights, and logits of the texts that pass together.
    """

    parameters: int
    file_bytes: int
    memory_bytes: int
    prompts: int
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Held-out prompts decoded with the pair: share of right answers, and what was accepted.

    `accepted_length`: accepted tokens of a chain, on average.
    """

    accuracy: float
    accepted_length: float
    tokens_per_forward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReport:
    """Result of a training; `found` is what the record says of it."""

    record: HeadsRecord
    parameters: int
    seconds: float
    found: dict[str, Any]


def train_judge(
    checkpoint: Checkpoint,
    out: Path,
    job: JudgeJob,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    activations: str = "auto",
    overwrite: bool = False,
    metrics: Path | None = None,
    reporter: Reporter = SILENT,
) -> JudgeReport:
    """Train a judge head for a target and its draft model, into the directory `out`.

    The figures of every value of C are also written to the file `metrics`.

    Raises:
        InputError: checkpoints, data or options are unusable, `out` cannot be written, or nothing
            can be learnt: all substitutions of a side have the same effect.
        SpectoolError: a model gives NaN or infinite values, or the disk is full.
    """
    began = time.monotonic()
    check_target(out, overwrite=overwrite)
    where = check_device(device)
    both = open_pair(
        checkpoint,
        job.draft_model,
        dtype=dtype,
        device=where,
        runtime=runtime,
        activations=activations,
    )
    rule = Rule.of(job)
    questions = read_questions(job, rule, both.tokenizer, reporter)
    sides = split(questions, held_out=job.held_out, seed=job.seed)
    chosen = [[questions[i] for i in indices] for indices in sides]
    plan = _make_plan(both, job, chosen)
    reporter.plan(plan)
    identity = _make_identity(both, job, questions)
    if metrics is not None:
        run = {"method": METHOD, "run": hash_json(identity)}
        reporter = ReporterGroup(MetricsFile(metrics, run), reporter)
    with (
        reproducible(where),
        ArtifactWriter(out, identity=identity, overwrite=overwrite) as writer,
    ):
        runner = Runner(both.load(both.target, reporter), tokenizer=both.tokenizer)
        draft = AttentionTarget(both.load(both.draft, reporter))
        label = Labeller(runner, draft, rule)
        generate = GroupWriter(writer, ALONE, reporter, as_tensors, as_labelled)
        training, held_out = (
            generate(name, given, lambda group, number: label(group))
            for name, given in zip(("labelled", "held-out"), chosen, strict=True)
        )
        try:
            head, found = fit_head(training, held_out, job.config, reporter)
            if not any(each.is_right for each in (*training, *held_out)):
                raise TextError(
                    "no reply of the target has the answer of its row: accuracy would say nothing",
                    hint="check --answer and --max-new-tokens",
                )
        except TextError:
            writer.delete()
            raise
        found["held_out_prompts"] = {
            name: asdict(_decode(runner, draft, judge, chosen[1], label))
            for name, judge in (("standard", None), ("judge", head.to(where)))
        }
        record = HeadsRecord(
            method=METHOD,
            options=job.config.as_dict(),
            target=both.describe(runner.target.width, runner.target.vocab_size, draft.width),
            accuracy=[],
            tree=[],
            shares=[],
            training={**identity, **found},
        )
        record = _write(writer, head, record)
    return JudgeReport(
        record=record,
        parameters=plan.parameters,
        seconds=time.monotonic() - began,
        found=found,
    )


def _decode(
    runner: Runner,
    draft: AttentionTarget,
    head: JudgeHead | None,
    questions: Sequence[Question],
    label: Labeller,
) -> Decoded:
    """Decode held-out prompts with chains of the draft model, judged or not."""
    config = DraftModelDrafter.Config(depth=_DEPTH)
    drafter = DraftModelDrafter(draft.model, config, target=runner.target)
    if head is not None:
        drafter.set_judge(head)
    runner.use(drafter)
    results = runner.generate(
        [question.tokens for question in questions],
        max_new_tokens=label.rule.max_new_tokens,
        eos=[question.ends for question in questions],
        batch_size=TOGETHER,
        lossy=head is not None,
    )
    right = sum(
        label.find_answer(question, result.token_ids) == question.answer
        for question, result in zip(questions, results, strict=True)
    )
    # The pass over the prompt verifies no chain.
    passes = max(1, sum(result.forwards - 1 for result in results))
    return Decoded(
        accuracy=right / len(results),
        accepted_length=sum(result.accepted for result in results) / passes,
        tokens_per_forward=sum(len(result.token_ids) for result in results)
        / sum(result.forwards for result in results),
    )


def _write(writer: ArtifactWriter, head: JudgeHead, record: HeadsRecord) -> HeadsRecord:
    """Write the head and its record in place of what the run stored; return the record."""
    metadata = {key: getattr(record, key) for key in ("method", "options", "target")}
    writer.write_shard(HEADS_FILE, head.state_dict(), metadata, {})
    writer.keep_only([HEADS_FILE])
    record.checksums.update(writer.checksums())
    writer.finish({HEADS: record.as_bytes()})
    return record


def _make_plan(
    both: PairOfCheckpoints, job: JudgeJob, chosen: Sequence[Sequence[Question]]
) -> JudgePlan:
    """Estimate what the training takes, and check that it can run.

    Raises:
        UnsupportedError: memory is too small, or a model cannot be drafted for or draft.
        CheckpointError: the tokenizer does not fit a model.
        UsageError: a prompt and its reply do not fit into the context.
    """
    prompts = [question.tokens for side in chosen for question in side]
    models = both.build_meta(prompts)
    targets = [AttentionTarget(model) for model in models]
    longest = max(map(len, prompts)) + job.max_new_tokens
    if both.context is not None and longest > both.context:
        raise UsageError(
            f"a prompt of {longest - job.max_new_tokens} tokens and --max-new-tokens "
            f"{job.max_new_tokens} are more than the context of {both.context}",
            hint="set a smaller --max-new-tokens, or leave long prompts out",
        )
    parameters = sum(target.width for target in targets) + 1
    memory = both.weight_bytes(models) + 4 * TOGETHER * longest * targets[0].vocab_size
    both.check_memory(memory)
    return JudgePlan(
        parameters=parameters,
        file_bytes=4 * (3 * parameters - 2),
        memory_bytes=memory,
        prompts=len(chosen[0]),
        held_out=len(chosen[1]),
    )


def _make_identity(
    both: PairOfCheckpoints, job: JudgeJob, questions: Sequence[Question]
) -> dict[str, Any]:
    """Return everything that decides the bytes of OUT, without paths."""
    left_out = ("data", "field", "template_arg", "draft_model")
    return {
        **{key: value for key, value in job.as_dict().items() if key not in left_out},
        "method": METHOD,
        "options": job.config.as_dict(),
        "data": hash_json([[each.tokens, sorted(each.ends), each.answer] for each in questions]),
        **both.identity(),
    }
