"""Base of the objectives that change a model's weights, trained on text or on a teacher.

The loss of a step is the mean over its tokens in the loss of -log p(token), or with a teacher of
KL(teacher || model). Of several processes each computes a part of the step's texts, and its losses
are parts of that mean: their sum over the processes is the loss.
Shapes: B texts of a batch, L tokens, R tokens in the loss, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import Checkpoint, torch_dtype
from spectool.checkpoint.trained import write_trained
from spectool.data.stored_log_probs import kept_kl
from spectool.distill.data.samples import HasTokens, Sample, pad
from spectool.distill.objective import Objective, seeded
from spectool.distill.processes import ALONE, Processes, whole
from spectool.distill.stored_teacher import StoredTeacher
from spectool.distill.weights import TrainedWeights
from spectool.errors import UnsupportedError
from spectool.model.architecture import Architecture
from spectool.model.matrices import saved_bytes
from spectool.report import Reporter
from spectool.training import History, Metrics, Recipe, make_optimizer

# Number of evaluations on held-out text in a training.
_NUM_EVALUATIONS = 10


@dataclass(frozen=True, slots=True)
class TextBatches:
    """Samples to train on, of at most `seq_len` tokens, and held-out samples by batch.

    `group` puts samples, or anything with `tokens`, into the batches of the steps: their indices.
    """

    samples: Sequence[Sample]
    group: Callable[[Sequence[HasTokens]], Sequence[Sequence[int]]]
    held_out: Sequence[Sequence[Sample]]
    seq_len: int


@dataclass(frozen=True, slots=True)
class LossBatch:
    """Tokens [B, L] of a batch, which of them after the first are in the loss, and the teacher.

    `total` counts the tokens in the loss, those of other processes too. `teacher_RV` are logits or
    log-probabilities; `kept_RV` the tokens that they belong to, if some are left out.
    """

    tokens_BL: Tensor
    mask_BL: Tensor
    total: int
    teacher_RV: Tensor | None
    kept_RV: Tensor | None = None

    def losses(self, logits_BLV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the means of -log p and, with a teacher, of the KL, of a model's logits."""
        labels_BL = self.tokens_BL[:, 1:].masked_fill(~self.mask_BL, -100)
        flat = logits_BLV.flatten(0, 1), labels_BL.flatten()
        nats = F.cross_entropy(*flat, reduction="sum") / self.total
        if self.teacher_RV is None:
            return nats, None
        if self.kept_RV is not None:
            logp_RV = logits_BLV[self.mask_BL].log_softmax(-1)
            kl = kept_kl(self.teacher_RV, logp_RV, self.kept_RV).sum()
            return nats, (kl / self.total).float()
        # Models of one tokenizer may pad its vocabulary differently.
        size = min(self.teacher_RV.shape[-1], logits_BLV.shape[-1])
        logits_RV = logits_BLV[self.mask_BL][:, :size]
        return nats, divergence(self.teacher_RV[:, :size], logits_RV) / self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTask:
    """Parts that a training of weights, called `name` in reports, is given.

    `model` is trained, in float32. `source`, of `architecture`, is the checkpoint whose files are
    written again with the changed weights. `learning_rate` None: the objective's default. `record`
    is stored with the result. `optimizer` is one of `training.OPTIMIZERS`. All `processes` are
    given the same. The teacher, if there is one, is a model or `stored`.
    """

    name: str
    model: PreTrainedModel
    source: Checkpoint
    architecture: Architecture
    texts: TextBatches
    teacher: PreTrainedModel | None = None
    stored: StoredTeacher | None = None
    learning_rate: float | None = None
    device: torch.device
    seed: int
    record: Mapping[str, Any]
    optimizer: str = "adamw"
    processes: Processes = ALONE

    @property
    def has_teacher(self) -> bool:
        """Return whether the model learns a teacher's probabilities."""
        return self.teacher is not None or self.stored is not None


