"""Objective of draft heads: their loss, their metrics on held-out text, and what is stored.

Shapes: R positions in texts, K heads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.decode.heads.artifact import HeadsRecord, lineage
from spectool.decode.heads.base import MAX_TREE_NODES, TOP, Heads
from spectool.decode.tree import best_paths
from spectool.distill.data.texts import chunk
from spectool.distill.losses import HeadLoss, compute_loss, rank_labels, top_tokens
from spectool.distill.objective import Objective, seeded
from spectool.distill.plan import count_tokens, make_batches
from spectool.distill.training_data import GENERATED_TOGETHER, DataPreparation, TrainingData
from spectool.methods import import_method
from spectool.model.loading import checkpoint_dtype
from spectool.training import History, Metrics, Recipe, make_optimizer

# Number of evaluations on held-out text in a training.
_NUM_EVALUATIONS = 20


class HeadsObjective(Objective):
    """Draft heads in training, with their batches and held-out batches.

    Raises:
        CheckpointError: the heads to start from do not fit this target.
    """

    def __init__(self, training_data: TrainingData, preparation: DataPreparation) -> None:
        job, self.processes = preparation.job, preparation.processes
        self.preparation, self.name = preparation, job.method
        target, self.train = training_data.target, training_data.train
        self.device, self.width = target.device, target.width
        self.vocab_size = target.vocab_size
        samples = self.train.samples
        drafter = import_method(job.method, "drafter")
        self.nodes: int = drafter.Config().nodes
        self.seed, self.autocast = job.seed, job.autocast
        size = drafter.Heads.draft_vocab_size(job.config, target.vocab_size)
        init_from = preparation.init_from
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
        self.module = self.heads = fresh.to(target.device).float()
        self.batches = make_batches(samples, job, preparation.setup.seq_len)
        held_out = training_data.held_out
        rows = [[i] for i in range(len(held_out.samples))]
        self.held_out = [held_out.batch(part) for part in chunk(rows, GENERATED_TOGETHER)]
        defaults = self.heads.optimizer_defaults
        assert job.learning_rate is not None
        self.optimizer = make_optimizer(
            job.optimizer,
            self.heads.parameters(),
            rate=job.learning_rate,
            betas=defaults.betas,
            weight_decay=defaults.weight_decay,
        )
        self.recipe = Recipe(
            steps=len(self.batches),
            warmup=job.warmup,
            final=defaults.final,
            every=max(1, len(self.batches) // _NUM_EVALUATIONS),
        )

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

    def _seeded(self, step: str | int) -> AbstractContextManager[None]:
        return seeded(f"{self.seed}/{step}", self.device)

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

    def write(self, writer: ArtifactWriter | None, history: History) -> None:
        """Write the heads in the target's dtype, with their accuracy, best tree and record."""
        setup, job = self.preparation.setup, self.preparation.job
        # Evaluated in the precision in which they are stored.
        dtype = checkpoint_dtype(setup.checkpoint.layout)
        self.heads.to(dtype).float()
        ranks_RK = self.ranks()
        self.measured = self.metrics(ranks_RK)
        paths = best_paths(ranks_RK, nodes=MAX_TREE_NODES, top=TOP)
        self.record = HeadsRecord(
            method=job.method,
            options=job.config.as_dict(),
            target={
                "fingerprint": self.preparation.identity["source"]["fingerprint"],
                "lineage": lineage(setup.checkpoint),
                "hidden_size": self.width,
                "vocab_size": self.vocab_size,
                "tokenizer": setup.tokenizer_digest,
            },
            accuracy=self.measured["accuracy"],
            conditional=self.measured["conditional"],
            tree=[list(path) for path, _ in paths],
            shares=[share for _, share in paths],
            training={
                **self.preparation.identity,
                "steps_done": self.recipe.steps,
                "tokens": count_tokens(self.train.samples, self.batches),
                "places": len(ranks_RK),
                "evaluations": history.evaluations,
            },
        )
        if writer is None:
            return
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.heads.state_dict().items()
        }
        metadata = {key: getattr(self.record, key) for key in ("method", "options", "target")}
        writer.write_shard(HEADS_FILE, tensors, metadata, {})
        writer.keep_only([HEADS_FILE])
        self.record = replace(self.record, checksums=writer.checksums())
        writer.finish({HEADS: self.record.as_bytes()})
