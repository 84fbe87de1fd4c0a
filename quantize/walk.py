"""Block walk: load one block, observe it, pack it, write it, free it.

Only one block and two activation buffers are resident, whatever the checkpoint's size; a fit adds
two buffers of targets. The bytes written for a block depend only on the source, the options, the
calibration tokens, (seed, block) and, where recorded, the number of threads. The packed stream
advances through the packed module as read back from its shard, so an interrupted and resumed run
writes the same bytes as an uninterrupted one.

Shapes: S sequences, B of a batch, L tokens, D width.
"""

from __future__ import annotations

import functools
import hashlib
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.artifact import ArtifactWriter, Content
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import Checkpoint, all_finite, read_tensor
from spectool.errors import UnsupportedError
from spectool.files import disk_errors
from spectool.machine import trim_memory
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, Call, ModelShell, final_logits, run_block
from spectool.model.matrices import Matrix
from spectool.model.packed import PackedLinear, build_packed, relative_error
from spectool.quantize.base import (
    Block,
    Fitted,
    PackedFields,
    Quantizer,
    Stream,
    Streams,
    Tick,
    not_finite,
)
from spectool.quantize.lm_head.base import LmHead, LmHeadQuantizer, special_tokens
from spectool.quantize.plan import QuantizePlan
from spectool.quantize.statistics import MIN_EXPERT_TOKENS, LinearStats, Observer, Statistic
from spectool.report import SILENT, Reporter

# Activation buffers that together exceed this are kept in files next to the shards.
BUFFERS_IN_MEMORY = 8 << 30

PACKED = "blocks packed"
LM_HEAD_FITTED = "lm_head fitted"


