"""Training loop: accumulate gradients, step, evaluate on held-out data, keep the best weights.

Knows neither models nor losses, only the data that draft heads share with theirs. A step depends
only on the stored state and its number, so an interrupted and resumed run ends with the same
weights as an uninterrupted one. Nothing is pickled: tensors are stored as tensors, all else as
JSON.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from spectool.errors import SpectoolError, UnsupportedError, require
from spectool.report import SILENT, Reporter, TrainingStep

Metrics = dict[str, Any]

# Bytes of optimizer state per parameter: two moments, in float32 or as 8-bit codes.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Texts that drafters are trained on: tokens [B, L] and their features [B, L, D].

    `loss_mask_BL` marks the tokens whose prediction is in the loss; padding at the right never is.
    With sequence packing, `segments_BL` numbers the text that each token belongs to, padding
    apart. `extra_rows(anchors_BA, rows, inject)` passes extra rows next to the texts, for drafters
    that inject some (`distill.teacher.read_extra_rows`).
    """

    tokens_BL: Tensor
    loss_mask_BL: Tensor
    features: Mapping[str, Tensor]
    segments_BL: Tensor | None = None
    extra_rows: Callable[..., Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """Loss of draft heads: the sum over heads k of decay^k times the mean over positions.

    `target`: cross entropy against the text's `labels`, the target's `probs` (times
    `probs_weight`) or both; plus `state_weight` times the smooth L1 distance (mean over the width)
    from the target's final state at the token before.
    """

    target: Literal["labels", "probs", "both"] = "labels"
    decay: float = 1.0
    probs_weight: float = 1.0
    state_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerDefaults:
    """AdamW settings of a method; the learning rate decays from `rate` to `final` times `rate`."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    final: float = 0.0


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build one of `OPTIMIZERS` for parameters or groups of them, which may have their own rates.

    `adamw8bit` keeps the moments of small tensors in float32.

    Raises:
        MissingExtra: `adamw8bit` without bitsandbytes.
    """
    kind: Any = torch.optim.AdamW
    if name == "adamw8bit":
        kind = require("bitsandbytes", extra="bnb", reason=f"--optimizer {name}").optim.AdamW8bit
    made: torch.optim.Optimizer = kind(parameters, lr=rate, betas=betas, weight_decay=weight_decay)
    return made


def check_optimizer(name: str, device: torch.device) -> None:
    """Take one step of an optimizer on a matrix large enough for 8-bit codes.

    Raises:
        MissingExtra: the optimizer's package is not installed.
        UnsupportedError: the optimizer does not run on this device, as `adamw8bit` of bitsandbytes
            before 0.49 on a CPU.
    """
    parameter = nn.Parameter(torch.ones(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    made = make_optimizer(name, [parameter], rate=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    try:
        made.step()
    except Exception as error:
        # A missing kernel of another package may raise any error.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedError(
            f"--optimizer {name} does not run on {device.type} here: {reason}",
            hint="--optimizer adamw does",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Number of steps, learning-rate schedule, clipping and evaluation interval.

    The learning rates of the optimizers' groups are peaks. They rise linearly over the share
    `warmup` of the steps and fall along a cosine to the share `final` of the peak; with `annealing`
    torch's CosineAnnealingLR sets them, with the rounding of its own. `clip` bounds the gradient's
    norm. Held-out data is evaluated at the start, every `every` steps and at the end.
    `skip_overflow`: a step whose gradient is not finite, as half types may overflow, is left out;
    otherwise a loss that is not finite ends the training.
    """

    steps: int
    warmup: float = 0.05
    final: float = 0.0
    annealing: bool = False
    clip: float | None = 1.0
    every: int = 100
    skip_overflow: bool = False


def rate_share(step: int, steps: int, *, warmup: float, final: float = 0.0) -> float:
    """Return the share of the peak learning rate at a step, counted from 0; see `Recipe`."""
    rising = max(1, math.ceil(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


class Store(Protocol):
    """Storage of a run's state: tensors, and a record in JSON."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest complete state; None without one."""

    def agree(self, due: bool) -> bool:
        """Return whether the state is stored now, which may depend on other processes."""

    def save(self, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Replace the stored state."""


@dataclass(slots=True)
class History:
    """Metrics of a run's evaluations, each with its `step`, the best of them, and its duration."""

    evaluations: list[Metrics] = field(default_factory=list)
    best: Metrics | None = None
    seconds: float = 0.0
    skipped: int = 0


@dataclass(slots=True, kw_only=True)
class Training:
    """A training run over the parameters of `module` that require a gradient, called `name`.

    `accumulate(step)` adds to the gradients and returns the step's metrics, `loss` among them.
    `evaluate()` returns metrics with a `score`; the weights of the highest score are kept.
    Every step is reported under `name`, its metrics with `learning_rate` (of the first group),
    `gradient_norm` (before clipping) and `seconds`. `keep()` copies what is kept of an evaluation
    as `best`, which the caller restores; by default the parameters are kept and restored. The state
    is stored at most every `save_seconds`, and storing takes at most `save_share` of the time;
    `annealing` is not resumed.

    Raises:
        SpectoolError: a loss that is NaN or infinite.
    """

    name: str
    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    recipe: Recipe
    accumulate: Callable[[int], Metrics]
    evaluate: Callable[[], Metrics]
    reporter: Reporter = SILENT
    keep: Callable[[], Any] | None = None
    store: Store | None = None
    save_seconds: float = 60.0
    save_share: float = 0.05
    history: History = field(default_factory=History)
    best: Any = None
    _peaks: list[list[float]] = field(init=False)
    _schedules: list[CosineAnnealingLR] = field(init=False, default_factory=list)

    def run(self) -> History:
        """Train, resuming from the store, and restore the best weights."""
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        if self.recipe.annealing:
            steps = max(1, self.recipe.steps)
            self._schedules = [CosineAnnealingLR(o, steps) for o in self.optimizers]
        step = self._resume()
        began = saved = time.monotonic()
        cost = 0.0
        if step == 0:
            self._evaluate(0)
            self._report(0, {}, self.history.evaluations[-1])
        while step < self.recipe.steps:
            metrics = self._step(step)
            step += 1
            evaluation = None
            if step % self.recipe.every == 0 or step == self.recipe.steps:
                self._evaluate(step)
                evaluation = self.history.evaluations[-1]
            now = time.monotonic()
            self.history.seconds += now - began
            began = now
            wait = max(self.save_seconds, cost / self.save_share)
            if self.store is not None and self.store.agree(now - saved > wait):
                self._save(step)
                saved = time.monotonic()
                cost = saved - now
            self._report(step, metrics, evaluation)
        if self.keep is None:
            with torch.no_grad():
                for name, parameter in self._parameters().items():
                    _own_part(parameter).copy_(self.best[name])
        return self.history

    def _step(self, step: int) -> Metrics:
        """Take one step of the optimizers, unless the gradient overflowed; return its metrics."""
        started = time.monotonic()
        recipe = self.recipe
        share = rate_share(step, recipe.steps, warmup=recipe.warmup, final=recipe.final)
        for optimizer, rates in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                if not self._schedules:
                    group["lr"] = share * peak
            optimizer.zero_grad(set_to_none=True)
        metrics = self.accumulate(step)
        metrics["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        if self.recipe.skip_overflow:
            grads = [p.grad for p in self._parameters().values() if p.grad is not None]
            # One synchronisation with the device; a sum is finite only if all its terms are.
            is_finite = bool(torch.stack([grad.sum() for grad in grads]).isfinite().all())
        elif not (is_finite := math.isfinite(metrics["loss"])):
            raise SpectoolError(
                f"the loss is {metrics['loss']} at step {step + 1}: training diverged",
                hint="start anew with --overwrite and a lower learning rate",
            )
        if self.recipe.clip is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters().values(), self.recipe.clip)
            metrics["gradient_norm"] = float(norm)
        if is_finite:
            for optimizer in self.optimizers:
                optimizer.step()
        self.history.skipped += not is_finite
        for schedule in self._schedules:
            schedule.step()
        metrics["seconds"] = time.monotonic() - started
        return metrics

    def _report(self, step: int, metrics: Metrics, evaluation: Metrics | None) -> None:
        of = self.name, step, self.recipe.steps
        self.reporter.event(TrainingStep(*of, metrics, evaluation))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _evaluate(self, step: int) -> None:
        """Evaluate on held-out data, and keep a copy of the best weights so far."""
        metrics = {"step": step, **self.evaluate()}
        self.history.evaluations.append(metrics)
        if self.history.best is None or metrics["score"] > self.history.best["score"]:
            self.history.best = metrics
            self.best = (self.keep or self._copy)()

    def _copy(self) -> dict[str, Tensor]:
        parts = ((name, _own_part(p)) for name, p in self._parameters().items())
        return {name: part.detach().cpu().clone() for name, part in parts}

    def _save(self, step: int) -> None:
        assert self.store is not None
        parameters = self._parameters().items()
        tensors = {f"weights.{name}": _own_part(p).detach() for name, p in parameters}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        numbers: dict[str, float] = {}
        for key, value in self._optimizer_state():
            if isinstance(value, Tensor):
                tensors[key] = _own_part(value)
            else:
                numbers[key] = value
        record = {
            "numbers": numbers,
            "step": step,
            "evaluations": self.history.evaluations,
            "best": self.history.best,
            "seconds": self.history.seconds,
        }
        self.store.save(tensors, record)

    def _optimizer_state(self) -> Iterator[tuple[str, Any]]:
        """Yield the tensors and numbers of the optimizers' states with their keys."""
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    # bitsandbytes nests some of its tensors in a dictionary.
                    parts = value if isinstance(value, dict) else {key: value}
                    for name, part in parts.items():
                        yield f"optimizer.{number}.{index}.{name}", part

    def _resume(self) -> int:
        """Restore the stored state; return the steps done."""
        stored = self.store.load() if self.store is not None else None
        if stored is None:
            return 0
        tensors, record = stored
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                _own_part(parameter).copy_(tensors[f"weights.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            prefix = f"optimizer.{number}."
            for key, value in {**tensors, **record["numbers"]}.items():
                if key.startswith(prefix):
                    index, _, name = key.removeprefix(prefix).partition(".")
                    state.setdefault(int(index), {})[name] = value
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, values in state.items():
                state[index] = {k: _as_part(v, parameters[index]) for k, v in values.items()}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history = History(record["evaluations"], record["best"], record["seconds"])
        self.best = {
            key.removeprefix("best."): value
            for key, value in tensors.items()
            if key.startswith("best.")
        }
        steps_done: int = record["step"]
        return steps_done


def _own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, all of it unless processes split it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_part(value: Any, parameter: Tensor) -> Any:
    """Return a process's part of a state in the form of its parameter; numbers stay."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
