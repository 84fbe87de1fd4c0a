"""Walk of a sample of a text through the decoder layers of two models of one shape, side by side.

A layer of each is in memory at a time. Attention is computed with its weights (`eager`), which no
faster way of computing it gives; the sample is short for their sake.

Shapes: S windows of the sample, B of a batch, L tokens, D width, H heads, U units of an MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from spectool.checkpoint.tensors import Checkpoint, all_finite
from spectool.data.windows import Windows
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, BlockStream, Compute, run_block
from spectool.model.finite import not_finite
from spectool.model.kernels import attach_products

# The sample: the first tokens of windows all over the text. The attention weights of a batch take
# 4 * B * H * L * L bytes: 67 MB with 32 heads.
SAMPLE_WINDOWS, SAMPLE_TOKENS, BATCH_SIZE = 16, 512, 2

# Transformers' modules of activation functions, whose inputs are the gates of an MLP.
_CLASSES: Any = ACT2CLS.values()
_ACTIVATIONS = tuple({each[0] if isinstance(each, tuple) else each for each in _CLASSES})


@dataclass(frozen=True, slots=True)
class Computed:
    """Result of a layer: its output, and its attention weights and gates if it has one of each."""

    hidden_BLD: Tensor
    attention_BHLL: Tensor | None
    gate_BLU: Tensor | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer of both models on a batch.

    `before_BLD`: the hidden state of the reference before it. `reference`: its layer's result;
    `alone_BLD`: the output of the model's layer for the same hidden state; `model`: the result of
    that layer for the model's own hidden state.
    """

    before_BLD: Tensor
    reference: Computed
    alone_BLD: Tensor
    model: Computed


class Walker:
    """The decoder layers of a checkpoint, one at a time, that compute attention with its weights.

    `activations`: as `spectool.load` has them; None: packed matrices are unpacked.

    Raises:
        UnsupportedError: the model cannot be walked block by block.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        activations: str | None,
    ) -> None:
        architecture = Architecture(checkpoint)
        meta: Any = architecture.meta_model(dtype)
        meta.set_attn_implementation("eager")
        compute = Compute(dtype=dtype, device=device, batch_size=BATCH_SIZE)
        self.activations = activations
        self.stream = BlockStream(
            architecture,
            compute,
            lambda place: not_finite(checkpoint.name, "cannot be evaluated", place),
        )
        # That its layers can be walked is known now, and not in the middle of an evaluation.
        self.stream.call(0, 1, 2)

    @property
    def blocks(self) -> list[str]:
        return self.stream.architecture.blocks

    def build(self, index: int) -> nn.Module:
        """Load a layer, to compute as it does in the whole model."""
        block = self.stream.build(index, self.stream.read(index))
        if self.activations is not None:
            attach_products(block, self.stream.compute.dtype, self.activations)
        return block

    def run(self, index: int, block: nn.Module, hidden_BLD: Tensor) -> Computed:
        """Compute a layer's output, and note what it does inside.

        Raises:
            NotFinite: the output is NaN or infinite.
        """
        hidden_BLD = hidden_BLD.to(self.stream.compute.device)
        call = self.stream.call(index, *hidden_BLD.shape[:2])
        with _noting(block) as (attention, gates):
            out_BLD = run_block(block, call, hidden_BLD)
        if not all_finite(out_BLD):
            raise self.stream.refuse(self.blocks[index])
        return Computed(
            out_BLD.float(),
            attention[0].float() if len(attention) == 1 else None,
            gates[0].float() if len(gates) == 1 else None,
        )


def walk(
    reference: Walker, model: Walker, windows: Windows
) -> Iterator[tuple[str, Iterator[Pair]]]:
    """Yield the name of each decoder layer with the pairs of its batches, all of which are to be
    taken before the next layer.
    """
    ids_SL = _sample(windows)
    theirs, ours = reference.stream.embed(ids_SL), model.stream.embed(ids_SL)
    for index, name in enumerate(model.blocks):
        yield name, _advance(index, reference, model, theirs, ours)


def _advance(
    index: int, reference: Walker, model: Walker, theirs: Activations, ours: Activations
) -> Iterator[Pair]:
    """Replace the hidden states of both models by their layer's outputs; yield what both did."""
    their_block, our_block = reference.build(index), model.build(index)
    for rows in theirs.batches(BATCH_SIZE):
        before_BLD = theirs.hidden_SLD[rows].clone()
        pair = Pair(
            before_BLD.float(),
            reference.run(index, their_block, before_BLD),
            model.run(index, our_block, before_BLD.to(ours.hidden_SLD.dtype)).hidden_BLD,
            model.run(index, our_block, ours.hidden_SLD[rows]),
        )
        theirs.hidden_SLD[rows] = pair.reference.hidden_BLD.to(theirs.hidden_SLD.dtype)
        ours.hidden_SLD[rows] = pair.model.hidden_BLD.to(ours.hidden_SLD.dtype)
        yield pair


def _sample(windows: Windows) -> Tensor:
    """Return the first tokens [S, L] of windows all over the text."""
    ids_SL = max(windows.groups, key=len)
    count = min(SAMPLE_WINDOWS, len(ids_SL))
    rows_S = torch.linspace(0, len(ids_SL) - 1, count).long()
    return ids_SL[rows_S, :SAMPLE_TOKENS]


@contextlib.contextmanager
def _noting(block: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Note attention weights [B, H, L, L] and inputs of activations in a layer's forward."""
    attention: list[Tensor] = []
    gates: list[Tensor] = []

    def note_weights(module: nn.Module, args: Any, out: Any) -> None:
        for part in out[1:] if isinstance(out, tuple) else ():
            if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-1] == part.shape[-2]:
                # A module around the attention may pass its weights on.
                attention.extend([part] * all(part is not each for each in attention))

    def note_gate(module: nn.Module, args: Any) -> None:
        gates.append(args[0])

    handles = []
    for module in block.modules():
        if isinstance(module, _ACTIVATIONS):
            handles.append(module.register_forward_pre_hook(note_gate))
        elif module is not block:
            handles.append(module.register_forward_hook(note_weights))
    try:
        yield attention, gates
    finally:
        for handle in handles:
            handle.remove()
