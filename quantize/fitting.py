"""Fit of a packed block to the original block's outputs, for methods that train stored values.

With F the original and F' the packed block, X its inputs in the original model and X' those after
the blocks packed so far, and c_1, c_2 the mean over tokens of the cosine between F'(X') and each
target:

    loss = MSE(F'(X'), F(X)) + MSE(F'(X'), F(X')) - ln c_1 - ln c_2

(Zhao et al., PTQ1.61, 2025, arXiv:2502.13179). One step per sequence. The epoch, or the start,
whose stored fields have the least loss is kept.

Shapes: B sequences of a batch, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.model.blocks import call_block
from spectool.model.packed import PackedLinear
from spectool.options import Config
from spectool.quantize.calibration import (
    Block,
    Fitted,
    LinearStats,
    Products,
    Streams,
    Tick,
    fit_each,
    not_finite,
)

# Cosines are clamped to this in ln c; below it the squared errors alone drive the fit.
LEAST_COSINE = 0.01


class Part(Protocol):
    """Interface of one matrix in training: a module that computes the product with it."""

    def store(self) -> None:
        """Write the current values into the packed linear's fields."""
        ...


@dataclass(frozen=True, slots=True)
class FitMetrics:
    """Mean loss over the calibration sequences, and the smallest cosine of any of them."""

    loss: float
    least_cosine: float


