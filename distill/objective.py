"""The seam of trainings: what is trained, by which loss, how it is measured and what is written.

One trainer runs any objective, stores its state next to OUT and resumes from it; a resumed run ends
with the same bytes.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import read_tensors
from spectool.distill.processes import ALONE, Processes
from spectool.report import SILENT, Reporter
from spectool.training import History, Metrics, Recipe, Training


class Objective(ABC):
    """A training, called `name` in reports, of the parameters of `module` that need a gradient."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe

    @abstractmethod
    def accumulate(self, step: int) -> Metrics:
        """Add a step's gradients to the parameters; return metrics with `loss` and `tokens`.

        The result depends on the weights and the step's number only.
        """

    @abstractmethod
    def evaluate(self) -> Metrics:
        """Return metrics on held-out text; the weights of the highest `score` are kept."""

    @abstractmethod
    def write(self, writer: ArtifactWriter | None, history: History) -> None:
        """Write the artifact of the best weights, which the module holds; finish the writer.

        Only the first of several processes has a writer.
        """


def train(
    objective: Objective,
    writer: ArtifactWriter | None,
    *,
    processes: Processes = ALONE,
    reporter: Reporter = SILENT,
) -> History:
    """Train an objective, resuming from the writer's directory, and write its artifact.

    Raises:
        SpectoolError: the loss is not finite, or the disk is full.
    """
    training = Training(
        name=objective.name,
        module=objective.module,
        optimizers=[objective.optimizer],
        recipe=objective.recipe,
        accumulate=objective.accumulate,
        evaluate=objective.evaluate,
        reporter=reporter,
        store=_State(writer, processes),
    )
    history = training.run()
    objective.write(writer, history)
    return history


@contextmanager
def seeded(seed: int | str, device: torch.device) -> Iterator[None]:
    """Seed torch within a block, by a number or by any text; the state before comes back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        number = seed if isinstance(seed, int) else random.Random(seed).getrandbits(63)
        torch.manual_seed(number)
        yield


class _State:
    """Stored training state next to OUT, in two files, of which one is always complete.

    The first process writes; all processes read.
    """

    NAMES = ("state-0.safetensors", "state-1.safetensors")

    def __init__(self, writer: ArtifactWriter | None, processes: Processes) -> None:
        self.writer, self.processes = writer, processes

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the latest state, if any: tensors and report."""
        latest = None
        if self.writer is not None:
            name = max(self.NAMES, key=self._step)
            if self._step(name) >= 0:
                latest = self.writer.path(name), self.writer.report(name) or {}
        latest = self.processes.share(latest)
        return None if latest is None else (read_tensors(latest[0]), latest[1])

    def save(self, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Write a state in place of the older of the two."""
        if self.writer is not None:
            self.writer.write_shard(min(self.NAMES, key=self._step), tensors, {}, report)

    def _step(self, name: str) -> int:
        """Return the step after which a state was stored, -1 without a state."""
        report = None if self.writer is None else self.writer.report(name)
        return -1 if report is None else int(report["step"])
