"""Consistency distillation: a model learns to guess its own greedy text several tokens ahead.

From a point y of a block's Jacobi trajectory the model is to predict what it predicts from the
fixed point y*, so that Jacobi decoding needs fewer passes:

    loss = mean over the tokens of text j that follow a token that differs of
           KL(stopgrad p(. | x, y*_<j) || p(. | x, y_<j))
           + w * the anchor, which keeps the model what it is

The mean is weighted by decay^d, where d counts the tokens of the block between the first wrong one
and j. The papers' decay is 1, and most of their loss is far behind the wrong token, where nothing
can be known; what the next pass accepts is decided right behind it. `points` versions of each block
are learnt in one pass, as the prompt, the clean text and the anchor cost the same for all of them.

- anchor `original`: mean over x, y* and the data's continuation t of x of KL(p_0 || p), where p_0
  is the model before training.
- `data`: mean over t of -log p(t_j | x, t_<j).
- `generated`: mean over y* of -log p(y*_j | x, y*_<j), as in the papers: the model becomes surer of
  its own text, and loses on others'.

Greedy Jacobi decoding is exact for the new weights, whose text differs from the old ones'.

- `cllm`: a block follows the clean text before it, and its point is drawn at random (Kou et al.,
  CLLM, 2024, arXiv:2403.00835, equations 5 and 7).
- `forcing`: blocks learn in windows. A block follows the clean text before its window and the noisy
  blocks of its window, and the share of wrong tokens rises from none in the first block to all in
  the last (Hu et al., Jacobi Forcing, 2025, arXiv:2512.14681). The paper's windows have 16 blocks;
  here windows of one and two blocks, as a decoder's, are as frequent as those of `window`.

With probability 1/2 half of a point's wrong tokens, its first one apart, are corrected. One pass
computes a text with all its blocks: clean tokens, then the anchor, then points of each block, each
at the positions after the prompt. `--mixed-labels` follows CEED-VLA (Song et al., 2025,
arXiv:2506.13725): the anchor is `generated`, but a bin of y* that is further than the distance from
the data's own becomes the data's.

Shapes: B texts of a batch, L tokens of a row, R tokens in the loss, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import hash_json
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.noisy import NoisyRow, correct_half, lay_out, noise
from spectool.distill.data.store import finish_store, open_store
from spectool.distill.data.texts import GroupWriter
from spectool.distill.data.trajectories import (
    TRAJECTORIES,
    Block,
    Trajectory,
    as_tensors,
    as_trajectories,
    collect,
    list_prompts,
    read_trajectories,
)
from spectool.distill.objectives.base import WeightTask, divergence, make_recipe
from spectool.distill.objectives.decoding import DecodingObjective, no_room
from spectool.distill.objectives.lora import LoRA
from spectool.distill.weights import FullWeights, LowRankUpdates
from spectool.errors import TextError, UsageError
from spectool.machine import software_versions
from spectool.options import option
from spectool.report import Reporter, TrajectoriesCollected
from spectool.training import Metrics


class Consistency(DecodingObjective):
    """Objective of a model that Jacobi decoding solves in fewer passes."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of consistency distillation."""

        variant: Literal["cllm", "forcing"] = option(
            "forcing", "noise of the blocks before a block: none (cllm) or its own window (forcing)"
        )
        block: int = option(16, "tokens of a block", minimum=2, maximum=256)
        window: int = option(16, "blocks of a window of forcing", minimum=1)
        points: int = option(
            1, "points of each block that a pass learns from", minimum=1, maximum=64
        )
        decay: float = option(
            1.0,
            "factor of the loss for every token after the first wrong one of a block",
            minimum=0,
            maximum=1,
        )
        anchor: Literal["original", "data", "generated"] = option(
            "original",
            "what keeps the model: its probabilities before training, the data, its own text",
        )
        ar_weight: float = option(10.0, "weight of the next-token loss", minimum=0)
        prompts: int | None = option(
            None, "prompts of the data to continue, drawn at random; default: all", minimum=1
        )
        new_tokens: int = option(512, "tokens to generate after each prompt", minimum=16)
        trajectories: Path | None = option(
            None, "directory that keeps what the model generated, for later runs too"
        )
        lora: int | None = option(
            None, "train low-rank updates of this rank in place of all weights", minimum=1
        )
        loss_limit: float = option(
            0.03, "rise of held-out perplexity from which weights are not kept", minimum=0
        )
        mixed_labels: float | None = option(
            None,
            "largest distance of a bin from the data's at which the model's own is learnt",
            minimum=0,
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
        # Forcing is for two blocks in flight.
        self.draft = f"jacobi:window={config.block * (2 if config.variant == 'forcing' else 1)}"
        self.frozen_copies = int(config.anchor == "original" and config.lora is None)
        table: Any = task.model.get_input_embeddings()
        if self.bins.stop > table.num_embeddings:
            raise UsageError(f"--bins {config.bins}: the model has {table.num_embeddings} tokens")
        # Refuses a model whose state keeps no blocks apart.
        self._target = AttentionTarget(task.model, forward="modules")
        lora = config.lora
        if lora is not None:
            self.learning_rate = LoRA.learning_rate
        super().__init__(task, FullWeights(task) if lora is None else LowRankUpdates(task, lora))
        texts = task.texts
        self.given = list_prompts(texts.samples, longest=texts.seq_len - config.block)
        if texts.samples and not self.given:
            raise no_room(texts.seq_len)
        if config.prompts is not None:
            random.Random(f"{task.seed}/prompts").shuffle(self.given)
            self.given = self.given[: config.prompts]
        stored = self._read_store()
        if stored is None:
            # As long as they can become, for the plan.
            room = [min(config.new_tokens, texts.seq_len - len(p.tokens)) for p in self.given]
            self.generated_tokens = sum(room)
            pairs = zip(self.given, room, strict=True)
            stored = [Trajectory(p.tokens, [[[0] * n]], p.reference) for p, n in pairs]
        self.trajectories: Sequence[Trajectory] = stored
        self._group()

    def prepare(self, writer: ArtifactWriter | None, reporter: Reporter) -> None:
        """Collect the trajectories of the model as it is.

        Raises:
            TextError: none is left after the filters.
        """
        super().prepare(writer, reporter)
        if self.frozen_copies:
            self.original: Any = copy.deepcopy(self.task.model)
            self.original.requires_grad_(False)
            self.original.train(False)
        collected = self._read_store()
        if collected is None:
            collected = self._collect(writer, reporter)
        self.trajectories = list({tuple(each.text): each for each in collected}.values())
        if not self.trajectories:
            if writer is not None:
                writer.delete()
            raise TextError(
                f"none of {len(self.given)} prompts is left: the texts that the model generates "
                "end or repeat themselves at once",
                hint="give other data, or a larger --new-tokens",
            )
        reporter.event(_describe(self.given, self.trajectories))
        self._group()

    def begin(self) -> None:
        super().begin()
        if self.frozen_copies:
            self.task.processes.split(self.original)

    @property
    def _key(self) -> dict[str, Any]:
        """Return everything that decides the trajectories."""
        prompts = [[p.tokens, p.reference, sorted(p.ends)] for p in self.given]
        return {
            "source": self.task.source.fingerprint(),
            "prompts": hash_json(prompts),
            "block": self.config.block,
            "new_tokens": self.config.new_tokens,
            "seq_len": self.task.texts.seq_len,
            "seed": self.task.seed,
            "device": self.task.device.type,
            "threads": torch.get_num_threads(),
            "versions": software_versions(),
        }

    def _read_store(self) -> list[Trajectory] | None:
        """Read the trajectories that an earlier run kept, if any; see `read_store`."""
        path = self.config.trajectories
        return None if path is None else read_trajectories(path, self._key)

    def _collect(self, writer: ArtifactWriter | None, reporter: Reporter) -> list[Trajectory]:
        """Continue the prompts, group by group, next to OUT or in a store of their own."""
        config, processes, path = self.config, self.task.processes, self.config.trajectories
        with contextlib.ExitStack() as stack:
            with processes.together():
                if writer is not None and path is not None:
                    writer = stack.enter_context(open_store(path, self._key))
            stored = GroupWriter(writer, processes, reporter, as_tensors, as_trajectories)
            collected = stored(
                "trajectories",
                self.given,
                lambda group, number: collect(
                    self.runner,
                    group,
                    block=config.block,
                    new_tokens=config.new_tokens,
                    context=self.task.texts.seq_len,
                    seed=f"{self.task.seed}/{number}",
                ),
            )
            with processes.together():
                if writer is not None and path is not None:
                    finish_store(writer, TRAJECTORIES, self._key, "trajectories-")
        return collected

    def _group(self) -> None:
        """Group the trajectories into the batches of the steps."""
        self.batches = self.task.texts.group(
            [_RowTokens(each, self.config.points) for each in self.trajectories]
        )
        self.recipe = make_recipe(len(self.batches), warmup=0.03)

    def accumulate(self, step: int) -> Metrics:
        """Add a step's gradients; the points that are drawn depend on seed and step only."""
        rng = random.Random(f"{self.task.seed}/{step}/points")
        rows = [self.make_row(self.trajectories[i], rng) for i in self.batches[step]]
        # Without dropout: it would make clean and noisy predictions differ where nothing is wrong.
        self.module.eval()
        parts = self.row_losses(rows)
        self.backward(parts[0] + self.config.ar_weight * parts[1])
        consistency, anchor = self.task.processes.sum([float(part.detach()) for part in parts])
        return {
            "loss": consistency + self.config.ar_weight * anchor,
            "consistency": consistency,
            "anchor": anchor,
            "tokens": sum(row.size for row in rows),
        }

    def make_row(self, trajectory: Trajectory, rng: random.Random) -> NoisyRow:
        """Choose the noisy versions of a text, and what its anchor learns."""
        windows = [
            self._choose_window(len(trajectory.blocks), rng) for _ in range(self.config.points)
        ]
        noisy = [self._draw(trajectory.blocks, window, rng) for window in windows]
        text = trajectory.text
        anchor = trajectory.reference[: len(text)]
        if self.config.anchor != "generated" and anchor:
            return NoisyRow(trajectory.prompt, text, noisy, windows, anchor, anchor)
        labels = list(text)
        if self.config.mixed_labels is not None:
            for at, (own, given) in enumerate(zip(text, trajectory.reference, strict=False)):
                far = abs(own - given) > self.config.mixed_labels
                if own in self.bins and given in self.bins and far:
                    labels[at] = given
        return NoisyRow(trajectory.prompt, text, noisy, windows, labels)

    def _draw(self, blocks: Sequence[Block], window: int, rng: random.Random) -> list[int]:
        """Return a point of each block, with half of it corrected half of the time."""
        noisy: list[int] = []
        for number, points in enumerate(blocks):
            point = self._choose(points, number, window, rng)
            noisy += correct_half(point, points[-1], rng) if rng.random() < 0.5 else point
        return noisy

    def _choose_window(self, count: int, rng: random.Random) -> int:
        """Return the number of blocks of a window for a text of `count` blocks.

        Decoding has one or two blocks in flight as often as more, so windows of one, two and
        `window` blocks are drawn alike. A text is divided evenly into its windows.
        """
        most = 1 if self.config.variant == "cllm" else rng.choice((1, 2, self.config.window))
        return math.ceil(count / math.ceil(count / most))

    def _choose(self, points: Block, number: int, window: int, rng: random.Random) -> list[int]:
        """Return a point of the block of this number in its text."""
        if window == 1:
            return rng.choice(points[:-1] or points)
        wanted = number % window / (window - 1)
        return min(points, key=lambda point: abs(noise(point, points[-1]) - wanted))

    def row_losses(self, rows: Sequence[NoisyRow]) -> tuple[Tensor, Tensor]:
        """Return the loss of consistency and the anchor, means over their tokens.

        Of several processes each returns its part of the means.
        """
        processes = self.task.processes
        # A process without a row takes part in the passes of the others.
        part = processes.part(rows) or rows[:1]
        weight = float(processes.rank < len(rows))
        layout = lay_out(part, self.config.block)

        def read_rows(model: Any, width: int) -> Tensor:
            """Return the logits [B, width, V] of the first columns, in float32."""
            positions_BL = layout.positions_BL[:, :width]
            visible_BLL = layout.visible_BLL[:, :width, :width].to(self.task.device)
            logits: Tensor = model(
                input_ids=layout.tokens_BL[:, :width].to(self.task.device),
                attention_mask=self._target.masks([0] * len(part), positions_BL, visible_BLL),
                position_ids=positions_BL.to(self.task.device),
                use_cache=False,
            ).logits
            return logits.float()

        logits_BLV = read_rows(self.module, layout.tokens_BL.shape[1])
        if self.config.anchor == "original":
            lora: Any = self.module
            is_lora = self.config.lora is not None
            disabled = lora.disable_adapter() if is_lora else contextlib.nullcontext()
            with torch.no_grad(), disabled:
                original_BLV = read_rows(self.module if is_lora else self.original, layout.plain)
            anchor = divergence(original_BLV[layout.plain_rows], logits_BLV[layout.plain_rows])
            anchored = len(layout.plain_rows[0])
        else:
            labels_R = layout.labels_R.to(logits_BLV.device)
            anchor = F.cross_entropy(logits_BLV[layout.label_rows], labels_R, reduction="sum")
            anchored = len(labels_R)
        clean_RV = logits_BLV.detach()[layout.clean_rows]
        weights_R = self.config.decay ** (layout.distances_R.to(clean_RV.device) - 1.0)
        consistency = divergence(clean_RV, logits_BLV[layout.noisy_rows], weights_R)
        counts = processes.sum([weight * float(weights_R.sum()), weight * anchored])
        return weight * consistency / (counts[0] or 1.0), weight * anchor / counts[1]


@dataclass(frozen=True, slots=True)
class _RowTokens:
    """A trajectory, in rows of this number of noisy versions; the unit of batches."""

    trajectory: Trajectory
    versions: int

    @property
    def tokens(self) -> list[int]:
        """Return as many tokens as pass through the model in training at most."""
        each, text = self.trajectory, self.trajectory.text
        return [*each.prompt, *text * (1 + self.versions), *each.reference[: len(text)]]


def _describe(prompts: Sequence[Any], trajectories: Sequence[Trajectory]) -> TrajectoriesCollected:
    """Describe what was collected; the last point of a block confirms the one before."""
    blocks = [points for each in trajectories for points in each.blocks]
    return TrajectoriesCollected(
        prompts=len(prompts),
        texts=len(trajectories),
        tokens=sum(len(each.text) for each in trajectories),
        passes_per_block=sum(len(points) - 1 for points in blocks) / len(blocks),
    )
