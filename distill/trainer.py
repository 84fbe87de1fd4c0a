"""Trainer of draft heads: losses and gradients per step, and metrics on held-out text.

Shapes: R positions in texts, K heads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectool.decode.heads.base import MAX_TREE_NODES, TOP, Heads
from spectool.decode.heads.formats.base import PretrainedHeads
from spectool.decode.tree import best_paths
from spectool.distill.data.texts import chunk
from spectool.distill.losses import HeadLoss, compute_loss, rank_labels, top_tokens
from spectool.distill.plan import Job, make_batches
from spectool.distill.processes import Processes
from spectool.distill.training_data import GENERATED_TOGETHER, TrainingData
from spectool.methods import resolve
from spectool.training import Metrics


class HeadTrainer:
    """Draft heads in training, with their batches and held-out batches.

    Raises:
        CheckpointError: the heads to `init_from` do not fit this target.
    """

    def __init__(
        self,
        training_data: TrainingData,
        job: Job,
        seq_len: int,
        processes: Processes,
        init_from: PretrainedHeads | None = None,
    ) -> None:
        self.processes = processes
        target, self.train = training_data.target, training_data.train
        self.device = target.device
        samples = self.train.samples
        drafter = resolve(job.method, "drafter")
        self.nodes: int = drafter.Config().nodes
        self.seed, self.autocast = job.seed, job.autocast
        size = drafter.Heads.draft_vocab_size(job.config, target.vocab_size)
        token_map = None if init_from is None else init_from.token_map
        if size and init_from is None:
            loss_tokens = [
                token
                for sample in samples
                for token, in_loss in zip(sample.tokens, sample.loss_mask, strict=True)
                if in_loss
            ]
            token_map = top_tokens(loss_tokens, count=size, vocab=target.vocab_size)
            token_map = token_map.to(target.device)
        with self._seeded("fresh"):
            fresh: Heads = drafter.Heads(job.config, target.model, token_map)
        if init_from is not None:
            init_from.fill(fresh)
        self.heads = fresh.to(target.device).float()
        self.batches = make_batches(samples, job, seq_len)
        self.steps = len(self.batches)
        held_out = training_data.held_out
        rows = [[i] for i in range(len(held_out.samples))]
        self.held_out = [held_out.batch(part) for part in chunk(rows, GENERATED_TOGETHER)]

    def accumulate(self, step: int) -> Metrics:
        """Add up the gradient of a step and return its metrics.

        `losses` holds the mean loss of each head and `loss` their mean; `tokens` excludes padding.
        Each process computes its part of the batch, which may be empty.
        """
        rows, processes = self.batches[step], self.processes
        done = HeadLoss(self.heads.num_heads)
        if part := processes.part(rows):
            # The first process draws the same random numbers as a single process.
            seeded_by = step if processes.first else f"{step}/{processes.rank}"
            batch = self.train.batch(part)
            with self._seeded(seeded_by), self._autocast():
                done = compute_loss(self.heads, batch, self._total)
        else:
            # Takes part in the reduction that the other processes wait for.
            self._total(done.counts)
        processes.sum_gradients(self.heads.parameters())
        sums = processes.sum([*done.loss, *done.counts])
        pairs = zip(sums[: len(done.loss)], sums[len(done.loss) :], strict=True)
        means = [loss / max(1, count) for loss, count in pairs]
        return {
            "loss": sum(means) / len(means),
            "losses": means,
            "tokens": sum(len(self.train.samples[i].tokens) for row in rows for i in row),
        }

    def _total(self, counts: list[int]) -> list[int]:
        """Sum each head's number of positions in the loss over all processes."""
        return [int(count) for count in self.processes.sum(counts)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.autocast is not None
        )

    @contextmanager
    def _seeded(self, step: str | int) -> Iterator[None]:
        """Seed torch from the seed and the step alone, so that a resumed run draws the same."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.seed}/{step}").getrandbits(63))
            yield

    def ranks(self) -> Tensor:
        """Return the ranks [R, K] of the true tokens among each head's guesses on held-out text."""
        with self._autocast():
            ranks = [rank_labels(self.heads, batch) for batch in self.held_out]
        return torch.cat(ranks) if ranks else torch.zeros(0, 0)

    def evaluate(self) -> Metrics:
        """Return the held-out metrics of the current heads."""
        return self.metrics(self.ranks())

    def metrics(self, ranks_RK: Tensor) -> Metrics:
        """Compute accuracies by head and `score`, the tokens per forward with the best tree.

        `conditional[k]`: accuracy of head k where the first guesses of all heads before it are
        right.
        """
        right_RK = (ranks_RK == 0).double()
        reached_RK = right_RK.cumprod(-1)
        before_K = torch.cat([reached_RK.new_tensor([len(ranks_RK)]), reached_RK.sum(0)[:-1]])
        paths = best_paths(ranks_RK, nodes=MAX_TREE_NODES, top=TOP)
        return {
            "score": self.heads.expected(paths, self.nodes),
            "accuracy": right_RK.mean(0).tolist(),
            "conditional": (reached_RK.sum(0) / before_K.clamp(min=1)).tolist(),
        }

    def step_seconds(self) -> float:
        """Time the first step, whose gradient is discarded."""
        start = time.perf_counter()
        self.accumulate(0)
        self.heads.zero_grad(set_to_none=True)
        return time.perf_counter() - start
