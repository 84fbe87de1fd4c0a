"""Objective of an acceptance head: its loss on mixed texts, and its calibration on real chains.

For a text X, the draft model's q and the target's p after each token, a token Y is drawn from q at
every position. Its label is the probability that the target accepts it, and not one draw:

    a = min(1, p(Y) / q(Y))

The draft model then reads a mixed text, which has X at a share of the positions and Y elsewhere
(token mixing: while decoding, the head reads states after drafted tokens). The loss is on the Y,
over a and over w (1 - a) for rejection, divided by the sum of all these weights:

    - sum[a log s_1 + w (1 - a) log s_0] / sum[a + w (1 - a)],  s = softmax of the head's logits

The labels are those after the text X, although the head reads the mixed text, as in the paper.
Held-out metrics have no such mismatch: the draft model continues held-out texts by chains as in
decoding, and the target's p is that after the chain. Both are made once, since neither model
changes. At temperature 0, q and p are one-hot: a is 1 where both prefer the same token.

Source: Huang et al., SpecDec++, 2024 (arXiv:2405.19715), section 3.3. Shapes: B texts, L tokens, R
drafted tokens, D hidden width of the draft model, V vocabulary of the target.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.decode.heads.acceptance import METHOD, AcceptanceHead
from spectool.decode.heads.artifact import HeadsRecord
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Needs
from spectool.decode.sampling import not_finite_logits, pick
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample, pad
from spectool.distill.data.texts import chunk
from spectool.distill.objective import Objective, seeded
from spectool.distill.objectives.base import read_logits
from spectool.distill.teacher import read_features
from spectool.training import History, Metrics, OptimizerDefaults, Recipe, make_optimizer

# AdamW with the learning rate and the schedule of the paper.
OPTIMIZER = OptimizerDefaults(rate=5e-5)
# Number of evaluations on held-out chains in a training.
_NUM_EVALUATIONS = 20
# Held-out chains: tokens of each, chains of a text, and chains that are drafted together.
_LENGTH, _CHAINS, _TOGETHER = 8, 8, 32
_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """A draft model and its target, both frozen, and the temperature that they are decoded at."""

    draft: AttentionTarget
    target: Any
    temperature: float

    @property
    def vocab_size(self) -> int:
        """Return the size of the target's vocabulary."""
        size: int = self.target.config.get_text_config(decoder=True).vocab_size
        return size

    def draft_probs(self, logits_RV: Tensor) -> Tensor:
        """Return the draft model's probabilities q [R, V], without ids that the target lacks."""
        return self.probs(logits_RV[:, : self.vocab_size])

    def probs(self, logits_RV: Tensor) -> Tensor:
        """Return probabilities [R, V] at the temperature, one-hot at 0."""
        if self.temperature == 0:
            return F.one_hot(logits_RV.argmax(-1), logits_RV.shape[1]).float()
        return SamplingParams(temperature=self.temperature).probs(logits_RV[None])[0]


def acceptance(p_RV: Tensor, q_RV: Tensor, drawn_R: Tensor) -> Tensor:
    """Return the probability [R] that tokens drawn from q are accepted: min(1, p / q)."""
    p_R, q_R = (each.gather(1, drawn_R[:, None])[:, 0] for each in (p_RV, q_RV))
    return (p_R / q_R).clamp(max=1)


def weighted_loss(logits_R2: Tensor, label_R: Tensor, reject_weight: float) -> Tensor:
    """Return the loss of the module's docstring."""
    log_R2 = logits_R2.log_softmax(-1)
    rejected_R = reject_weight * (1 - label_R)
    total = (label_R + rejected_R).sum().clamp(min=1e-9)
    return -(label_R * log_R2[:, 1] + rejected_R * log_R2[:, 0]).sum() / total