class WeightObjective(Objective):
    """Objective that changes weights. A method's constructor takes the task and its `Config`.

    `takes_teacher` and `needs_teacher`: whether it can and must learn from one. `takes_stored`:
    whether the teacher may be a file of its probabilities. `takes_packed`: whether it trains packed
    checkpoints too. `new_model`: it trains a model of its own, which it writes, and MODEL is its
    teacher. `is_draft`: the result drafts for the source. `logits_per_token`: how often a pass
    computes logits after each token. `generated_tokens`: how many tokens the model generates at
    most before the training, for the plan. `draft`: the drafter that the training is for, if any;
    it is lossless against the new weights, whose text differs from the source's. `frozen_copies` of
    the model are kept beside it.
    """

    learning_rate: float
    takes_teacher: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    takes_stored: ClassVar[bool] = True
    takes_packed: ClassVar[bool] = False
    new_model: ClassVar[bool] = False
    is_draft: ClassVar[bool] = False
    logits_per_token = 1
    generated_tokens = 0
    draft: str | None = None
    frozen_copies = 0

    def __init__(self, task: WeightTask, weights: TrainedWeights) -> None:
        self.task, self.name = task, task.name
        self.weights, self.module = weights, weights.module
        self.batches = task.texts.group(task.texts.samples)
        self.recipe = make_recipe(len(self.batches))

    @classmethod
    def choose_student(
        cls, source: Checkpoint, config: Any
    ) -> tuple[Checkpoint, Checkpoint | None]:
        """Return what is trained of the source, and the teacher where none is given, if any.

        Raises:
            InputError: the options do not fit the source.
        """
        return source, None

    def prepare(self, writer: ArtifactWriter | None, reporter: Reporter) -> None:
        """Make what the training needs besides texts, with the model as it is before training.

        Parts that are stored in the writer's directory are not made again by a resumed run. Only
        the first of several processes has a writer.
        """

    def begin(self) -> None:
        """Split what is trained among the processes, and make the optimizer of each one's part."""
        task = self.task
        self.weights.split(task.processes)
        self.is_split = self.weights.can_split and task.processes.size > 1
        if task.teacher is not None:
            task.processes.split(task.teacher)
        rate = self.learning_rate if task.learning_rate is None else task.learning_rate
        self.optimizer = make_optimizer(
            task.optimizer,
            self.weights.groups(rate),
            rate=rate,
            betas=(0.9, 0.999),
            weight_decay=0.0,
        )

    def accumulate(self, step: int) -> Metrics:
        """Add a step's gradients; dropout depends on seed, step and process only."""
        samples = [self.task.texts.samples[i] for i in self.batches[step]]
        self.module.train()
        with seeded(self._seed(step), self.task.device):
            loss = self.combine(*self.losses(samples))
            self.backward(loss)
        (total,) = self.task.processes.sum([float(loss.detach())])
        return {"loss": total, "tokens": sum(len(sample.tokens) for sample in samples)}

    def combine(self, nats: Any, kl: Any | None) -> Any:
        """Return the loss of the two means that `losses` returns."""
        return nats if kl is None else kl

    def _seed(self, step: int) -> str:
        """Return what seeds a step; the first process draws the same numbers as a single one."""
        seed, rank = f"{self.task.seed}/{step}", self.task.processes.rank
        return f"{seed}/{rank}" if rank else seed

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the sum over the processes of `loss`."""
        processes = self.task.processes
        # Gradients of split parameters are means over the processes.
        torch.autograd.backward(processes.size * loss if self.is_split else loss)
        if not self.is_split:
            processes.sum_gradients(p for p in self.module.parameters() if p.requires_grad)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return the held-out perplexity and, with a teacher, `kl`; the score is minus the loss."""
        self.module.eval()
        total = nats = kl = 0.0
        has_kl = False
        for samples in self.task.texts.held_out:
            count = sum(sum(sample.loss_mask[1:]) for sample in samples)
            mean_nats, mean_kl = self.losses(samples)
            nats += float(mean_nats) * count
            has_kl = mean_kl is not None
            kl += 0.0 if mean_kl is None else float(mean_kl) * count
            total += count
        nats, kl = (each / total for each in self.task.processes.sum([nats, kl]))
        score = -self.combine(nats, kl if has_kl else None)
        found = {"score": score, "perplexity": math.exp(nats)}
        return {**found, "kl": kl} if has_kl else found

    def write(self, writer: ArtifactWriter | None, history: History) -> None:
        """Write the source checkpoint with the changed tensors, and measure those once more."""
        assert history.best is not None
        replaced: dict[str, Tensor] = {}
        for name, tensor in self.weights.changed().items():
            for stored in self.task.architecture.stored_names(name):
                # A half type rounds small updates away: what is reported is what was written.
                dtype = torch_dtype(self.task.source.layout.tensors[stored])
                written = whole(tensor.copy_(tensor.to(dtype)))
                if writer is not None:
                    replaced[stored] = written.to("cpu", dtype)
        self.module = self.weights.module
        history.best = {**history.best, **self.evaluate()}
        training = {
            **self.task.record,
            "draft": self.draft,
            "evaluations": history.evaluations,
            "best": history.best,
        }
        if writer is not None:
            write_trained(writer, self.result_source(history.best), replaced, training)

    def result_source(self, best: Metrics) -> Checkpoint:
        """Return the source to write again, with what these metrics add to its configuration."""
        return self.task.source

    def losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """Return the means over the tokens in the loss of -log p and, with a teacher, of the KL.

        Of several processes each returns its part of the means.
        """
        batch = self.make_batch(samples)
        return batch.losses(read_logits(self.module, batch.tokens_BL))

    def make_batch(self, samples: Sequence[Sample], *, with_teacher: bool = True) -> LossBatch:
        """Return this process's part of some texts, with the teacher's logits if there is one.

        Raises:
            CheckpointError: a stored teacher's file is damaged.
        """
        total = max(1, sum(sum(sample.loss_mask[1:]) for sample in samples))
        part = self.task.processes.part(samples)
        tokens_BL, loss_mask_BL = (each.to(self.task.device) for each in pad(part or samples[:1]))
        if not part:
            # A process without a text takes part in the passes of the others.
            loss_mask_BL = torch.zeros_like(loss_mask_BL)
        mask_BL, teacher_RV, kept_RV = loss_mask_BL[:, 1:], None, None
        if self.task.stored is not None and with_teacher:
            teacher_RV, kept_RV = self.task.stored.read(part or samples[:1], mask_BL)
        elif self.task.teacher is not None and with_teacher:
            with torch.no_grad():
                teacher_RV = read_logits(self.task.teacher, tokens_BL)[mask_BL]
        return LossBatch(tokens_BL, mask_BL, total, teacher_RV, kept_RV)


