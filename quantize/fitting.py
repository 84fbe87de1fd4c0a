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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.machine import trim_memory
from spectool.model.blocks import call_block
from spectool.model.packed import PackedLinear
from spectool.quantize.base import (
    Block,
    FitReport,
    Fitted,
    PackedFields,
    Quantizer,
    Streams,
    Tick,
    not_finite,
)
from spectool.quantize.statistics import LinearStats, Products
from spectool.training import History, Metrics, Recipe, Training

# Cosines are clamped to this in ln c; below it the squared errors alone drive the fit.
LEAST_COSINE = 0.01


class TrainableMatrix(nn.Module, ABC):
    """One matrix in training: a module that computes the product with it."""

    @abstractmethod
    def store(self) -> None:
        """Write the current values into the packed linear's fields."""


class BlockFit:
    """Data of a block's fit: the inputs X' and both targets, F(X) and F(X')."""

    def __init__(self, block: Block, streams: Streams) -> None:
        assert block.module is not None
        self.block, self.module = block, block.module
        self.inputs = streams.packed
        self.dtype = self.inputs.hidden_SLD.dtype
        self.batches = list(self.inputs.batches(max(block.calls)))
        # Targets are computed once: per step they would add two forward passes.
        self.targets = (streams.original.empty_like(), streams.packed.empty_like())
        with torch.no_grad():
            for side, target in zip((streams.original, streams.packed), self.targets, strict=True):
                for batch in self.batches:
                    target.hidden_SLD[batch] = self._run(side.hidden_SLD[batch]).cpu()

    def __len__(self) -> int:
        return len(self.inputs.hidden_SLD)

    def _run(self, hidden_BLD: Tensor) -> Tensor:
        """Return the block's output for a batch of inputs."""
        call = self.block.calls[len(hidden_BLD)]
        return call_block(self.module, call, hidden_BLD.to(self.block.device))

    def loss(self, batch: slice, modules: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
        """Return the loss of each sequence [B] and its cosines with both targets [2, B]."""
        with Substitute(self.block, modules):
            out_BLD = self._run(self.inputs.hidden_SLD[batch]).float()
        loss_B, cosines = out_BLD.new_zeros(len(out_BLD)), []
        for target in self.targets:
            target_BLD = target.hidden_SLD[batch].to(self.block.device).float()
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
    def measure(self, modules: Mapping[str, nn.Module]) -> tuple[float, float]:
        """Return the mean loss of all sequences with these modules, and their smallest cosine."""
        each = [self.loss(batch, modules) for batch in self.batches]
        losses_S = torch.cat([loss_B for loss_B, _ in each])
        least = torch.cat([cosines for _, cosines in each], 1).min()
        return float(losses_S.double().mean()), float(least)


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


class BlockQuantizer(Quantizer):
    """Quantizer that packs the matrices of a block and then trains them together.

    Its `Config` has `epochs`. `fit` may be overridden by one that trains otherwise.
    """

    @abstractmethod
    def fit_bytes(self) -> int:
        """Return the memory of a fit in bytes per weight of the block."""

    @abstractmethod
    def make_trainable(
        self, linear: Any, weight_nm: Tensor, diagonal_m: Tensor | None, dtype: torch.dtype
    ) -> TrainableMatrix:
        """Create the trained form of a packed linear, which computes in `dtype`.

        `weight_nm` is the original matrix as stored, `diagonal_m` that of its Hessian, if any.
        """

    @abstractmethod
    def make_optimizers(self, parts: Sequence[Any]) -> Sequence[torch.optim.Optimizer]:
        """Create the optimizers of all parts of a block."""

    def extend_report(
        self, report: FitReport, before: Mapping[str, PackedFields], linears: Mapping[str, Any]
    ) -> FitReport:
        """Add the method's own metrics, of the fields before the fit and the fitted linears."""
        return report

    @property
    def needs_calibration(self) -> bool:
        return True

    def fit(
        self,
        block: Block,
        streams: Streams | None,
        stats: dict[str, LinearStats],
        generator: torch.Generator,
        tick: Tick,
    ) -> Fitted:
        """Pack each matrix, and train all from there; learning rates decay to zero by a cosine.

        Raises:
            UnsupportedError: the method cannot represent a matrix; the message names it.
            NotFinite: the block's output is NaN or infinite on the calibration text.
        """
        assert streams is not None
        # Copied, as packing consumes the statistics.
        diagonals = {
            name: each.hessian.diagonal().clone()
            for name, each in stats.items()
            if each.hessian is not None
        }
        linears: dict[str, PackedLinear] = {}
        for name, fields in self.pack_each(block, stats, generator).items():
            linears[name] = self.build(block.matrices[name].shape)
            linears[name].q.load_state_dict(fields)
            linears[name].to(block.device)
        task, before = BlockFit(block, streams), _copy_fields(linears)
        parts = {
            name: self.make_trainable(linear, block.weights[name], diagonals.get(name), task.dtype)
            for name, linear in linears.items()
        }
        steps = self.config.epochs * len(task)
        order: list[int] = []
        # Not read from the training: it would refer to itself, and its state outlive the block.
        measured: list[float] = []

        def accumulate(step: int) -> Metrics:
            if step % len(task) == 0:
                order[:] = torch.randperm(len(task), generator=generator).tolist()
            task.backward(order[step % len(task)], parts)
            tick((step + 1) / (steps + 1))
            return {}

        def evaluate() -> Metrics:
            # What the steps left in the allocator would add to the unpacked matrices.
            trim_memory()
            for part in parts.values() if measured else ():
                part.store()
            loss, least_cosine = task.measure(linears)
            if not measured and not math.isfinite(loss):
                text = "its output is NaN or infinite on the calibration text"
                raise not_finite(block.name, text)
            measured.append(loss)
            return {"score": -loss, "least_cosine": least_cosine}

        training = Training(
            name="fit",
            module=nn.ModuleList(parts.values()),
            optimizers=self.make_optimizers(list(parts.values())),
            # A half type may overflow on one sequence; its NaN would stay in the optimizer state.
            recipe=Recipe(
                steps=steps, annealing=True, clip=None, every=len(task), skip_overflow=True
            ),
            accumulate=accumulate,
            evaluate=evaluate,
            keep=lambda: _copy_fields(linears),
        )
        report = _make_report(training.run(), len(task))
        fitted: dict[str, PackedFields] = {}
        for name, linear in linears.items():
            linear.q.load_state_dict(training.best[name])
            fitted[name] = {key: value.cpu() for key, value in training.best[name].items()}
        return Fitted(fitted, self.extend_report(report, before, linears))


def _make_report(history: History, num_sequences: int) -> FitReport:
    """Make the report of a fit with one step for each sequence."""
    assert history.best is not None
    return FitReport(
        loss_start=-history.evaluations[0]["score"],
        loss_after=-history.best["score"],
        least_cosine=history.best["least_cosine"],
        best_epoch=history.best["step"] // num_sequences,
        steps_skipped=history.skipped,
    )


def _copy_fields(linears: Mapping[str, PackedLinear]) -> dict[str, dict[str, Tensor]]:
    """Copy the fields of packed linears, by matrix and field name."""
    return {
        name: {field: value.clone() for field, value in linear.q.state_dict().items()}
        for name, linear in linears.items()
    }
