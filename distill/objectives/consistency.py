"""Consistency distillation: a model learns to guess its own greedy text several tokens ahead.

From a point y of a block's Jacobi trajectory the model is to predict what it predicts from the
fixed point y*, so that Jacobi decoding needs fewer passes:

    loss = mean over the tokens of text j that follow a token that differs of
           KL(stopgrad p(. | x, y*_<j) || p(. | x, y_<j))
           + w * the anchor, which keeps the model what it is

- anchor `original`: mean over x, y* and the data's continuation t of x of KL(p_0 || p), where p_0
  is the model before training.
- `data`: mean over t of -log p(t_j | x, t_<j).
- `generated`: mean over y* of -log p(y*_j | x, y*_<j), as in the papers: the model becomes surer of
  its own text, and loses on others'.

Greedy Jacobi decoding is exact for the new weights, whose text differs from the old ones'.

- `cllm`: a block follows the clean text before it, and its point is drawn at random (Kou et al.,
  CLLM, 2024, arXiv:2403.00835, equations 5 and 7).
- `forcing`: blocks learn in windows of `window` blocks. A block follows the clean text before its
  window and the noisy blocks of its window, and the share of wrong tokens rises from none in the
  first block to all in the last (Hu et al., Jacobi Forcing, 2025, arXiv:2512.14681).

With probability 1/2 half of a point's wrong tokens, its first one apart, are corrected. One pass
computes a text with all its blocks: clean tokens, then a point of each block, then the anchor, each
at the positions after the prompt. `--mixed-labels` follows CEED-VLA (Song et al., 2025,
arXiv:2506.13725): the anchor is `generated`, but a bin of y* that is further than the distance from
the data's own becomes the data's.

Shapes: B texts of a batch, P tokens of a prompt, T of a text, A of an anchor apart from the text,
L = P + 2 T + A of a row, R tokens in the loss, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.decode.generate import Runner
from spectool.decode.result import loop_start
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import pad
from spectool.distill.data.texts import GroupWriter
from spectool.distill.data.trajectories import (
    Block,
    Trajectory,
    as_tensors,
    as_trajectories,
    collect,
    list_prompts,
)
from spectool.distill.objective import seeded
from spectool.distill.objectives.base import (
    WeightObjective,
    WeightTask,
    make_recipe,
    read_logits,
)
from spectool.distill.processes import ALONE
from spectool.distill.weights import FullWeights, LowRankUpdates
from spectool.errors import TextError, UsageError
from spectool.options import option
from spectool.report import Reporter, TrajectoriesCollected
from spectool.training import Metrics

# Largest number of tokens generated after each held-out prompt to measure decoding.
_MEASURED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Row:
    """A text in training: prompt, clean text, and the noisy blocks, of equal length to the text.

    `labels` are learnt in the term of -log p: after the tokens of `anchor`, or of the text without
    one.
    """

    prompt: list[int]
    text: list[int]
    noisy: list[int]
    labels: list[int]
    anchor: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Return the number of tokens that pass through the model."""
        return len(self.prompt) + 2 * len(self.text) + len(self.anchor)