class Task:
    """Data of a block's fit: the inputs X' and both targets, F(X) and F(X')."""

    def __init__(self, block: Block, streams: Streams) -> None:
        assert block.module is not None
        self.block, self.module = block, block.module
        self.inputs = streams.packed
        self.dtype = self.inputs.hidden_SLD.dtype
        self.device = next(block.module.parameters()).device
        self.batches = list(self.inputs.batches(max(block.calls)))
        # Targets are computed once: per step they would add two forward passes.
        self.targets = (streams.original.another(), streams.packed.another())
        with torch.no_grad():
            for side, target in zip((streams.original, streams.packed), self.targets, strict=True):
                for batch in self.batches:
                    target.hidden_SLD[batch] = self._run(side.hidden_SLD[batch]).cpu()

    def __len__(self) -> int:
        return len(self.inputs.hidden_SLD)

    def _run(self, hidden_BLD: Tensor) -> Tensor:
        """Return the block's output for a batch of inputs."""
        call = self.block.calls[len(hidden_BLD)]
        return call_block(self.module, call, hidden_BLD.to(self.device))

    def loss(self, batch: slice, modules: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
        """Return the loss of each sequence [B] and its cosines with both targets [2, B]."""
        with Substitute(self.block, modules):
            out_BLD = self._run(self.inputs.hidden_SLD[batch]).float()
        loss_B, cosines = out_BLD.new_zeros(len(out_BLD)), []
        for target in self.targets:
            target_BLD = target.hidden_SLD[batch].to(self.device).float()
            cosine_B = F.cosine_similarity(out_BLD, target_BLD, dim=-1).mean(-1)
            squares_B = (out_BLD - target_BLD).square().mean((1, 2))
            loss_B = loss_B + squares_B - cosine_B.clamp(min=LEAST_COSINE).log()
            cosines.append(cosine_B)
        return loss_B, torch.stack(cosines)

    def backward(self, index: int, modules: Mapping[str, nn.Module]) -> None:
        """Accumulate the gradients of one sequence's loss, scaled by its number of outputs."""
        with torch.enable_grad():
            loss_B, _ = self.loss(slice(index, index + 1), modules)
            # Scaled like this gradients fit float16; AdamW is invariant to the factor.
            torch.autograd.backward(loss_B.sum() * self.inputs.hidden_SLD[index].numel())

    @torch.no_grad()
    def measure(self, modules: Mapping[str, nn.Module]) -> FitMetrics:
        """Measure all calibration sequences with these modules for the matrices."""
        each = [self.loss(batch, modules) for batch in self.batches]
        losses_S = torch.cat([loss_B for loss_B, _ in each])
        least = torch.cat([cosines for _, cosines in each], 1).min()
        return FitMetrics(float(losses_S.double().mean()), float(least))


class Substitute(Products):
    """Context that computes the products of a block by other modules, by matrix name."""

    def __init__(self, block: Block, modules: Mapping[str, nn.Module]) -> None:
        assert block.module is not None
        super().__init__(block.module, block.name, block.matrices)
        self.modules = modules

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        out: Tensor = self.modules[name](x)
        return out if bias is None else out + bias


def init_linears(
    method: Any,
    block: Block,
    stats: dict[str, LinearStats],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Pack a block's matrices with `method.pack`, as packed linears on the block's device.

    Consumes `stats`.

    Raises:
        UnsupportedError: the method cannot represent a matrix; the message names it.
    """
    assert block.module is not None
    device = next(block.module.parameters()).device
    linears = {}
    for name, fields in fit_each(method, block, stats, config, generator, device).fields.items():
        shape = block.matrices[name].shape
        linears[name] = method.build(method.layout(shape, config), shape, config)
        linears[name].q.load_state_dict(fields)
        linears[name].to(device)
    return linears


def fit_block(
    block: Block,
    streams: Streams,
    linears: Mapping[str, PackedLinear],
    make_part: Callable[[str, torch.dtype], nn.Module],
    make_optimizers: Callable[[Sequence[nn.Module]], Sequence[torch.optim.Optimizer]],
    *,
    epochs: int,
    generator: torch.Generator,
    tick: Tick,
) -> Fitted:
    """Train the packed `linears` of a block from their current fields.

    `make_part(name, dtype)` creates a matrix's `Part`, which computes in this dtype. All learning
    rates decay to zero by a cosine.

    Raises:
        NotFinite: the block's output is NaN or infinite on the calibration text.
    """
    task = Task(block, streams)
    start = best = task.measure(linears)
    if not math.isfinite(start.loss):
        raise not_finite(block.name, "its output is NaN or infinite on the calibration text")
    best_epoch, best_fields, skipped = 0, _copy_fields(linears), 0
    parts = {name: make_part(name, task.dtype) for name in linears}
    optimizers = make_optimizers(list(parts.values()))
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    num_steps = epochs * len(task)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, max(1, num_steps)) for o in optimizers
    ]
    for epoch in range(epochs):
        order = torch.randperm(len(task), generator=generator).tolist()
        for step, index in enumerate(order, epoch * len(task) + 1):
            for optimizer in optimizers:
                optimizer.zero_grad()
            task.backward(index, parts)
            sums = torch.stack([p.grad.sum() for p in trained if p.grad is not None])
            # A half type may overflow on one sequence; its NaN would stay in the optimizer state.
            if sums.isfinite().all():
                for optimizer in optimizers:
                    optimizer.step()
            else:
                skipped += 1
            for schedule in schedules:
                schedule.step()
            tick(step / (num_steps + 1))
        for part in parts.values():
            part.store()  # type: ignore[operator]
        now = task.measure(linears)
        if now.loss < best.loss:
            best, best_epoch, best_fields = now, epoch + 1, _copy_fields(linears)
    for name, linear in linears.items():
        linear.q.load_state_dict(best_fields[name])
    report: dict[str, Any] = {
        "loss_start": start.loss,
        "loss_after": best.loss,
        "least_cosine": best.least_cosine,
        "best_epoch": best_epoch,
        "steps_skipped": skipped,
    }
    return Fitted({name: _to_host(fields) for name, fields in best_fields.items()}, report)


def _copy_fields(linears: Mapping[str, PackedLinear]) -> dict[str, dict[str, Tensor]]:
    """Copy the fields of packed linears, by matrix and field name."""
    return {
        name: {field: value.clone() for field, value in linear.q.state_dict().items()}
        for name, linear in linears.items()
    }


def _to_host(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move fields to host memory."""
    return {name: value.cpu() for name, value in fields.items()}
