"""The seam of trainings: what is trained, by which loss, how it is measured and what is written.

One trainer runs any objective, stores its state next to OUT and resumes from it; a resumed run ends
with the same bytes.
"""

from __future__ import annotations

import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.artifact import ArtifactWriter, write_atomically
from spectool.checkpoint.tensors import read_tensors
from spectool.distill.processes import ALONE, Processes
from spectool.report import SILENT, Reporter, TrainingStarts
from spectool.training import History, Metrics, Recipe, Training


class Objective(ABC):
    """A training, called `name` in reports, of the parameters of `module` that need a gradient.

    `is_split`: several processes hold a part of each parameter.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    is_split = False

    def begin(self) -> None:
        """Make what is left to make when the training begins."""

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
    objective.begin()
    if steps := objective.recipe.steps:
        reporter.event(TrainingStarts(steps, steps * _time_step(objective)))
    training = Training(
        name=objective.name,
        module=objective.module,
        optimizers=[objective.optimizer],
        recipe=objective.recipe,
        accumulate=objective.accumulate,
        # All processes must agree on what is best.
        evaluate=lambda: processes.share(objective.evaluate()),
        reporter=reporter,
        store=_State(writer, processes, is_split=objective.is_split),
    )
    history = training.run()
    objective.write(writer, history)
    return history


def _time_step(objective: Objective) -> float:
    """Time the first step, whose gradient is discarded."""
    began = time.perf_counter()
    objective.accumulate(0)
    objective.module.zero_grad(set_to_none=True)
    return time.perf_counter() - began


@contextlib.contextmanager
def seeded(seed: int | str, device: torch.device) -> Iterator[None]:
    """Seed torch within a block, by a number or by any text; the state before comes back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        number = seed if isinstance(seed, int) else random.Random(seed).getrandbits(63)
        torch.manual_seed(number)
        yield


class _State:
    """Stored training state next to OUT, in two sets of files, of which one is always complete.

    A set is one file, which the first process writes and all read, or a file a process where the
    parameters are split.
    """

    NAMES = ("state-0", "state-1")

    def __init__(
        self, writer: ArtifactWriter | None, processes: Processes, *, is_split: bool
    ) -> None:
        self.writer, self.processes, self.is_split = writer, processes, is_split

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the latest state, if any: tensors and report."""
        latest = None
        if self.writer is not None:
            name = max(self.NAMES, key=self._step)
            if self._step(name) >= 0:
                files = self._files(name)
                latest = list(map(self.writer.path, files)), self.writer.report(files[0])
        latest = self.processes.share(latest)
        if latest is None:
            return None
        paths, report = latest
        with self.processes.together():
            tensors = read_tensors(paths[self.processes.rank if self.is_split else 0])
        return tensors, report

    def agree(self, due: bool) -> bool:
        """Let the first process decide, since the clocks of all differ."""
        return self.processes.share(due) if self.is_split else due

    def save(self, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Write a state in place of the older of the two."""
        paths = None
        if self.writer is not None:
            files = self._files(min(self.NAMES, key=self._step))
            paths = list(map(self.writer.path, files))
        if self.is_split:
            paths = self.processes.share(paths)
        if paths is None:
            return
        with self.processes.together() if self.is_split else contextlib.nullcontext():
            sums = write_atomically(paths[self.processes.rank], tensors, {})
        gathered = self.processes.gather(sums) if self.is_split else [sums]
        if self.writer is not None:
            for path, sums in zip(paths, gathered, strict=True):
                self.writer.add_shard(path.name, sums, report)

    def _files(self, name: str) -> list[str]:
        """List the files of a state by rank."""
        count = self.processes.size if self.is_split else 1
        return [f"{name}{f'-rank-{rank}' if rank else ''}.safetensors" for rank in range(count)]

    def _step(self, name: str) -> int:
        """Return the step after which a state was stored, -1 without a complete one."""
        assert self.writer is not None
        reports = [self.writer.report(file) for file in self._files(name)]
        steps = {-1 if report is None else int(report["step"]) for report in reports}
        return steps.pop() if len(steps) == 1 else -1
