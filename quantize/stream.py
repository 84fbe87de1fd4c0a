"""Blocks of a model as quantizers see them, and the statistics of their inputs.

Shapes: S sequences, L tokens of each, D width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectool.errors import NotFinite
from spectool.files import disk_errors
from spectool.model.blocks import Activations, BlockStream, Compute
from spectool.model.shell import ModelShell
from spectool.quantize.base import Block, Quantizer, Stream, Streams, not_finite
from spectool.quantize.calibration import Calibration
from spectool.quantize.plan import QuantizePlan
from spectool.quantize.statistics import LinearStats, Observer, Statistic

# Activation buffers that together exceed this are kept in files next to the shards.
BUFFERS_IN_MEMORY = 8 << 30


def open_stream(plan: QuantizePlan, compute: Compute, *, with_lm_head: bool = False) -> BlockStream:
    """Create the stream of a plan's blocks; its errors name the calibration text."""

    def refuse(place: str) -> NotFinite:
        return not_finite(place, "its output is NaN or infinite on the calibration text")

    return BlockStream(plan.architecture, compute, refuse, with_lm_head=with_lm_head)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedStream:
    """Stream of blocks with the calibration text that runs through them.

    `calibration` is None if no activations are needed. Large buffers are kept in `scratch`.
    """

    plan: QuantizePlan
    blocks: BlockStream
    calibration: Calibration | None
    seed: int
    scratch: Path

    @property
    def names(self) -> list[str]:
        """Names of the blocks."""
        return self.plan.architecture.blocks

    @property
    def compute(self) -> Compute:
        """Settings to run blocks with."""
        return self.blocks.compute

    def make_generator(self, index: int) -> torch.Generator:
        """Make the generator of a block, independent of the order in which blocks are packed."""
        digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def embed(self, side: Stream, shell: ModelShell | None = None) -> Activations:
        """Embed the calibration sequences as inputs of the first block."""
        assert self.calibration is not None
        large = self.plan.num_buffers * self.plan.buffer_bytes > BUFFERS_IN_MEMORY
        file = self.scratch / f"activations-{side}.bin" if large else None
        with disk_errors(self.scratch):
            return self.blocks.embed(self.calibration.ids_SL, file=file, shell=shell)

    def open(self, index: int, tensors: dict[str, Tensor]) -> Block:
        """Create the quantizer's view of a block; with its module if there is calibration."""
        name = self.names[index]
        matrices = self.plan.matrices[name]
        block = Block(
            name=name,
            matrices=matrices,
            weights={key: matrix.weight_nm(tensors) for key, matrix in matrices.items()},
            device=self.compute.device,
        )
        if self.calibration is not None:
            block.module = self.blocks.build(index, tensors)
            num, length = self.calibration.ids_SL.shape
            batch = self.compute.batch_size
            # A fit runs one sequence at a time, whatever the batch size.
            sizes = {1, min(batch, num), (num - 1) % batch + 1}
            block.calls = {size: self.blocks.call(index, size, length) for size in sizes}
        return block

    def observe(
        self, block: Block, quantizer: Quantizer, streams: Streams
    ) -> dict[str, LinearStats]:
        """Collect the statistics of a method, each from its stream, by matrix."""
        assert block.module is not None and self.calibration is not None
        passes: list[dict[str, LinearStats]] = []
        by_stream: dict[Stream, list[Statistic]] = {}
        for statistic, stream in quantizer.statistics.items():
            by_stream.setdefault(stream, []).append(statistic)
        for stream, wanted in by_stream.items():
            inputs: Activations = getattr(streams, stream)
            observer = Observer(
                block.module,
                block.name,
                block.matrices,
                tuple(wanted),
                opened=inputs.hidden_SLD.shape[1] if self.calibration.opened else 0,
            )
            with observer:
                for batch in inputs.batches(self.compute.batch_size):
                    block.run(inputs.hidden_SLD[batch])
            passes.append(observer.stats)
        # Routing can differ between the streams: keep experts that both route tokens to, with the
        # smaller number of tokens.
        stats, *others = passes or [{}]
        for key in list(stats):
            for more, wanted in zip(others, list(by_stream.values())[1:], strict=True):
                if key not in more:
                    del stats[key]
                    break
                for statistic in wanted:
                    setattr(stats[key], statistic, getattr(more[key], statistic))
                stats[key].num_tokens = min(stats[key].num_tokens, more[key].num_tokens)
        return stats