@dataclass(slots=True, kw_only=True)
class BlockWalk:
    """Walk over a checkpoint's blocks that writes one shard for each.

    `ids_SL` are the calibration sequences, None if no activations are needed; `opened`: each begins
    with a start token. `metadata` is written to every shard's header; activations are computed in
    `dtype`. `shell` is the model around the blocks, if it was created before.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    plan: QuantizePlan
    seed: int
    writer: ArtifactWriter
    metadata: dict[str, Any]
    ids_SL: Tensor | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    opened: bool = False
    reporter: Reporter = SILENT
    shell: ModelShell | None = None
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Pack everything that is not done; return the reports outside the blocks and per block."""
        blocks = self.architecture.blocks
        self._copy_outside()
        missing = [i for i in range(len(blocks)) if not self._is_done(i)]
        lm_head = self.plan.lm_head
        fits_lm_head = lm_head is not None and self.writer.report(self._shard(len(blocks))) is None
        last = len(blocks) - 1 if fits_lm_head else max(missing, default=-1)
        streams = self.start_streams() if last >= 0 else None
        # With streams, finished blocks are visited too, to advance the activations.
        visits = missing if streams is None else list(range(last + 1))
        with ThreadPoolExecutor(1) as reader:
            following: Future[dict[str, Tensor]] | None = None
            for visit, index in enumerate(visits):
                name, present = blocks[index], following
                # Reading ahead holds a second block in host memory: worth it with a GPU only.
                if self.device.type != "cpu" and visit + 1 < len(visits):
                    following = reader.submit(self.read, blocks[visits[visit + 1]])
                # Not bound to a name, which would keep this block until the next one is read.
                self._step(
                    index,
                    name,
                    present.result() if present else self.read(name),
                    streams,
                    functools.partial(self._tick, index),
                )
                trim_memory()
                self._tick(index, 1)
        if lm_head is not None and fits_lm_head:
            assert streams is not None
            self._fit_lm_head(
                lm_head, streams, lambda share: self.reporter.progress(share, 1, LM_HEAD_FITTED)
            )
        reports = [self.writer.report(self._shard(i)) for i in range(-1, len(blocks))]
        outside, *inside = [report for report in reports if report is not None]
        assert len(inside) == len(blocks)
        if lm_head is not None:
            report = self.writer.report(self._shard(len(blocks))) or {}
            outside = {
                "layers": outside["layers"] + report["layers"],
                "lm_head": report["lm_head"],
            }
        return outside, inside

    def _tick(self, index: int, share: float) -> None:
        """Report the share done of a block."""
        self.reporter.progress(index + share, len(self.architecture.blocks), PACKED)

    def _is_done(self, index: int) -> bool:
        """Return whether a block is written and, with calibration, its output error measured."""
        report = self.writer.report(self._shard(index))
        return report is not None and (self.ids_SL is None or "output_error" in report)

    def _shard(self, index: int) -> str:
        """Return the file name of a block's shard.

        Index -1 is the shard of tensors outside the blocks, the number of blocks that of a fitted
        lm_head.
        """
        total = len(self.architecture.blocks) + 1 + (self.plan.lm_head is not None)
        return f"packed-{index + 1:05d}-of-{total:05d}.safetensors"

    def read(self, block: str) -> dict[str, Tensor]:
        """Read the tensors of a block."""
        return self.architecture.read(self.checkpoint, self.architecture.tensors_of(block))

    def _copy_outside(self) -> None:
        """Write the shard of tensors outside the blocks, unless that is done."""
        shard = self._shard(-1)
        if self.writer.report(shard) is not None:
            return
        contents: dict[str, Content] = {}
        matrices, fitted = dict(self.plan.outside), self.plan.lm_head
        replaced = {
            name for matrix in matrices.values() for name in self.architecture.holding(matrix)
        }
        layers = []
        if fitted is not None:
            del matrices[fitted.name]
            # An existing bias is written with the fitted lm_head.
            bias = f"{fitted.name}.bias"
            replaced.add(bias)
            # Read to detect damage now, not after hours of work.
            for name in {fitted.parameter, bias} & self.architecture.origins.keys():
                self.architecture.read(self.checkpoint, [name])
        for key, matrix in matrices.items():
            tensors = self.architecture.read(self.checkpoint, [matrix.parameter])
            weights = {key: matrix.weight_nm(tensors)}
            block = Block(name=key, matrices={key: matrix}, weights=weights, device=self.device)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, -1))
            fields = self.plan.quantizers[key].pack_each(block, {}, generator)[key]
            contents.update({f"{key}.q.{name}": value for name, value in fields.items()})
            layers.append(self._layer(key, block, fields))
        for name in self.architecture.tensors_outside():
            if name in replaced:
                continue
            origin = self.architecture.origins[name]
            if origin.converter is None:
                contents[name] = self.checkpoint.layout.tensors[origin.stored[0][0]]
            else:
                contents.update(self.architecture.read(self.checkpoint, [name]))
        self.writer.write_shard(shard, contents, self.metadata, {"layers": layers})

    def _fit_lm_head(self, matrix: Matrix, streams: Streams, tick: Tick) -> None:
        """Fit the lm_head on the outputs of the packed blocks, and write its shard."""
        assert self.ids_SL is not None
        states_TD = self._lm_head_inputs(matrix, streams)
        names = [matrix.parameter, f"{matrix.name}.bias"]
        tensors = self.architecture.read(
            self.checkpoint, [name for name in names if name in self.architecture.origins]
        )
        weight_VD, bias_V = tensors[matrix.parameter], tensors.get(f"{matrix.name}.bias")
        quantizer = self.plan.quantizers[matrix.name]
        assert isinstance(quantizer, LmHeadQuantizer)
        counts_V = torch.bincount(self.ids_SL.flatten(), minlength=len(weight_VD))
        fitted = quantizer.fit_lm_head(
            LmHead(
                weight_VD=weight_VD.to(self.device).float(),
                bias_V=None if bias_V is None else bias_V.float().to(self.device),
                finish=final_logits(self.architecture.config),
                states_TD=states_TD,
                counts_V=counts_V.to(self.device),
                special=special_tokens(self.architecture.config, len(weight_VD)),
            ),
            torch.Generator().manual_seed(derive_seed(self.seed, len(self.architecture.blocks))),
            tick,
        )
        fields = {name: value.cpu() for name, value in fitted.fields.items()}
        block = Block(
            name=matrix.name,
            matrices={matrix.name: matrix},
            weights={matrix.name: weight_VD},
            device=self.device,
        )
        layer = self._layer(matrix.name, block, fields)
        contents: dict[str, Content] = {
            f"{matrix.name}.q.{name}": value for name, value in fields.items()
        }
        contents[f"{matrix.name}.bias"] = fitted.bias_V.to(weight_VD.dtype).cpu()
        shard = self._shard(len(self.architecture.blocks))
        self.writer.write_shard(
            shard, contents, self.metadata, {"layers": [layer], "lm_head": asdict(fitted.report)}
        )

    def _lm_head_inputs(self, matrix: Matrix, streams: Streams) -> Tensor:
        """Compute the lm_head's inputs [T, D] after the packed blocks, on the host."""
        assert self.ids_SL is not None
        shell = ModelShell(
            self.architecture,
            self.checkpoint,
            dtype=self.dtype,
            device=self.device,
            with_lm_head=True,
        )
        # Start tokens are left out, as in the statistics.
        first = 1 if self.opened else 0
        num, length = self.ids_SL.shape
        states_SLD = torch.empty(num, length - first, matrix.shape[1])
        for batch in streams.packed.batches(self.batch_size):
            hidden_BLD = streams.packed.hidden_SLD[batch].to(self.device)
            states_BLD = shell.head_inputs(self.ids_SL[batch], hidden_BLD)
            states_SLD[batch] = states_BLD[:, first:]
        return states_SLD.flatten(0, 1)

    def start_streams(self) -> Streams | None:
        """Embed the calibration sequences as inputs of the first block; None without calibration.

        Also records how each block is called (`calls`).

        Raises:
            NotFinite: the embedding's output is NaN or infinite.
        """
        if self.ids_SL is None:
            return None
        make = functools.partial(
            ModelShell,
            self.architecture,
            self.checkpoint,
            dtype=self.dtype,
            device=self.device,
            with_lm_head=False,
        )
        shell, table = self.shell or make(), self._packed_table()
        packed = None if table is None else make(table=table)
        num, length = self.ids_SL.shape
        batches = [slice(i, i + self.batch_size) for i in range(0, num, self.batch_size)]
        first = shell.embed(self.ids_SL[:1])
        shape = (num, length, first.shape[-1])
        in_files = self.plan.num_buffers * self.plan.buffer_bytes > BUFFERS_IN_MEMORY
        with disk_errors(self.writer.partial):
            sides = (
                Activations(
                    shape,
                    self.dtype,
                    file=self.writer.path(f"activations-{side}.bin") if in_files else None,
                )
                for side in ("original", "packed")
            )
            streams = Streams(*sides)
        for batch in batches:
            hidden_BLD = shell.embed(self.ids_SL[batch]).cpu()
            if not all_finite(hidden_BLD):
                raise not_finite("the embedding", "its output is NaN or infinite")
            streams.original.hidden_SLD[batch] = hidden_BLD
            if packed is not None:
                hidden_BLD = packed.embed(self.ids_SL[batch]).cpu()
            streams.packed.hidden_SLD[batch] = hidden_BLD
        # A fit runs one sequence at a time, whatever the batch size.
        sizes = {1, *(len(self.ids_SL[batch]) for batch in batches)}
        self.calls = {size: shell.calls(size, length) for size in sizes}
        return streams

    def _packed_table(self) -> PackedLinear | None:
        """Return the embedding as read back from its shard; None if it stays dense."""
        for key, matrix in self.plan.outside.items():
            if matrix.kind == "embedding":
                self._copy_outside()
                entries = read_header(self.writer.path(self._shard(-1)))[1]
                fields = {
                    entry.name.removeprefix(f"{key}.q."): read_tensor(entry)
                    for entry in entries
                    if entry.name.startswith(f"{key}.q.")
                }
                return load_packed(self.plan.quantizers[key], matrix, fields)
        return None

    def _step(
        self,
        index: int,
        name: str,
        tensors: dict[str, Tensor],
        streams: Streams | None,
        tick: Tick,
    ) -> None:
        """Pack and write one block unless that is done; advance both streams through it."""
        block = self.open(index, name, tensors, streams)
        shard = self._shard(index)
        report = self.writer.report(shard)
        if report is None:
            report = self._pack(index, block, tensors, streams, shard, tick)
        if streams is not None:
            report["output_error"] = self._advance(block, streams, shard)
            self.writer.record(shard, report)

    def open(
        self, index: int, name: str, tensors: dict[str, Tensor], streams: Streams | None
    ) -> Block:
        """Create the quantizer's view of a block; with its module if there are streams."""
        matrices = self.plan.matrices[name]
        block = Block(
            name=name,
            matrices=matrices,
            weights={key: matrix.weight_nm(tensors) for key, matrix in matrices.items()},
            device=self.device,
        )
        if streams is not None:
            block.module = self.architecture.materialise(
                name, tensors, dtype=self.dtype, device=self.device
            )
            block.calls = {size: calls[index] for size, calls in self.calls.items()}
        return block

    def _pack(
        self,
        index: int,
        block: Block,
        tensors: dict[str, Tensor],
        streams: Streams | None,
        shard: str,
        tick: Tick,
    ) -> dict[str, Any]:
        """Pack a block and write its shard; return its report."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index))
        groups: dict[Quantizer, list[str]] = {}
        for key in block.matrices:
            groups.setdefault(self.plan.quantizers[key], []).append(key)
        fields: dict[str, PackedFields] = {}
        data_free: list[str] = []
        fits = []
        for quantizer, keys in groups.items():
            part = replace(
                block,
                matrices={key: block.matrices[key] for key in keys},
                weights={key: block.weights[key] for key in keys},
            )
            fitted, without_data = self._fit(quantizer, part, streams, generator, tick)
            fields |= fitted.fields
            data_free += without_data
            fits += [fitted.report.as_dict()] if fitted.report else []
        taken = {matrix.parameter for matrix in block.matrices.values()}
        contents: dict[str, Content] = {
            key: tensor for key, tensor in tensors.items() if key not in taken
        }
        layers = []
        for key in block.matrices:
            contents.update({f"{key}.q.{name}": value for name, value in fields[key].items()})
            layers.append(self._layer(key, block, fields[key]))
        report = {"layers": layers, "data_free": data_free, "fits": fits}
        self.writer.write_shard(shard, contents, self.metadata, report)
        # Only the module is needed from here on: free the stored tensors.
        block.weights = {}
        tensors.clear()
        trim_memory()
        return report

    def _fit(
        self,
        quantizer: Quantizer,
        block: Block,
        streams: Streams | None,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Fitted, list[str]]:
        """Pack the matrices of one quantizer; also return the names of those packed without data.

        Raises:
            NotFinite: statistics that are NaN or infinite.
            UnsupportedError: the method cannot represent a matrix.
        """
        stats = self.observe(block, quantizer, streams) if streams is not None else {}
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
        for key, linear_stats in stats.items():
            for statistic in linear_stats.wanted:
                value = getattr(linear_stats, statistic)
                if value is not None and not all_finite(value):
                    raise not_finite(key, f"{statistic} of its inputs is NaN or infinite")
        # A fit allocates buffers of targets, in files if they are large.
        with disk_errors(self.writer.partial):
            return quantizer.fit(block, streams, stats, generator, tick), data_free

    def _layer(self, key: str, block: Block, fields: PackedFields) -> dict[str, Any]:
        """Return the record of a packed matrix: bits per weight, relative squared error of weights.

        Raises:
            UnsupportedError: the packed weights are not finite.
        """
        matrix = block.matrices[key]
        module = load_packed(self.plan.quantizers[key], matrix, fields)
        error = relative_error(block.weights[key], module)
        if not math.isfinite(error):
            raise UnsupportedError(
                f"{key}: {self.plan.quantizers[key].name} cannot represent its weights, the "
                f"largest is {float(block.weights[key].abs().max()):.3g}",
                hint="leave it dense with --skip",
            )
        stored_bytes = sum(value.numel() * value.element_size() for value in fields.values())
        return {
            "name": key,
            "bits": 8 * stored_bytes / matrix.num_weights,
            "error": error,
        }

    def observe(
        self, block: Block, quantizer: Quantizer, streams: Streams
    ) -> dict[str, LinearStats]:
        """Collect the statistics of a method, each from its stream, by matrix."""
        assert block.module is not None
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
                opened=inputs.hidden_SLD.shape[1] if self.opened else 0,
            )
            with observer:
                for batch in inputs.batches(self.batch_size):
                    hidden_BLD = inputs.hidden_SLD[batch].to(self.device)
                    run_block(block.module, block.calls[len(hidden_BLD)], hidden_BLD)
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

    def _advance(self, block: Block, streams: Streams, shard: str) -> float:
        """Advance both streams through the block; return the relative squared output error."""
        dense = block.module
        assert dense is not None
        for batch in streams.original.batches(self.batch_size):
            self.advance_batch(dense, block, streams.original, batch)
        # Free the dense module before the packed one is created.
        block.module = dense = None
        trim_memory()
        packed = self._reload(block, shard)
        error, energy = 0.0, 0.0
        for batch in streams.packed.batches(self.batch_size):
            self.advance_batch(packed, block, streams.packed, batch)
            original_BLD = streams.original.hidden_SLD[batch].float()
            packed_BLD = streams.packed.hidden_SLD[batch].float()
            error += float((original_BLD - packed_BLD).square().sum())
            energy += float(original_BLD.square().sum())
        return error / energy if energy else 0.0

    def advance_batch(
        self, module: nn.Module, block: Block, side: Activations, batch: slice
    ) -> None:
        """Replace one batch of the activations `side` by the module's outputs.

        Raises:
            NotFinite: outputs that are NaN or infinite.
        """
        call = block.calls[batch.stop - batch.start]
        hidden_BLD = side.hidden_SLD[batch].to(self.device)
        out_BLD = run_block(module, call, hidden_BLD).cpu()
        if not all_finite(out_BLD):
            raise not_finite(block.name, "its output is NaN or infinite on the calibration text")
        side.hidden_SLD[batch] = out_BLD

    def _reload(self, block: Block, shard: str) -> nn.Module:
        """Create the packed block as read back from its shard."""
        entries = read_header(self.writer.path(shard))[1]
        return self.architecture.materialise(
            block.name,
            {entry.name: read_tensor(entry) for entry in entries},
            dtype=self.dtype,
            device=self.device,
            modules={
                key: make_entry(self.plan.quantizers[key], matrix)
                for key, matrix in block.matrices.items()
            },
        )


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


def load_packed(quantizer: Quantizer, matrix: Matrix, fields: PackedFields) -> PackedLinear:
    """Create a packed module from its fields, on the host."""
    spec = {name: (value.dtype, tuple(value.shape)) for name, value in fields.items()}
    linear = build_packed(make_entry(quantizer, matrix), spec)
    linear.q.load_state_dict(fields)
    return linear


def derive_seed(seed: int, block: int) -> int:
    """Return the seed of a block, independent of the order in which blocks are packed."""
    digest = hashlib.sha256(f"{seed}/{block}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
