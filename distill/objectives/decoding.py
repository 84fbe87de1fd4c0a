"""Base of the objectives that change how a model decodes, measured by the decode loop itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.decode.generate import Runner
from spectool.decode.result import Result, loop_start
from spectool.distill.data.samples import pad
from spectool.distill.data.trajectories import Prompt, list_prompts
from spectool.distill.objectives.base import WeightObjective, WeightTask, read_logits
from spectool.distill.weights import TrainedWeights
from spectool.errors import TextError
from spectool.report import Reporter
from spectool.training import Metrics

# Largest number of tokens generated after each held-out prompt to measure decoding.
MEASURED_TOKENS = 64


class DecodingObjective(WeightObjective):
    """Objective of a model that its drafter, `draft`, decodes in fewer passes.

    `config.loss_limit`: the rise of held-out perplexity from which weights are not kept.

    Raises:
        TextError: no held-out prompt leaves room to continue.
    """

    takes_teacher: ClassVar[bool] = False
    draft: str
    config: Any

    def __init__(self, task: WeightTask, weights: TrainedWeights) -> None:
        super().__init__(task, weights)
        seq_len = task.texts.seq_len
        self.measured = min(MEASURED_TOKENS, seq_len // 2)
        held_out = [sample for batch in task.texts.held_out for sample in batch]
        self.prompts = list_prompts(held_out, longest=seq_len - self.measured)
        if held_out and not self.prompts:
            raise no_room(seq_len)

    def prepare(self, writer: ArtifactWriter | None, reporter: Reporter) -> None:
        """Measure the model as it is."""
        self.first_perplexity: float = super().evaluate()["perplexity"]
        self.first_likeliest = self._likeliest()
        self.runner = Runner(self.task.model)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return held-out metrics; the score is the `tokens_per_forward` of `draft`.

        `agreement` is the share of held-out tokens after which the likeliest token is that of the
        model before training. The score is negative where the perplexity rose beyond the limit.
        """
        metrics = super().evaluate()
        pairs = zip(self._likeliest(), self.first_likeliest, strict=True)
        same = torch.cat([now_R == first_R for now_R, first_R in pairs])
        metrics["agreement"] = same.double().mean().item()
        metrics["tokens_per_forward"] = self.measure(self.draft)
        rose = metrics["perplexity"] / self.first_perplexity - 1
        within = rose <= self.config.loss_limit
        metrics["score"] = metrics["tokens_per_forward"] if within else -rose
        return metrics

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

    def measure(self, draft: str, *, lossy: bool = False) -> float:
        """Return the tokens per forward of a drafter after the held-out prompts, up to loops."""
        self.runner.use(draft)
        return tokens_per_forward(self.runner, self.prompts, self.measured, lossy=lossy)[0]


def tokens_per_forward(
    runner: Runner, prompts: Sequence[Prompt], most: int, *, lossy: bool = False
) -> tuple[float, Sequence[Result]]:
    """Return greedy tokens per forward of the runner's drafter after these prompts, up to loops.

    Returns the whole texts too, of at most `most` tokens each.
    """
    taken: list[list[int]] = [[] for _ in prompts]
    results = runner.generate(
        [prompt.tokens for prompt in prompts],
        max_new_tokens=most,
        eos=[prompt.ends for prompt in prompts],
        batch_size=8,
        on_tokens=lambda index, tokens, text, drafted: taken[index].append(len(tokens)),
        lossy=lossy,
    )
    tokens = forwards = 0
    for result, counts in zip(results, taken, strict=True):
        end, done = loop_start(result.token_ids), 0
        for count in counts:
            if done < end:
                done += count
                forwards += 1
        tokens += done
    return tokens / forwards, results


def no_room(seq_len: int) -> TextError:
    """Make the error for texts whose prompts fill the `seq_len` tokens of a text."""
    return TextError(
        f"no prompt leaves room to continue within {seq_len} tokens",
        hint="a larger --seq-len, or other data",
    )
