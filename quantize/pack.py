"""Packing: take each block from the stream, pack it, write its shard, advance the activations.

Only one block and two activation buffers are resident, whatever the checkpoint's size; a fit adds
two buffers of targets. The bytes written for a block depend only on the source, the options, the
calibration tokens, (seed, block) and, where recorded, the number of threads. The packed stream
advances through the packed module as read back from its shard, so an interrupted and resumed run
writes the same bytes as an uninterrupted one.

Shapes: S sequences, B of a batch, L tokens, D width, V vocabulary, T tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.artifact import ArtifactWriter, Content
from spectool.checkpoint.tensors import all_finite, read_tensors
from spectool.errors import UnsupportedError
from spectool.files import disk_errors
from spectool.machine import trim_memory
from spectool.model.architecture import Architecture
from spectool.model.matrices import Matrix
from spectool.model.packed import PackedLinear, load_packed, relative_error
from spectool.model.shell import ModelShell, final_logits
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
from spectool.quantize.lm_head.base import LmHead, LmHeadQuantizer, special_tokens
from spectool.quantize.plan import QuantizePlan
from spectool.quantize.report import BlockReport, LayerReport, OutsideReport
from spectool.quantize.statistics import MIN_EXPERT_TOKENS, LinearStats
from spectool.quantize.stream import CalibratedStream
from spectool.report import Reporter

PACKED = "blocks packed"
LM_HEAD_FITTED = "lm_head fitted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Consumer of a stream that writes one shard for each block.

    `metadata` is written to every shard's header.
    """

    stream: CalibratedStream
    writer: ArtifactWriter
    metadata: dict[str, Any]
    reporter: Reporter

    @property
    def plan(self) -> QuantizePlan:
        """The matrices to pack, and their methods."""
        return self.stream.plan

    @property
    def architecture(self) -> Architecture:
        """The model that is packed."""
        return self.stream.plan.architecture

    def run(self) -> tuple[OutsideReport, tuple[BlockReport, ...]]:
        """Pack everything that is not done; return the reports outside the blocks and per block."""
        if self.writer.report(self._shard(-1)) is None:
            self._copy_outside()
        count = len(self.stream.names)
        missing = [index for index in range(count) if not self._is_done(index)]
        lm_head = self.plan.lm_head
        fits_lm_head = lm_head is not None and self.writer.report(self._shard(count)) is None
        visits, streams = missing, None
        if self.stream.calibration is not None and (missing or fits_lm_head):
            # Finished blocks are visited too, to advance the activations.
            visits = list(range(count if fits_lm_head else missing[-1] + 1))
            streams = self._embed()
        for index, tensors in self._read_blocks(visits):
            self._step(index, tensors, streams, functools.partial(self._tick, index))
            trim_memory()
            self._tick(index, 1)
        if lm_head is not None and fits_lm_head:
            assert streams is not None
            self._fit_lm_head(lm_head, self._lm_head_inputs(lm_head, streams))
        outside = OutsideReport.from_json(self.writer.report(self._shard(-1)))
        if lm_head is not None:
            fitted = OutsideReport.from_json(self.writer.report(self._shard(count)))
            outside = replace(fitted, layers=outside.layers + fitted.layers)
        blocks = (self.writer.report(self._shard(index)) for index in range(count))
        return outside, tuple(map(BlockReport.from_json, blocks))

    def _tick(self, index: int, share: float) -> None:
        """Report the share done of a block."""
        self.reporter.progress(index + share, len(self.stream.names), PACKED)

    def _is_done(self, index: int) -> bool:
        """Return whether a block is written and, with calibration, its output error measured."""
        record = self.writer.report(self._shard(index))
        return record is not None and (
            self.stream.calibration is None or record["output_error"] is not None
        )

    def _shard(self, index: int) -> str:
        """Return the file name of a block's shard.

        Index -1 is the shard of tensors outside the blocks, the number of blocks that of a fitted
        lm_head.
        """
        total = len(self.stream.names) + 1 + (self.plan.lm_head is not None)
        return f"packed-{index + 1:05d}-of-{total:05d}.safetensors"

    def _read_blocks(self, visits: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the blocks to visit with their tensors, of which no reference is kept here."""
        read = self.stream.blocks.read
        with ThreadPoolExecutor(1) as reader:
            following: Future[dict[str, Tensor]] | None = None
            for index, after in itertools.zip_longest(visits, visits[1:]):
                present, following = following, None
                # Reading ahead holds a second block in host memory: worth it with a GPU only.
                if self.stream.compute.device.type != "cpu" and after is not None:
                    following = reader.submit(read, after)
                yield index, present.result() if present else read(index)
                del present

    def _copy_outside(self) -> None:
        """Write the shard of tensors outside the blocks."""
        contents: dict[str, Content] = {}
        matrices, fitted = dict(self.plan.outside), self.plan.lm_head
        replaced = {
            name
            for matrix in matrices.values()
            for name in self.architecture.replaced_tensors(matrix)
        }
        layers = []
        if fitted is not None:
            del matrices[fitted.name]
            # An existing bias is written with the fitted lm_head.
            bias = f"{fitted.name}.bias"
            replaced.add(bias)
            # Read to detect damage now, not after hours of work.
            for name in {fitted.parameter, bias} & self.architecture.origins.keys():
                self.architecture.read([name])
        for key, matrix in matrices.items():
            weight_nm = matrix.weight_nm(self.architecture.read([matrix.parameter]))
            block = Block(
                name=key,
                matrices={key: matrix},
                weights={key: weight_nm},
                device=self.stream.compute.device,
            )
            generator = self.stream.make_generator(-1)
            fields = self.plan.quantizers[key].pack_each(block, {}, generator)[key]
            contents.update(_named(key, fields))
            layers.append(self._report_layer(matrix, weight_nm, fields))
        for name in self.architecture.outer_tensors():
            if name in replaced:
                continue
            origin = self.architecture.origins[name]
            if origin.converter is None:
                contents[name] = self.architecture.layout.tensors[origin.stored[0][0]]
            else:
                contents.update(self.architecture.read([name]))
        self._write(-1, contents, OutsideReport(layers=tuple(layers)))

    def _write(
        self, index: int, contents: Mapping[str, Content], report: OutsideReport | BlockReport
    ) -> None:
        """Write a shard with its report."""
        self.writer.write_shard(self._shard(index), contents, self.metadata, report.as_json())

    def _fit_lm_head(self, matrix: Matrix, states_TD: Tensor) -> None:
        """Fit the lm_head on its inputs after the packed blocks, and write its shard."""
        assert self.stream.calibration is not None
        device, count = self.stream.compute.device, len(self.stream.names)
        names = [matrix.parameter, f"{matrix.name}.bias"]
        tensors = self.architecture.read(
            name for name in names if name in self.architecture.origins
        )
        weight_VD, bias_V = tensors[matrix.parameter], tensors.get(f"{matrix.name}.bias")
        quantizer = self.plan.quantizers[matrix.name]
        assert isinstance(quantizer, LmHeadQuantizer)
        ids_SL = self.stream.calibration.ids_SL
        fitted = quantizer.fit_lm_head(
            LmHead(
                weight_VD=weight_VD.to(device).float(),
                bias_V=None if bias_V is None else bias_V.float().to(device),
                finish=final_logits(self.architecture.config),
                states_TD=states_TD,
                counts_V=torch.bincount(ids_SL.flatten(), minlength=len(weight_VD)).to(device),
                special=special_tokens(self.architecture.config, len(weight_VD)),
            ),
            self.stream.make_generator(count),
            lambda share: self.reporter.progress(share, 1, LM_HEAD_FITTED),
        )
        fields = {name: value.cpu() for name, value in fitted.fields.items()}
        contents: dict[str, Content] = dict(_named(matrix.name, fields))
        contents[f"{matrix.name}.bias"] = fitted.bias_V.to(weight_VD.dtype).cpu()
        layer = self._report_layer(matrix, weight_VD, fields)
        self._write(count, contents, OutsideReport(layers=(layer,), lm_head=fitted.report))

    def _lm_head_inputs(self, matrix: Matrix, streams: Streams) -> Tensor:
        """Compute the lm_head's inputs [T, D] after the packed blocks, on the host."""
        calibration = self.stream.calibration
        assert calibration is not None
        shell = self._make_shell(with_lm_head=True)
        # Start tokens are left out, as in the statistics.
        first = 1 if calibration.opened else 0
        num, length = calibration.ids_SL.shape
        states_SLD = torch.empty(num, length - first, matrix.shape[1])
        for batch in streams.packed.batches(self.stream.compute.batch_size):
            hidden_BLD = streams.packed.hidden_SLD[batch].to(self.stream.compute.device)
            states_BLD = shell.lm_head_inputs(calibration.ids_SL[batch], hidden_BLD)
            states_SLD[batch] = states_BLD[:, first:]
        return states_SLD.flatten(0, 1)

    def _make_shell(
        self, *, with_lm_head: bool = False, table: PackedLinear | None = None
    ) -> ModelShell:
        """Create another model around the blocks."""
        return ModelShell(
            self.architecture,
            dtype=self.stream.compute.dtype,
            device=self.stream.compute.device,
            with_lm_head=with_lm_head,
            table=table,
        )

    def _embed(self) -> Streams:
        """Embed the calibration sequences by the original and by the packed embedding, if any."""
        shell = None
        for key, matrix in self.plan.outside.items():
            if matrix.kind == "embedding":
                stored = read_tensors(self.writer.path(self._shard(-1)))
                prefix = f"{key}.q."
                fields = {
                    name.removeprefix(prefix): value
                    for name, value in stored.items()
                    if name.startswith(prefix)
                }
                table = load_packed(make_entry(self.plan.quantizers[key], matrix), fields)
                shell = self._make_shell(table=table)
        return Streams(self.stream.embed("original"), self.stream.embed("packed", shell))

    def _step(
        self, index: int, tensors: dict[str, Tensor], streams: Streams | None, tick: Tick
    ) -> None:
        """Pack and write one block unless that is done; advance both streams through it."""
        block = self.stream.open(index, tensors)
        if self.writer.report(self._shard(index)) is None:
            self._pack(index, block, tensors, streams, tick)
        # Only the module is needed from here on: free the stored tensors.
        block.weights = {}
        tensors.clear()
        trim_memory()
        if streams is not None:
            report = BlockReport.from_json(self.writer.report(self._shard(index)))
            report = replace(report, output_error=self._advance(index, block, streams))
            self.writer.set_report(self._shard(index), report.as_json())

    def _pack(
        self,
        index: int,
        block: Block,
        tensors: dict[str, Tensor],
        streams: Streams | None,
        tick: Tick,
    ) -> None:
        """Pack a block and write its shard."""
        generator = self.stream.make_generator(index)
        groups: dict[Quantizer, list[str]] = {}
        for key in block.matrices:
            groups.setdefault(self.plan.quantizers[key], []).append(key)
        fields: dict[str, PackedFields] = {}
        data_free: list[str] = []
        fits: list[FitReport] = []
        for quantizer, keys in groups.items():
            part = replace(
                block,
                matrices={key: block.matrices[key] for key in keys},
                weights={key: block.weights[key] for key in keys},
            )
            fitted, without_data = self._fit(quantizer, part, streams, generator, tick)
            fields |= fitted.fields
            data_free += without_data
            fits += [fitted.report] if fitted.report else []
        taken = {matrix.parameter for matrix in block.matrices.values()}
        contents: dict[str, Content] = {
            key: tensor for key, tensor in tensors.items() if key not in taken
        }
        layers = []
        for key, matrix in block.matrices.items():
            contents.update(_named(key, fields[key]))
            layers.append(self._report_layer(matrix, block.weights[key], fields[key]))
        report = BlockReport(layers=tuple(layers), data_free=tuple(data_free), fits=tuple(fits))
        self._write(index, contents, report)

    def _fit(
        self,
        quantizer: Quantizer,
        block: Block,
        streams: Streams | None,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Fitted, list[str]]:
        """Pack the matrices of one method; also return the names of those packed without data."""
        stats = self.stream.observe(block, quantizer, streams) if streams is not None else {}
        # Experts with few calibration tokens, and matrices that no token reached.
        data_free = [
            key
            for key, matrix in block.matrices.items()
            if quantizer.statistics
            and (
                key not in stats
                or (matrix.expert is not None and stats[key].num_tokens < MIN_EXPERT_TOKENS)
            )
        ]
        for key in data_free:
            stats.pop(key, None)
        _check_finite(stats)
        # A fit allocates buffers of targets, in files if they are large.
        with disk_errors(self.writer.partial):
            return quantizer.fit(block, streams, stats, generator, tick), data_free

    def _report_layer(self, matrix: Matrix, weight_nm: Tensor, fields: PackedFields) -> LayerReport:
        """Measure a packed matrix."""
        quantizer = self.plan.quantizers[matrix.name]
        packed = load_packed(make_entry(quantizer, matrix), fields)
        error = relative_error(weight_nm, packed)
        if not math.isfinite(error):
            raise UnsupportedError(
                f"{matrix.name}: {quantizer.name} cannot represent its weights, the largest is "
                f"{float(weight_nm.abs().max()):.3g}",
                hint="leave it dense with --skip",
            )
        stored_bytes = sum(value.numel() * value.element_size() for value in fields.values())
        return LayerReport(matrix.name, 8 * stored_bytes / matrix.num_weights, error)

    def _advance(self, index: int, block: Block, streams: Streams) -> float:
        """Advance both streams through the block; return the relative squared output error."""
        assert block.module is not None
        self.stream.blocks.advance(index, block.module, streams.original)
        # Free the dense module before the packed one is created.
        block.module = None
        trim_memory()
        self.stream.blocks.advance(index, self._reload(index, block), streams.packed)
        error, energy = 0.0, 0.0
        for batch in streams.packed.batches(self.stream.compute.batch_size):
            original_BLD = streams.original.hidden_SLD[batch].float()
            packed_BLD = streams.packed.hidden_SLD[batch].float()
            error += float((original_BLD - packed_BLD).square().sum())
            energy += float(original_BLD.square().sum())
        return error / energy if energy else 0.0

    def _reload(self, index: int, block: Block) -> nn.Module:
        """Create the packed block as read back from its shard."""
        return self.architecture.build_module(
            block.name,
            read_tensors(self.writer.path(self._shard(index))),
            dtype=self.stream.compute.dtype,
            device=self.stream.compute.device,
            modules={
                key: make_entry(self.plan.quantizers[key], matrix)
                for key, matrix in block.matrices.items()
            },
        )


def _named(key: str, fields: PackedFields) -> dict[str, Tensor]:
    """Return the fields of a matrix by their names in a file."""
    return {f"{key}.q.{name}": value for name, value in fields.items()}


def make_entry(quantizer: Quantizer, matrix: Matrix) -> dict[str, Any]:
    """Make a packed matrix's entry in the artifact's configuration."""
    entry: dict[str, Any] = {**quantizer.as_dict(), "shape": list(matrix.shape)}
    if matrix.expert is not None:
        entry["expert"] = True
    if matrix.kind in ("embedding", "lm_head"):
        entry["outside"] = matrix.kind
    if matrix.tied is not None:
        entry["tied"] = matrix.tied
    if matrix.kind == "lm_head" and isinstance(quantizer, LmHeadQuantizer):
        entry["bias"] = True
    return entry


def _check_finite(stats: dict[str, LinearStats]) -> None:
    """Raise NotFinite if a statistic is NaN or infinite.

    A function of its own, so that no statistic outlives the packing of its matrix in a variable.
    """
    for key, linear_stats in stats.items():
        for statistic in linear_stats.wanted:
            value = getattr(linear_stats, statistic)
            if value is not None and not all_finite(value):
                raise not_finite(key, f"{statistic} of its inputs is NaN or infinite")