def divergence(teacher_RV: Tensor, student_RV: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Return the sum over rows of KL(teacher || student) of logits, each times its weight."""
    logs = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
    if weights_R is None:
        return F.kl_div(*logs, reduction="sum", log_target=True)
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1) @ weights_R


def make_recipe(steps: int, warmup: float = 0.1) -> Recipe:
    """Return the schedule of a training of weights, with ten evaluations."""
    return Recipe(steps=steps, warmup=warmup, every=max(1, math.ceil(steps / _NUM_EVALUATIONS)))


def first_id(ids: int | list[int] | None) -> int | None:
    """Return the first of a configuration's special tokens, which may be one, several or none."""
    return ids[0] if isinstance(ids, list) else ids


def read_logits(model: Any, tokens_BL: Tensor) -> Tensor:
    """Return the logits [B, L - 1, V] after each token but the last, in float32."""
    logits: Tensor = model(input_ids=tokens_BL, use_cache=False).logits[:, :-1].float()
    return logits


def check_writable(architecture: Architecture, names: Iterable[str]) -> None:
    """Check that changed tensors can be written in place of the stored ones.

    Raises:
        UnsupportedError: one is stored in parts.
    """
    for name in names:
        if architecture.origins[name].converter is not None:
            raise UnsupportedError(f"{name} is stored in parts that cannot be written back")


def activation_bytes(architecture: Architecture, tokens: int) -> int:
    """Estimate the bytes of the activations that a step's tokens leave for the backward pass."""
    blocks = (architecture.block_matrices(block) for block in architecture.blocks)
    return sum(saved_bytes(architecture.model, block, tokens) for block in blocks)


def training_bytes(architecture: Architecture, tokens: int) -> int:
    """Estimate the bytes of training: weights, changed weights, activations of a step's tokens."""
    weights = sum(p.numel() for p in architecture.model.parameters())
    return 8 * weights + activation_bytes(architecture, tokens)
