"""Sorted distillation: the first layers of a model become a draft with exits (S2D).

The student is the first N layers of the model with its final norm and lm_head, which all exits
share. Its loss is the mean over the exits e, the last of which is N, of

    KL(p_teacher || p_e)  or  -log p_e(token),   p_e = softmax(lm_head(norm(h_e)))

with h_e the state after the first e layers (Kavehzadeh et al., S2D, 2024, arXiv:2407.01955, which
trains on the tokens of the text). The default is the KL from the whole model: a drafted token is
accepted by the target's distribution, not by the text's, and the whole model is at hand. One draft
serves every target with its tokenizer.

The thresholds of the exits are those of the most tokens per weight that drafting and verification
read, as far as held-out text tells: of its tokens, a share a agrees with the teacher's likeliest
token where the exits of these thresholds are taken, and chains of K tokens then give
(1 - a^(K + 1)) / (1 - a) tokens per forward (Leviathan et al., 2023, equation 1).

Shapes: E exits, B texts of a batch, L tokens, R held-out tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectool import options
from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample
from spectool.distill.data.trajectories import Prompt
from spectool.distill.objectives.base import WeightObjective, WeightTask, read_logits
from spectool.distill.objectives.decoding import MEASURED_TOKENS, tokens_per_forward
from spectool.distill.weights import FullWeights
from spectool.errors import UnsupportedError, UsageError
from spectool.model.cut import count_layers, cut_layers
from spectool.options import option
from spectool.training import Metrics

# Shares of the model's layers of the paper's exits: 6, 9 and 12 of 32.
_SHARES = (6 / 32, 9 / 32, 12 / 32)
# Most tokens of a chain, the default of drafting with a model.
_CHAIN = DraftModelDrafter.Config().depth
# Thresholds that calibration tries, besides 1.
_GRID = [step / 20 for step in range(20)]


class Sorted(WeightObjective):
    """Objective of the first layers of a model, as a draft with exits."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of the draft."""

        exits: str | None = option(
            None, "layers after which it may exit, as 2,3,4; default: 6, 9 and 12 of every 32"
        )
        loss: Literal["kl", "ce"] = option(
            "kl", "learn the teacher's probabilities (kl) or the tokens of the text (ce)"
        )

        def layers(self, count: int) -> list[int]:
            """Return the exits in a model of `count` layers.

            Raises:
                UsageError: they are malformed, or there is no such layer.
            """
            if self.exits is None:
                return sorted({math.ceil(share * count) for share in _SHARES})
            parts = [part.strip() for part in self.exits.split(",")]
            layers = [int(part) for part in parts if part.isdecimal()]
            if len(layers) < len(parts) or layers != sorted({*layers} - {0}):
                raise UsageError(f"--exits {self.exits}: expected rising numbers, as in 2,3,4")
            if layers[-1] >= count:
                raise UsageError(
                    f"--exits {self.exits}: MODEL has {count} layers, and a draft has fewer"
                )
            return layers

    learning_rate = 1e-3
    is_draft = True
    # Held-out drafts are verified by the teacher.
    takes_stored = False

    @classmethod
    def choose_student(cls, source: Checkpoint, config: Any) -> tuple[Checkpoint, Checkpoint]:
        """Return the first layers of the source, and the source as their teacher."""
        layers = config.layers(count_layers(source))
        thresholds = [0.5] * (len(layers) - 1) + [0.0]
        exits = {"layers": layers, "thresholds": thresholds}
        return cut_layers(source, layers[-1], exits=exits), source

    def __init__(self, task: WeightTask, config: Sorted.Config) -> None:
        self.config = config
        self.layers: list[int] = task.source.layout.config["exits"]["layers"]
        self.logits_per_token = len(self.layers)
        # Refuses a model that cannot draft.
        AttentionTarget(task.model, forward="modules")
        super().__init__(task, FullWeights(task))
        room = task.texts.seq_len - MEASURED_TOKENS
        held_out = [sample for batch in task.texts.held_out for sample in batch]
        # To decode after the first half of each text.
        ends = [max(1, min(len(sample.tokens) // 2, room)) for sample in held_out]
        pairs = zip(held_out, ends, strict=True)
        self.prompts = [Prompt(sample.tokens[:end], [], sample.ends) for sample, end in pairs]
        self._blocks = [task.model.get_submodule(name) for name in task.architecture.blocks]

    def begin(self) -> None:
        super().begin()
        assert self.task.teacher is not None, "the whole model teaches where no other does"
        self._runner = Runner(self.task.teacher)

    def losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """Return the mean over the exits of the means of `WeightObjective.losses`."""
        batch = self.make_batch(samples, with_teacher=self.config.loss == "kl")
        pairs = [batch.losses(logits_BLV) for logits_BLV in self.read_exits(batch.tokens_BL)]
        divergences = [kl for _, kl in pairs if kl is not None]
        nats = torch.stack([nats for nats, _ in pairs]).mean()
        return nats, torch.stack(divergences).mean() if divergences else None

    def read_exits(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits [E, B, L - 1, V] after each exit, in float32, in one pass.

        The last layer hands the states of all exits on, as so many texts.

        Raises:
            UnsupportedError: the model mixes the texts of a batch after its layers.
        """
        states: list[Tensor] = []

        def keep(block: Any, inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        def join(block: Any, inputs: Any, output: Any) -> Any:
            joined = torch.cat(states)
            return (joined, *output[1:]) if isinstance(output, tuple) else joined

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(self._blocks[layer - 1].register_forward_hook(keep))
            hooks.enter_context(self._blocks[-1].register_forward_hook(join))
            logits = read_logits(self.module, tokens_BL)
        if len(logits) != len(self.layers) * len(tokens_BL):
            raise UnsupportedError(f"{self.task.source.name}: cannot compute several exits at once")
        return logits.view(len(self.layers), *tokens_BL.shape[:1], *logits.shape[1:])

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return held-out metrics; the score is `tokens_per_cost`, one pass of the teacher being 1.

        `agreement_at_<exit>` is the share of tokens whose likeliest one is the teacher's.
        """
        self.module.eval()
        nats, kl, total = [0.0] * len(self.layers), [0.0] * len(self.layers), 0.0
        sure, agrees = [], []
        for samples in self.task.texts.held_out:
            batch = self.make_batch(samples)
            assert batch.teacher_RV is not None
            count = sum(sum(sample.loss_mask[1:]) for sample in samples)
            total += count
            logits_EBLV = self.read_exits(batch.tokens_BL)
            for at, logits_BLV in enumerate(logits_EBLV):
                mean_nats, mean_kl = batch.losses(logits_BLV)
                nats[at] += float(mean_nats) * count
                kl[at] += 0.0 if mean_kl is None else float(mean_kl) * count
            logits_ERV = logits_EBLV[:, batch.mask_BL]
            sure.append(logits_ERV.softmax(-1).amax(-1))
            agrees.append(logits_ERV.argmax(-1) == batch.teacher_RV.argmax(-1))
        processes = self.task.processes
        nats, kl = ([each / total for each in processes.sum(sums)] for sums in (nats, kl))
        agrees_ER = torch.cat(agrees, dim=1)
        parts = processes.gather((torch.cat(sure, dim=1).cpu(), agrees_ER.cpu()))
        sure_all, agrees_all = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        thresholds = calibrate(sure_all, agrees_all, self._costs())
        metrics: Metrics = {"perplexity": math.exp(fmean(nats)), "kl": fmean(kl)}
        agreed = processes.sum(agrees_ER.sum(1).tolist())
        for at, layer in enumerate(self.layers):
            metrics[f"perplexity_at_{layer}"] = math.exp(nats[at])
            metrics[f"kl_at_{layer}"] = kl[at]
            metrics[f"agreement_at_{layer}"] = agreed[at] / total
            metrics[f"threshold_at_{layer}"] = thresholds[at]
        metrics |= self._measure(thresholds)
        return metrics | {"score": metrics["tokens_per_cost"]}

    def _measure(self, thresholds: Sequence[float]) -> Metrics:
        """Draft for the teacher with these thresholds."""
        config = DraftModelDrafter.Config(exits="/".join(map(str, thresholds)))
        drafter = DraftModelDrafter(self.task.model, config, target=self._runner.target)
        draft: Any = drafter.draft_model
        self._runner.use(drafter)
        rate, results = tokens_per_forward(self._runner, self.prompts, MEASURED_TOKENS)
        passes = dict(zip((exit.layer for exit in draft.exits), draft.row_passes, strict=True))
        cost = self._costs().of_passes(passes) / sum(result.forwards for result in results)
        return {"tokens_per_forward": rate, "tokens_per_cost": rate / (1 + cost)}

    def _costs(self) -> Costs:
        target, student = self._runner.target, self.task.model
        heads: Any = [each.get_output_embeddings() for each in (target.model, student)]
        whole = sum(map(_num_weights, (*target.layers(), heads[0])))
        layers = {n: sum(map(_num_weights, self._blocks[:n])) for n in self.layers}
        return Costs(layers, _num_weights(heads[1]), whole)

    def result_source(self, best: Metrics) -> Checkpoint:
        """Return the source with the calibrated thresholds in its configuration."""
        source = self.task.source
        thresholds = [best[f"threshold_at_{layer}"] for layer in self.layers]
        exits = {"layers": self.layers, "thresholds": thresholds}
        config = {**source.layout.config, "exits": exits}
        return replace(source, layout=replace(source.layout, config=config))


@dataclass(frozen=True, slots=True)
class Costs:
    """Weights that passes read: of the layers up to each exit, of the lm_head, of the target."""

    layers: dict[int, int]
    head: int
    target: int

    def of_passes(self, passes: Mapping[int, float]) -> float:
        """Return the cost, in passes of the target, of passes of the layers that end at exits."""
        before = cost = 0.0
        for layer, count in passes.items():
            cost += count * (self.layers[layer] - before + self.head)
            before = self.layers[layer]
        return cost / self.target


def calibrate(sure_ER: Tensor, agrees_ER: Tensor, costs: Costs) -> list[float]:
    """Return the thresholds of the most expected tokens per cost.

    `sure_ER` are the largest probabilities at the exits, `agrees_ER` whether their tokens are the
    teacher's. The last threshold is 0.
    """

    def worth(thresholds: Sequence[float]) -> float:
        left_R = torch.ones_like(agrees_ER[0])
        passes: dict[int, float] = {}
        agreed = 0.0
        for at, layer in enumerate(costs.layers):
            if thresholds[at] < 1:
                passes[layer] = float(left_R.double().mean())
                taken_R = left_R & (sure_ER[at] > thresholds[at])
                agreed += float((taken_R & agrees_ER[at]).double().mean())
                left_R = left_R & ~taken_R
        tokens = sum(agreed**length for length in range(_CHAIN + 1))
        return tokens / (1 + _CHAIN * costs.of_passes(passes))

    last = len(agrees_ER) - 1
    # Each exit alone, then one threshold after another as long as that gains.
    best = max(([1.0] * at + [0.0] * (last + 1 - at) for at in range(last + 1)), key=worth)
    before: list[float] = []
    while best != before:
        before = best
        for at in range(last):
            tried = [[*best[:at], threshold, *best[at + 1 :]] for threshold in (*_GRID, 1.0)]
            best = max((best, *tried), key=worth)
    return best


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