def calibrate(predicted_R: Tensor, seen_R: Tensor) -> Metrics:
    """Compare predicted and seen acceptance, also in ten bins of equal width of the prediction.

    `calibration_error` is the mean distance of both over the bins, weighted by their counts.
    """
    bin_R = (predicted_R * _NUM_BINS).long().clamp(0, _NUM_BINS - 1)
    bins = []
    for number in range(_NUM_BINS):
        inside_R = bin_R == number
        if count := int(inside_R.sum()):
            means = predicted_R[inside_R].mean(), seen_R[inside_R].mean()
            bins.append({"tokens": count, "predicted": float(means[0]), "seen": float(means[1])})
    away = sum(each["tokens"] * abs(each["predicted"] - each["seen"]) for each in bins)
    return {
        "predicted": float(predicted_R.mean()),
        "seen": float(seen_R.mean()),
        "calibration_error": away / len(predicted_R),
        "calibration": bins,
    }


@torch.no_grad()
def draft_chains(
    pair: Pair, samples: Sequence[Sample], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draft chains inside of texts; yield the states [R, D] and labels [R] of their tokens.

    Tokens of one depth of some chains come together.
    """
    context = min(pair.draft.context, max(len(sample.tokens) for sample in samples) + _LENGTH)
    beginnings = []
    for sample in samples:
        ends = range(1, min(len(sample.tokens), context - _LENGTH + 1))
        known = [end for end in ends if sample.loss_mask[end]]
        chosen = rng.sample(known, min(_CHAINS, len(known)))
        beginnings += [sample.tokens[:end] for end in chosen]
    for texts in chunk(beginnings, _TOGETHER):
        yield from _draft_together(pair, texts, rng)


def _draft_together(
    pair: Pair, texts: Sequence[list[int]], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draft a chain after each text, and compare it with the target."""
    draft, chains = pair.draft, [list(text) for text in texts]
    cache = draft.cache(len(texts), draft.span(max(map(len, texts)) + _LENGTH))
    states, laws, tokens = [], [], []
    logits_BV = draft.prefill(cache, texts).logits_BV
    for _ in range(_LENGTH):
        laws.append(pair.draft_probs(logits_BV))
        numbers = [rng.random() for _ in texts]
        uniform_B = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
        tokens.append(pick(laws[-1], uniform_B))
        new = [[token] for token in tokens[-1].tolist()]
        for chain, added in zip(chains, new, strict=True):
            chain += added
        done = draft.prefill(cache, new, Needs(final=True))
        states.append(torch.stack([by_name["final"][-1] for by_name in done.features]))
        logits_BV = done.logits_BV
    tokens_BL = pad([Sample(chain, [False] * len(chain)) for chain in chains])[0]
    logits_BLV = read_logits(pair.target, tokens_BL.to(draft.device))
    rows_B = torch.arange(len(texts), device=draft.device)
    last_B = torch.tensor([len(text) - 1 for text in texts], device=draft.device)
    for depth, (state_BD, q_BV, token_B) in enumerate(zip(states, laws, tokens, strict=True)):
        p_BV = pair.probs(logits_BLV[rows_B, last_B + depth])
        # A copy: what inference mode made cannot be in a loss.
        yield state_BD.clone().float(), acceptance(p_BV, q_BV, token_B).clone()


@dataclass(frozen=True, slots=True)
class AcceptanceTexts:
    """Texts to train on, the indices of those of each step, and held-out texts."""

    samples: Sequence[Sample]
    steps: Sequence[Sequence[int]]
    held_out: Sequence[Sample]


class AcceptanceObjective(Objective):
    """An acceptance head in training. `identity` has the seed; `record` lacks the training.

    Raises:
        SpectoolError: a model gives logits that are NaN or infinite.
    """

    name = METHOD

    def __init__(
        self,
        pair: Pair,
        config: AcceptanceHead.Config,
        texts: AcceptanceTexts,
        identity: dict[str, Any],
        record: HeadsRecord,
    ) -> None:
        self.pair, self.config, self.texts = pair, config, texts
        self.identity, self.record = identity, record
        device = pair.draft.device
        with seeded(f"{identity['seed']}/fresh", torch.device("cpu")):
            head = AcceptanceHead(config, pair.draft.width)
        self.module = self.head = head.to(device, torch.float32)
        drafted = list(draft_chains(pair, texts.held_out, random.Random(f"{identity['seed']}")))
        self.state_RD, self.label_R = (torch.cat(each) for each in zip(*drafted, strict=True))
        if not (self.state_RD.isfinite().all() and self.label_R.isfinite().all()):
            raise not_finite_logits("the model or its draft model")
        self.optimizer = make_optimizer(
            identity["optimizer"],
            self.head.parameters(),
            rate=identity["learning_rate"],
            betas=OPTIMIZER.betas,
            weight_decay=OPTIMIZER.weight_decay,
        )
        steps = len(texts.steps)
        self.recipe = Recipe(
            steps=steps, warmup=identity["warmup"], every=max(1, steps // _NUM_EVALUATIONS)
        )

    def accumulate(self, step: int) -> Metrics:
        samples = [self.texts.samples[i] for i in self.texts.steps[step]]
        state_RD, label_R = self.mix(samples, f"{self.identity['seed']}/{step}")
        loss = weighted_loss(self.head(state_RD), label_R, self.config.reject_weight)
        torch.autograd.backward(loss)
        return {
            "loss": float(loss.detach()),
            "tokens": sum(len(sample.tokens) for sample in samples),
        }

    @torch.no_grad()
    def mix(self, samples: Sequence[Sample], seed: str) -> tuple[Tensor, Tensor]:
        """Return the states [R, D] of drafted tokens in mixed texts, and their labels [R]."""
        pair, device = self.pair, self.pair.draft.device
        tokens_BL, in_loss_BL = (each.to(device) for each in pad(samples))
        rows_BL = in_loss_BL[:, 1:]
        p_RV = pair.probs(read_logits(pair.target, tokens_BL)[rows_BL])
        q_RV = pair.draft_probs(read_logits(pair.draft.model, tokens_BL)[rows_BL])
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        uniform_2R = torch.rand(2, len(q_RV), dtype=torch.float64, generator=generator).to(device)
        drawn_R = pick(q_RV, uniform_2R[0])
        label_R = acceptance(p_RV, q_RV, drawn_R)
        is_drawn_R = uniform_2R[1] >= self.config.data_share
        mixed_BL = tokens_BL.clone()
        mixed_BL[:, 1:][rows_BL] = torch.where(is_drawn_R, drawn_R, tokens_BL[:, 1:][rows_BL])
        state_BLD = read_features(pair.draft, mixed_BL, Needs(final=True))["final"]
        return state_BLD[:, 1:][rows_BL][is_drawn_R], label_R[is_drawn_R]

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return the calibration on held-out chains; the score is minus the loss there."""
        logits_R2 = self.head(self.state_RD)
        loss = weighted_loss(logits_R2, self.label_R, self.config.reject_weight)
        predicted_R = self.head.probs(self.state_RD)
        return {"score": -float(loss), **calibrate(predicted_R.cpu(), self.label_R.cpu())}

    def write(self, writer: ArtifactWriter | None, history: History) -> None:
        """Write the head in float32, with its calibration."""
        assert writer is not None, "one process trains it"
        self.measured = self.evaluate()
        training = {
            **self.identity,
            "steps_done": self.recipe.steps,
            "places": len(self.label_R),
            "calibration": self.measured,
            "evaluations": history.evaluations,
        }
        self.record = replace(self.record, training=training)
        metadata = {key: getattr(self.record, key) for key in ("method", "options", "target")}
        writer.write_shard(HEADS_FILE, self.head.state_dict(), metadata, {})
        writer.keep_only([HEADS_FILE])
        self.record = replace(self.record, checksums=writer.checksums())
        writer.finish({HEADS: self.record.as_bytes()})


def count_places(samples: Sequence[Sample]) -> int:
    """Count the places in texts where a held-out chain may begin."""
    return sum(itertools.chain.from_iterable(sample.loss_mask[1:] for sample in samples))
