"""The heads of a training, with what they are taught and measured on.

Shapes: B texts of a batch, L tokens of each, R places, K heads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectool.decode.heads.base import MOST_NODES, TOP, HeadLoss, Heads, frequent
from spectool.decode.heads.convert import PretrainedHeads
from spectool.decode.tree import best_paths
from spectool.distill.data.texts import parts
from spectool.distill.plan import Job, steps_of
from spectool.distill.processes import Processes
from spectool.distill.training_data import WRITTEN_TOGETHER, TrainingData
from spectool.methods import resolve
from spectool.training import Metrics


class HeadTrainer:
    """See the module docstring."""

    def __init__(
        self,
        training_data: TrainingData,
        job: Job,
        seq_len: int,
        processes: Processes,
        init_from: PretrainedHeads | None = None,
    ) -> None:
        """Raises: CheckpointError: what to `init_from` with is not for this target."""
        self.processes = processes
        target, self.own = training_data.target, training_data.own
        self.device = target.device
        samples = self.own.samples
        drafter = resolve(job.method, "drafter")
        self.nodes: int = drafter.Config().nodes
        self.seed, self.autocast = job.seed, job.autocast
        size = drafter.Heads.num_guessed(job.config, target.vocab_size)
        token_map = None if init_from is None else init_from.token_map
        if size and init_from is None:
            said = [
                t
                for s in samples
                for t, loss_mask in zip(s.tokens, s.loss_mask, strict=True)
                if loss_mask
            ]
            token_map = frequent(said, count=size, vocab=target.vocab_size).to(target.device)
        with self._seeded("fresh"):
            fresh: Heads = drafter.Heads(job.config, target.model, token_map)
        if init_from is not None:
            init_from.fill(fresh)
        self.heads = fresh.to(target.device).float()
        self.batches = steps_of(samples, job, seq_len)
        self.steps = len(self.batches)
        unseen = [[i] for i in range(len(training_data.unseen.samples))]
        self.held_out = [
            training_data.unseen.batch(part) for part in parts(unseen, WRITTEN_TOGETHER)
        ]

    def accumulate(self, step: int) -> Metrics:
        """The gradient of one batch; `loss` is the mean over heads, `tokens` are not padding.

        Of several processes each takes a part, which is none where there are fewer texts.
        """
        rows, processes = self.batches[step], self.processes
        done = HeadLoss(self.heads.num_heads)
        if part := processes.part(rows):
            # The first process draws as one alone would.
            seeded_by = step if processes.first else f"{step}/{processes.rank}"
            batch = self.own.batch(part)
            with self._seeded(seeded_by), self._autocast():
                done = self.heads.compute_loss(batch, self._total)
        else:
            self._total(done.places)
        processes.sum_gradients(self.heads.parameters())
        sums = processes.sum([*done.loss, *done.places])
        pairs = zip(sums[: len(done.loss)], sums[len(done.loss) :], strict=True)
        means = [loss / max(1, places) for loss, places in pairs]
        return {
            "loss": sum(means) / len(means),
            "losses": means,
            "tokens": sum(len(self.own.samples[i].tokens) for row in rows for i in row),
        }

    def _total(self, places: list[int]) -> list[int]:
        """The places by head of a step, of those of this process."""
        return [int(count) for count in self.processes.sum(places)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.autocast is not None
        )

    @contextmanager
    def _seeded(self, what: str | int) -> Iterator[None]:
        """Random numbers by seed and step alone: a resumed run draws the same."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.seed}/{what}").getrandbits(63))
            yield

    def ranks(self) -> Tensor:
        """Ranks [R, K] of the true tokens at all places of held-out text."""
        with self._autocast():
            found = [self.heads.ranks(batch) for batch in self.held_out]
        return torch.cat(found) if found else torch.zeros(0, 0)

    def evaluate(self) -> Metrics:
        """The figures of the heads as they are now."""
        return self.metrics(self.ranks())

    def metrics(self, ranks_RK: Tensor) -> Metrics:
        """Held-out accuracies, and as `score` the tokens per forward that the best tree brings.

        `conditional[k]`: how often head k's first guess is right where those before it were.
        """
        right_RK = (ranks_RK == 0).double()
        reached_RK = right_RK.cumprod(-1)
        before_K = torch.cat([reached_RK.new_tensor([len(ranks_RK)]), reached_RK.sum(0)[:-1]])
        paths = best_paths(ranks_RK, nodes=MOST_NODES, top=TOP)
        return {
            "score": self.heads.expected(paths, self.nodes),
            "accuracy": right_RK.mean(0).tolist(),
            "conditional": (reached_RK.sum(0) / before_K.clamp(min=1)).tolist(),
        }

    def step_seconds(self) -> float:
        """The time of a step, by trying the first; its gradient is thrown away."""
        start = time.perf_counter()
        self.accumulate(0)
        self.heads.zero_grad(set_to_none=True)
        return time.perf_counter() - start
