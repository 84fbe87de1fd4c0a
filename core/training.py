"""The one training loop: accumulate a gradient, step, look at held-out data, keep the best weights.

Knows neither models nor losses. What happens at a step depends on the state and the step's number
alone, and the state is stored whole, so a run that was killed ends with the same weights as one
that was not. Nothing is pickled: tensors are stored as tensors, all else as JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectool.errors import SpectoolError, UnsupportedError, require

Metrics = dict[str, Any]

# Bytes that an optimiser keeps of a parameter: two moments, in float32 or as 8-bit codes.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2}


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS`. Of small tensors also `adamw8bit` keeps float32 moments.

    Raises:
        MissingExtra: `adamw8bit` without bitsandbytes.
    """
    kind: Any = torch.optim.AdamW
    if name == "adamw8bit":
        kind = require("bitsandbytes", extra="bnb", reason=f"--optimizer {name}").optim.AdamW8bit
    made: torch.optim.Optimizer = kind(parameters, lr=rate, betas=betas, weight_decay=weight_decay)
    return made


def check_optimizer(name: str, device: torch.device) -> None:
    """Take one step, on a matrix large enough for 8-bit codes.

    Raises:
        MissingExtra: its package is not installed.
        UnsupportedError: it does not run on this device, as in bitsandbytes before 0.49 on a CPU.
    """
    parameter = nn.Parameter(torch.ones(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    made = make_optimizer(name, [parameter], rate=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    try:
        made.step()
    except Exception as error:
        # A foreign kernel that is not there may fail in any way.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedError(
            f"--optimizer {name} does not run on {device.type} here: {reason}",
            hint="--optimizer adamw does",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast. The learning rates of the optimisers' groups are peaks.

    They rise over the first `warmup` share of the steps and fall along a cosine to the share
    `final` of the peak. `clip` bounds the gradient's norm. Held-out data is looked at every `every`
    steps, at the start and at the end.
    """

    steps: int
    warmup: float = 0.05
    final: float = 0.0
    clip: float = 1.0
    every: int = 100

    def share(self, step: int) -> float:
        """The share of the peak learning rate at a step, counted from 0."""
        rising = max(1, math.ceil(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class Store(Protocol):
    """Where a run's state outlives the process."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole state; None if there is none."""

    def save(self, tensors: Mapping[str, Tensor], said: dict[str, Any]) -> None:
        """Keep this state instead."""


@dataclass(slots=True)
class History:
    """What a run has seen: figures of its looks at held-out data, each with its `step`."""

    evaluations: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Training:
    """A run over a module's parameters that require a gradient.

    `accumulate(step)` adds to the gradients and returns the step's figures, `loss` among them;
    `evaluate()` returns figures with a `score`, of which the highest is kept. `watch(step, figures,
    look)` hears of every step, its `learning_rate` (the first group's), its `gradient_norm` before
    it was clipped and its `seconds`. The state is stored at most every `save_seconds`, and so
    seldom that storing it takes `save_share` of the time at most.

    Raises:
        SpectoolError: a loss that is NaN or infinite.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    recipe: Recipe
    accumulate: Callable[[int], Metrics]
    evaluate: Callable[[], Metrics]
    watch: Callable[[int, Metrics, Metrics | None], None] = lambda step, metrics, evaluation: None
    store: Store | None = None
    save_seconds: float = 60.0
    save_share: float = 0.05
    history: History = field(default_factory=History)

    def run(self) -> History:
        """Train, and leave the best weights in the module."""
        peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        step, best = self._resume()
        began = saved = time.monotonic()
        cost = 0.0
        if step == 0:
            best = self._look(0, best)
        while step < self.recipe.steps:
            started = time.monotonic()
            share = self.recipe.share(step)
            for optimizer, rates in zip(self.optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = share * peak
                optimizer.zero_grad(set_to_none=True)
            metrics = self.accumulate(step)
            if not math.isfinite(metrics["loss"]):
                raise SpectoolError(
                    f"the loss is {metrics['loss']} at step {step + 1}: training diverged",
                    hint="start anew with --overwrite and a lower learning rate",
                )
            norm = nn.utils.clip_grad_norm_(self._parameters().values(), self.recipe.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            metrics["learning_rate"] = share * peaks[0][0]
            metrics["gradient_norm"] = float(norm)
            metrics["seconds"] = time.monotonic() - started
            step += 1
            evaluation = None
            if step % self.recipe.every == 0 or step == self.recipe.steps:
                best = self._look(step, best)
                evaluation = self.history.evaluations[-1]
            now = time.monotonic()
            self.history.seconds += now - began
            began = now
            wait = max(self.save_seconds, cost / self.save_share)
            if self.store is not None and now - saved > wait:
                self._save(step, best)
                saved = time.monotonic()
                cost = saved - now
            self.watch(step, metrics, evaluation)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(best[name])
        return self.history

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _look(self, step: int, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Look at held-out data; the best weights so far, which may be those of now."""
        found = {"step": step, **self.evaluate()}
        self.history.evaluations.append(found)
        if self.history.best is None or found["score"] > self.history.best["score"]:
            self.history.best = found
            best = {name: p.detach().cpu().clone() for name, p in self._parameters().items()}
        return best

    def _save(self, step: int, best: Mapping[str, Tensor]) -> None:
        assert self.store is not None
        tensors = {f"weights.{name}": p.detach() for name, p in self._parameters().items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        numbers: dict[str, float] = {}
        for key, value in self._optimizer_state():
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                numbers[key] = value
        said = {
            "numbers": numbers,
            "step": step,
            "evaluations": self.history.evaluations,
            "best": self.history.best,
            "seconds": self.history.seconds,
        }
        self.store.save(tensors, said)

    def _optimizer_state(self) -> Iterator[tuple[str, Any]]:
        """Tensors and numbers. bitsandbytes puts some of its own into a dictionary of theirs."""
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    parts = value if isinstance(value, dict) else {key: value}
                    for name, part in parts.items():
                        yield f"optimizer.{number}.{index}.{name}", part

    def _resume(self) -> tuple[int, dict[str, Tensor]]:
        """Steps done and the best weights so far, everything else put back in its place."""
        found = self.store.load() if self.store is not None else None
        if found is None:
            return 0, {}
        tensors, said = found
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[f"weights.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            prefix = f"optimizer.{number}."
            for key, value in {**tensors, **said["numbers"]}.items():
                if key.startswith(prefix):
                    index, _, name = key.removeprefix(prefix).partition(".")
                    state.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history = History(said["evaluations"], said["best"], said["seconds"])
        best = {
            key.removeprefix("best."): value
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        return said["step"], best
