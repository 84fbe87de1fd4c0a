"""Lexical unit distillation: a model learns to guess the rest of a unit of which it is sure.

A lexical unit is a maximal run of tokens, each predicted by the model before training with a
probability above alpha. After the text c before a unit u_1 ... u_k come k - 1 placeholders:

    loss = mean over the tokens of units of -log p(u_j | c, j - 1 placeholders)
           + w * mean over the text of -log p(t_j | t_<j)

u_1 is predicted at the last token of c, u_2 ... u_k at the placeholders. Runs longer than `longest`
are cut into units of that many tokens. A placeholder is a token that exists already, the padding
token by default: the model gets no new row. One pass computes a text with the placeholders of all
its units (`distill/data/units.py`).

Source: Sun et al., Lexical Unit Decoding, 2024 (arXiv:2405.15208). The authors' repository has no
code; alpha = beta = 0.9 and k = 4 are ours.
Shapes: B texts, L tokens of a row, R places whose logits are used, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool import options
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.decode.drafters.units import RECORD
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample
from spectool.distill.data.texts import GroupWriter
from spectool.distill.data.units import (
    Unit,
    UnitText,
    as_tensors,
    as_units,
    find_units,
    lay_out,
    most_placeholders,
)
from spectool.distill.objective import seeded
from spectool.distill.objectives.base import WeightTask, first_id, make_recipe, read_logits
from spectool.distill.objectives.decoding import DecodingObjective
from spectool.distill.objectives.lora import LoRA
from spectool.distill.weights import FullWeights, LowRankUpdates
from spectool.errors import TextError, UsageError
from spectool.options import option
from spectool.report import Reporter, UnitsMined
from spectool.training import Metrics


class LexicalUnits(DecodingObjective):
    """Objective of a model that guesses the rest of a unit at placeholders."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of lexical unit distillation."""

        alpha: float = option(
            0.9, "probability from which the model is sure of a token", minimum=0, maximum=1
        )
        beta: float = option(
            0.9, "probability from which measured decoding takes a guess", minimum=0, maximum=1
        )
        longest: int = option(4, "largest number of tokens of a unit", minimum=2, maximum=64)
        placeholder: int | None = option(
            None, "token id of the placeholders; default: padding, else end of text", minimum=0
        )
        ar_weight: float = option(1.0, "weight of the next-token loss", minimum=0)
        lora: int | None = option(
            None, "train low-rank updates of this rank in place of all weights", minimum=1
        )
        loss_limit: float = option(
            0.03, "rise of held-out perplexity from which weights are not kept", minimum=0
        )

    learning_rate = 2e-5

    def __init__(self, task: WeightTask, config: LexicalUnits.Config) -> None:
        self.config = config
        # Refuses a model whose state keeps no blocks apart.
        self._target = AttentionTarget(task.model, forward="modules")
        self.placeholder = choose_placeholder(task.model, config.placeholder)
        self.draft = f"units:longest={config.longest},placeholder={self.placeholder}"
        names = ("alpha", "beta", "longest")
        units = {name: getattr(config, name) for name in names} | {"placeholder": self.placeholder}
        if config.lora is None:
            weights: Any = FullWeights(task)
            # torch gives the row of the padding token no gradient.
            table: Any = task.model.get_input_embeddings()
            table.padding_idx = None
        else:
            self.learning_rate = LoRA.learning_rate
            weights = LowRankUpdates(task, config.lora)
        super().__init__(replace(task, record={**task.record, RECORD: units}), weights)
        # A batch has room for as many placeholders as there can be: the units come later.
        sizes = [len(sample.tokens) for sample in task.texts.samples]
        rows = [[0] * (size + most_placeholders(size, config.longest)) for size in sizes]
        self.batches = task.texts.group([Sample(row, []) for row in rows])
        self.recipe = make_recipe(len(self.batches))
        self.texts: dict[int, UnitText] = {}

    def prepare(self, writer: ArtifactWriter | None, reporter: Reporter) -> None:
        """Mine the units of the texts of all steps, with the model as it is.

        Raises:
            TextError: there is none.
        """
        super().prepare(writer, reporter)
        config, device = self.config, self.task.device
        used = sorted({index for batch in self.batches for index in batch})
        samples = [self.task.texts.samples[index] for index in used]
        stored = GroupWriter(writer, self.task.processes, reporter, as_tensors, as_units)
        found = stored(
            "units",
            samples,
            lambda group, number: mine(
                self.module, group, alpha=config.alpha, longest=config.longest, device=device
            ),
        )
        if used and not any(found):
            if writer is not None:
                writer.delete()
            raise TextError(
                f"no unit of two tokens in {len(used)} texts: the model gives no two tokens in a "
                f"row more than {config.alpha:g}",
                hint="a smaller --alpha, or text that the model is surer of, such as its own",
            )
        self.texts = {
            index: UnitText(sample.tokens, sample.loss_mask, units)
            for index, sample, units in zip(used, samples, found, strict=True)
        }
        sizes = [size for units in found for _, size in units]
        tokens = sum(sum(sample.loss_mask) for sample in samples)
        reporter.event(UnitsMined(len(used), tokens, len(sizes), sum(sizes)))

    def accumulate(self, step: int) -> Metrics:
        """Add a step's gradients; dropout depends on seed, step and process only."""
        texts = [self.texts[index] for index in self.batches[step]]
        self.module.train()
        with seeded(self._seed(step), self.task.device):
            parts = self.row_losses(texts)
            self.backward(parts[0] + self.config.ar_weight * parts[1])
        units, text = self.task.processes.sum([float(part.detach()) for part in parts])
        return {
            "loss": units + self.config.ar_weight * text,
            "units": units,
            "text": text,
            "tokens": sum(each.size for each in texts),
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return held-out metrics; the score is `tokens_per_forward` of verified guesses.

        `threshold_tokens_per_forward` is that of guesses taken untested above beta.
        """
        metrics = super().evaluate()
        beta = f"{self.draft},beta={self.config.beta}"
        metrics["threshold_tokens_per_forward"] = self.measure(beta, lossy=True)
        return metrics

    def row_losses(self, texts: Sequence[UnitText]) -> tuple[Tensor, Tensor]:
        """Return the loss of units and the next-token loss, means over their tokens.

        Of several processes each returns its part of the means.
        """
        processes, device = self.task.processes, self.task.device
        # A process without a text takes part in the passes of the others.
        part = processes.part(texts) or texts[:1]
        weight = float(processes.rank < len(texts))
        layout = lay_out(part, self.placeholder)
        visible_BLL = layout.visible_BLL.to(device)
        logits_BLV = self.module(
            input_ids=layout.tokens_BL.to(device),
            attention_mask=self._target.masks([0] * len(part), layout.positions_BL, visible_BLL),
            position_ids=layout.positions_BL.to(device),
            use_cache=False,
        ).logits

        def total(rows: tuple[Tensor, Tensor], labels_R: Tensor) -> Tensor:
            picked_RV = logits_BLV[rows].float()
            return F.cross_entropy(picked_RV, labels_R.to(device), reduction="sum")

        units = total(layout.unit_rows, layout.unit_labels_R)
        text = total(layout.text_rows, layout.text_labels_R)
        sizes = len(layout.unit_labels_R), len(layout.text_labels_R)
        counts = processes.sum([weight * size for size in sizes])
        return weight * units / max(1.0, counts[0]), weight * text / max(1.0, counts[1])


@torch.no_grad()
def mine(
    model: Any, samples: Sequence[Sample], *, alpha: float, longest: int, device: torch.device
) -> list[list[Unit]]:
    """Find the units of each text: tokens in the loss to which the model gives more than `alpha`.

    One pass a text, so that no more logits are in memory than in a step of training.
    """
    found = []
    for sample in samples:
        tokens_1L = torch.tensor([sample.tokens], device=device)
        probs_LV = read_logits(model, tokens_1L)[0].softmax(-1)
        sure_L = probs_LV.gather(-1, tokens_1L[0, 1:, None])[:, 0] > alpha
        sure_L &= torch.tensor(sample.loss_mask[1:], device=device)
        # Nothing predicts the first token.
        found.append(find_units([False, *sure_L.tolist()], longest))
    return found


def choose_placeholder(model: Any, given: int | None) -> int:
    """Return the token of placeholders: the given one, else padding, else the end of a text.

    Raises:
        UsageError: the model has neither, or does not have the given one.
    """
    config = model.config.get_text_config(decoder=True)
    end = first_id(config.eos_token_id)
    chosen = next((each for each in (given, config.pad_token_id, end) if each is not None), None)
    size = model.get_input_embeddings().num_embeddings
    if chosen is None or not 0 <= chosen < size:
        found = "has no padding token" if chosen is None else f"has {size} tokens, not {chosen}"
        raise UsageError(f"the model {found}", hint="--placeholder ID, any token's")
    return chosen