class Consistency(WeightObjective):
    """Objective of a model that Jacobi decoding solves in fewer passes."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of consistency distillation."""

        variant: Literal["cllm", "forcing"] = option(
            "forcing", "noise of the blocks before a block: none (cllm) or its own window (forcing)"
        )
        block: int = option(16, "tokens of a block", minimum=2, maximum=256)
        window: int = option(16, "blocks of a window of forcing", minimum=1)
        anchor: Literal["original", "data", "generated"] = option(
            "original",
            "what the next-token loss learns: the original's probabilities, the data, or the "
            "model's own text",
        )
        ar_weight: float = option(10.0, "weight of the next-token loss", minimum=0)
        prompts: int | None = option(
            None, "prompts of the data to continue, drawn at random; default: all", minimum=1
        )
        new_tokens: int = option(512, "tokens to generate after each prompt", minimum=16)
        lora: int | None = option(
            None, "train low-rank updates of this rank in place of all weights", minimum=1
        )
        loss_limit: float = option(
            0.03, "rise of held-out perplexity from which weights are not kept", minimum=0
        )
        mixed_labels: float | None = option(
            None, "largest distance of a bin from the data's at which the model's own is learnt"
        )
        bins: str | None = option(None, "ids that stand for numbers, as FIRST:COUNT")

        def validate(self) -> None:
            """Check the options that belong together."""
            if (self.mixed_labels is None) != (self.bins is None):
                raise UsageError("--mixed-labels and --bins belong together")
            if self.mixed_labels is not None and self.anchor != "generated":
                raise UsageError(
                    "--mixed-labels mixes the data's labels into the model's own text",
                    hint="--anchor generated",
                )
            self.bin_range()

        def bin_range(self) -> range:
            """Return the ids that stand for numbers.

            Raises:
                UsageError: `bins` is malformed.
            """
            if self.bins is None:
                return range(0)
            first, _, count = self.bins.partition(":")
            if not (first.isdecimal() and count.isdecimal()):
                raise UsageError(f"--bins {self.bins}: expected FIRST:COUNT, two numbers")
            return range(int(first), int(first) + int(count))

    learning_rate = 2e-5

    def __init__(self, task: WeightTask, config: Consistency.Config) -> None:
        self.config, self.bins = config, config.bin_range()
        self.draft = f"jacobi:window={config.block}"
        self.frozen_copies = int(config.anchor == "original")
        # Refuses a model whose state keeps no blocks apart.
        self._target = AttentionTarget(task.model)
        lora = config.lora
        super().__init__(task, FullWeights(task) if lora is None else LowRankUpdates(task, lora))
        self.window = config.window if config.variant == "forcing" else 1
        texts = task.texts
        self.measured = min(_MEASURED_TOKENS, texts.seq_len // 2)
        held_out = [sample for batch in texts.held_out for sample in batch]
        longest = texts.seq_len - self.measured
        self.prompts = [prompt.tokens for prompt in list_prompts(held_out, longest=longest)]
        self.given = list_prompts(texts.samples, longest=texts.seq_len - config.block)
        if (texts.samples and not self.given) or (held_out and not self.prompts):
            raise TextError(
                f"no prompt leaves room to continue within {texts.seq_len} tokens",
                hint="a larger --seq-len, or other data",
            )
        if config.prompts is not None:
            random.Random(f"{task.seed}/prompts").shuffle(self.given)
            self.given = self.given[: config.prompts]
        room = [min(config.new_tokens, texts.seq_len - len(p.tokens)) for p in self.given]
        self.generated_tokens = sum(room)
        full = [Trajectory(p.tokens, [[[0] * n]]) for p, n in zip(self.given, room, strict=True)]
        self.trajectories: Sequence[Trajectory] = full
        self._group()

    def prepare(self, writer: ArtifactWriter, reporter: Reporter) -> None:
        """Collect the trajectories of the model as it is.

        Raises:
            TextError: none is left after the filters.
        """
        model, config, texts = self.task.model, self.config, self.task.texts
        self.first_perplexity: float = super().evaluate()["perplexity"]
        self.first_likeliest = self._likeliest()
        self._runner = runner = Runner(model)
        if config.anchor == "original":
            self.original: Any = copy.deepcopy(model)
            self.original.requires_grad_(False)
            self.original.train(False)
        stored = GroupWriter(writer, ALONE, reporter, as_tensors, as_trajectories)
        collected = stored(
            "trajectories",
            self.given,
            lambda group, number: collect(
                runner,
                group,
                block=config.block,
                new_tokens=config.new_tokens,
                context=texts.seq_len,
                seed=f"{self.task.seed}/{number}",
            ),
        )
        self.trajectories = list({tuple(each.text): each for each in collected}.values())
        if not self.trajectories:
            writer.delete()
            raise TextError(
                f"none of {len(self.given)} prompts is left: the texts that the model generates "
                "end or repeat themselves at once",
                hint="give other data, or a larger --new-tokens",
            )
        reporter.event(_describe(self.given, self.trajectories))
        self._group()

    def _group(self) -> None:
        """Group the trajectories into the batches of the steps."""
        self.batches = self.task.texts.group(self.trajectories)
        self.recipe = make_recipe(len(self.batches), warmup=0.03)

    def accumulate(self, step: int) -> Metrics:
        """Add a step's gradients; the points that are drawn depend on seed and step only."""
        rng = random.Random(f"{self.task.seed}/{step}/points")
        rows = [self.make_row(self.trajectories[i], rng) for i in self.batches[step]]
        self.module.train()
        with seeded(f"{self.task.seed}/{step}", self.task.device):
            consistency, anchor = self.row_losses(rows)
            loss = consistency + self.config.ar_weight * anchor
            torch.autograd.backward(loss)
        return {
            "loss": float(loss.detach()),
            "consistency": float(consistency.detach()),
            "anchor": float(anchor.detach()),
            "tokens": sum(row.size for row in rows),
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return held-out metrics; the score is Jacobi decoding's `tokens_per_forward`.

        `agreement` is the share of held-out tokens after which the likeliest token is that of the
        model before training. The score is negative where the perplexity rose beyond the limit.
        """
        metrics = super().evaluate()
        pairs = zip(self._likeliest(), self.first_likeliest, strict=True)
        same = torch.cat([now_R == first_R for now_R, first_R in pairs])
        metrics["agreement"] = same.double().mean().item()
        metrics["tokens_per_forward"] = self._measure()
        rose = metrics["perplexity"] / self.first_perplexity - 1
        within = rose <= self.config.loss_limit
        metrics["score"] = metrics["tokens_per_forward"] if within else -rose
        return metrics

    def make_row(self, trajectory: Trajectory, rng: random.Random) -> _Row:
        """Choose a point of each block, with half of it corrected half of the time."""
        noisy: list[int] = []
        for number, points in enumerate(trajectory.blocks):
            point = self._choose(points, number, rng)
            noisy += correct_half(point, points[-1], rng) if rng.random() < 0.5 else point
        text = trajectory.text
        anchor = trajectory.reference[: len(text)]
        if self.config.anchor != "generated" and anchor:
            return _Row(trajectory.prompt, text, noisy, anchor, anchor)
        labels = list(text)
        if self.config.mixed_labels is not None:
            for at, (own, given) in enumerate(zip(text, trajectory.reference, strict=False)):
                far = abs(own - given) > self.config.mixed_labels
                if own in self.bins and given in self.bins and far:
                    labels[at] = given
        return _Row(trajectory.prompt, text, noisy, labels)

    def _choose(self, points: Block, number: int, rng: random.Random) -> list[int]:
        """Return a point of the block of this number in its text."""
        if self.config.variant == "cllm":
            return rng.choice(points[:-1] or points)
        wanted = number % self.window / max(1, self.window - 1)
        return min(points, key=lambda point: abs(noise(point, points[-1]) - wanted))

    def row_losses(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Return the loss of consistency and the anchor, means over their tokens."""
        layout = lay_out(rows, self.config.block, self.window)
        masks = self._target.masks([0] * len(rows), layout.positions_BL, layout.visible_BLL)

        def read_rows(model: Any) -> Tensor:
            logits: Tensor = model(
                input_ids=layout.tokens_BL.to(self.task.device),
                attention_mask=masks,
                position_ids=layout.positions_BL.to(self.task.device),
                use_cache=False,
            ).logits
            return logits.float()

        logits_BLV = read_rows(self.module)
        if self.config.anchor == "original":
            with torch.no_grad():
                original_BLV = read_rows(self.original)
            anchor = _divergence(original_BLV, logits_BLV, layout.plain_rows, layout.plain_rows)
        else:
            labels_R = layout.labels_R.to(logits_BLV.device)
            anchor = F.cross_entropy(logits_BLV[layout.label_rows], labels_R)
        if not len(layout.noisy_rows[0]):
            return anchor.new_zeros(()), anchor
        clean_BLV = logits_BLV.detach()
        return _divergence(clean_BLV, logits_BLV, layout.clean_rows, layout.noisy_rows), anchor

    @torch.no_grad()
    def _likeliest(self) -> list[Tensor]:
        """Return the likeliest ids [R] in place of the held-out tokens in the loss, by batch."""
        self.module.eval()
        likeliest = []
        for samples in self.task.texts.held_out:
            tokens_BL, loss_mask_BL = (each.to(self.task.device) for each in pad(samples))
            best_BL = read_logits(self.module, tokens_BL).argmax(-1)
            likeliest.append(best_BL[loss_mask_BL[:, 1:]])
        return likeliest

    def _measure(self) -> float:
        """Return tokens per forward of Jacobi decoding after the held-out prompts, up to loops."""
        taken: list[list[int]] = [[] for _ in self.prompts]
        self._runner.use(self.draft)
        results = self._runner.generate(
            self.prompts,
            max_new_tokens=self.measured,
            batch_size=8,
            on_tokens=lambda index, tokens, text, drafted: taken[index].append(len(tokens)),
        )
        tokens = forwards = 0
        for result, counts in zip(results, taken, strict=True):
            end, done = loop_start(result.token_ids), 0
            for count in counts:
                if done < end:
                    done += count
                    forwards += 1
            tokens += done
        return tokens / forwards


def noise(point: Sequence[int], fixed: Sequence[int]) -> float:
    """Return the share of a point that is not yet settled: from its first wrong token on."""
    wrong = (at for at, pair in enumerate(zip(point, fixed, strict=True)) if pair[0] != pair[1])
    return 1 - next(wrong, len(fixed)) / len(fixed)


def correct_half(point: Sequence[int], fixed: Sequence[int], rng: random.Random) -> list[int]:
    """Return a point with half of its wrong tokens corrected, but never the first one."""
    wrong = [at for at, (a, b) in enumerate(zip(point, fixed, strict=True)) if a != b]
    chosen = set(rng.sample(wrong[1:], len(wrong[1:]) // 2))
    return [fixed[at] if at in chosen else token for at, token in enumerate(point)]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows of a pass: tokens, positions [B, L] and what each token sees [B, L, L].

    `label_rows` are the places whose logits predict `labels_R`, `plain_rows` all places of the
    prompt, the clean text and the anchor; at `noisy_rows` the model learns what it predicts at
    `clean_rows`.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    visible_BLL: Tensor
    label_rows: tuple[Tensor, Tensor]
    labels_R: Tensor
    noisy_rows: tuple[Tensor, Tensor]
    clean_rows: tuple[Tensor, Tensor]
    plain_rows: tuple[Tensor, Tensor]


def lay_out(rows: Sequence[_Row], block: int, window: int) -> _Layout:
    """Lay out prompt, clean text, noisy blocks and anchor of each row, padded at the right."""
    longest = max(row.size for row in rows)
    tokens_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    positions_BL = torch.zeros_like(tokens_BL)
    # Padding sees itself: a row without anything to see would be NaN.
    visible_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    label_at, noisy_at, clean_at, plain_at = [], [], [], []
    for b, row in enumerate(rows):
        size, length = len(row.prompt), len(row.text)
        whole, end = size + length, size + 2 * length
        tokens_BL[b, : row.size] = torch.tensor([*row.prompt, *row.text, *row.noisy, *row.anchor])
        positions_BL[b, :whole] = torch.arange(whole)
        positions_BL[b, whole:end] = torch.arange(size, whole)
        visible_BLL[b, :whole, :whole] = torch.ones(whole, whole, dtype=torch.bool).tril()
        window_T = torch.arange(length) // (block * window)
        visible_BLL[b, whole:end, :size] = True
        visible_BLL[b, whole:end, size:whole] = window_T[:, None] > window_T
        same_TT = window_T[:, None] == window_T
        visible_BLL[b, whole:end, whole:end] = same_TT.tril()
        # What follows a wrong token of its window differs from the clean text; the last token
        # of a text has no successor.
        wrong_T = torch.tensor(row.noisy) != torch.tensor(row.text)
        after_T = (same_TT.tril() & wrong_T).any(-1)
        after_T[-1] = False
        (learnt,) = after_T.nonzero(as_tuple=True)
        labelled = torch.arange(size - 1, whole - 1)
        if row.anchor:
            count = len(row.anchor)
            positions_BL[b, end : row.size] = torch.arange(size, size + count)
            visible_BLL[b, end : row.size, :size] = True
            visible_BLL[b, end : row.size, end : row.size] = torch.ones(count, count).tril() > 0
            labelled = torch.cat([labelled[:1], torch.arange(end, row.size - 1)])
        label_at.append((b, labelled))
        plain_at.append((b, torch.cat([torch.arange(whole), torch.arange(end, row.size)])))
        clean_at.append((b, size + learnt))
        noisy_at.append((b, whole + learnt))
    return _Layout(
        tokens_BL,
        positions_BL,
        visible_BLL,
        _indices(label_at),
        torch.tensor([label for row in rows for label in row.labels]),
        _indices(noisy_at),
        _indices(clean_at),
        _indices(plain_at),
    )


def _divergence(
    teacher_BLV: Tensor,
    student_BLV: Tensor,
    teacher_rows: tuple[Tensor, Tensor],
    student_rows: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the mean over rows of KL(teacher || student) of logits."""
    return F.kl_div(
        student_BLV[student_rows].log_softmax(-1),
        teacher_BLV[teacher_rows].log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def _indices(places: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return batch and column indices of places by row."""
    batch = torch.cat([torch.full_like(at, b) for b, at in places])
    return batch, torch.cat([at for _, at in places])


def _describe(prompts: Sequence[Any], trajectories: Sequence[Trajectory]) -> TrajectoriesCollected:
    """Describe what was collected; the last point of a block confirms the one before."""
    blocks = [points for each in trajectories for points in each.blocks]
    return TrajectoriesCollected(
        prompts=len(prompts),
        texts=len(trajectories),
        tokens=sum(len(each.text) for each in trajectories),
        passes_per_block=sum(len(points) - 1 for points in blocks) / len(blocks),
    )
