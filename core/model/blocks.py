"""Block-by-block execution of a checkpoint: one block is in memory at a time, whatever its size.

Consumers of a stream load its blocks, run the hidden states of all sequences through each, and do
with blocks and states what they are there for: pack, measure, evaluate.

Shapes: S sequences, B sequences of a batch, L tokens of each, D width.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spectool.checkpoint.tensors import all_finite
from spectool.errors import NotFinite
from spectool.model.architecture import Architecture
from spectool.model.shell import Call, ModelShell


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Settings to run blocks with: the activations' dtype, the device, the sequences of a batch."""

    dtype: torch.dtype
    device: torch.device
    batch_size: int


class Activations:
    """Hidden states [S, L, D] of all sequences between two blocks, in memory or in a file."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, *, file: Path | None = None
    ) -> None:
        self.file = file
        size = shape[0] * shape[1] * shape[2]
        if file is None:
            self.hidden_SLD = torch.empty(shape, dtype=dtype)
        else:
            # Allocated now: on a full disk, a later write to the memory map would kill the process.
            with file.open("wb") as claimed:
                os.posix_fallocate(claimed.fileno(), 0, max(1, size * dtype.itemsize))
            flat = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
            # Without a name, the file disappears with the process, however that ends.
            file.unlink()
            self.hidden_SLD = flat.view(shape)

    def empty_like(self) -> Activations:
        """Allocate another buffer of the same shape and dtype, in memory or in a file as this."""
        num, length, width = self.hidden_SLD.shape
        return Activations((num, length, width), self.hidden_SLD.dtype, file=self.file)

    def batches(self, size: int) -> Iterator[slice]:
        """Yield slices over the sequences, `size` at a time."""
        for start in range(0, len(self.hidden_SLD), size):
            yield slice(start, min(start + size, len(self.hidden_SLD)))


class BlockStream:
    """The blocks of a checkpoint in order, and the hidden states that pass through them.

    `refuse(place)` makes the error for hidden states that are NaN or infinite; the place is the
    embedding or a block's name.
    """

    def __init__(
        self,
        architecture: Architecture,
        compute: Compute,
        refuse: Callable[[str], NotFinite],
        *,
        with_lm_head: bool = False,
    ) -> None:
        self.architecture, self.compute, self.refuse = architecture, compute, refuse
        self.with_lm_head = with_lm_head

    @functools.cached_property
    def shell(self) -> ModelShell:
        """The model around the blocks."""
        return ModelShell(
            self.architecture,
            dtype=self.compute.dtype,
            device=self.compute.device,
            with_lm_head=self.with_lm_head,
        )

    def read(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block."""
        return self.architecture.read(
            self.architecture.block_tensors(self.architecture.blocks[index])
        )

    def build(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Build a block of its tensors."""
        return self.architecture.build_module(
            self.architecture.blocks[index],
            tensors,
            dtype=self.compute.dtype,
            device=self.compute.device,
        )

    def embed(
        self, ids_SL: Tensor, *, file: Path | None = None, shell: ModelShell | None = None
    ) -> Activations:
        """Embed sequences as inputs of the first block, by another shell if given."""
        shell = shell or self.shell
        width = shell.embed(ids_SL[:1]).shape[-1]
        states = Activations((*ids_SL.shape, width), self.compute.dtype, file=file)
        for batch in states.batches(self.compute.batch_size):
            hidden_BLD = shell.embed(ids_SL[batch]).cpu()
            if not all_finite(hidden_BLD):
                raise self.refuse("the embedding")
            states.hidden_SLD[batch] = hidden_BLD
        return states

    def call(self, index: int, batch: int, length: int) -> Call:
        """Return how a block is called for `batch` sequences of `length` tokens."""
        return self.shell.calls(batch, length)[index]

    def advance(self, index: int, module: nn.Module, states: Activations) -> None:
        """Replace hidden states by the outputs of a block."""
        for batch in states.batches(self.compute.batch_size):
            hidden_BLD = states.hidden_SLD[batch].to(self.compute.device)
            call = self.call(index, *hidden_BLD.shape[:2])
            out_BLD = run_block(module, call, hidden_BLD).cpu()
            if not all_finite(out_BLD):
                raise self.refuse(self.architecture.blocks[index])
            states.hidden_SLD[batch] = out_BLD


def call_block(block: nn.Module, call: Call, hidden_BLD: Tensor) -> Tensor:
    """Compute one block's output [B, L, D], with gradients if they are enabled."""
    out = block(hidden_BLD, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result


def run_block(block: nn.Module, call: Call, hidden_BLD: Tensor) -> Tensor:
    """Compute one block's output [B, L, D] in inference mode."""
    with torch.inference_mode():
        return call_block(block, call, hidden_BLD)
