"""The block walk: load one block, look at it, pack it, write it, free it.

Whatever the checkpoint's size, one block and two activation buffers are resident (four where a
method fits: its targets too). What is written for a block depends only on the source, the options,
the calibration tokens and (seed, block); where a method fits, on the number of threads as well,
which is recorded. The packed stream advances through the packed module as read back from its shard.
So a run that was killed ends with the same bytes as one that was not.

Shapes: S sequences, B of a batch, L tokens, D width.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.artifact import ArtifactWriter, Content, disk_errors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import Checkpoint, all_finite, read_tensor
from spectool.errors import UnsupportedError
from spectool.machine import trim_memory
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, Call, ModelShell, final_logits, run_block
from spectool.model.matrices import Matrix
from spectool.model.packed import PackedLinear, build_packed, relative_error
from spectool.quantize.calibration import (
    MIN_EXPERT_TOKENS,
    Block,
    Fitted,
    LinearStats,
    Observer,
    PackedFields,
    Statistic,
    Stream,
    Streams,
    Tick,
    fit_each,
    not_finite,
)
from spectool.quantize.choice import Choice
from spectool.quantize.lm_head import vq
from spectool.quantize.plan import LM_HEAD_METHOD, Plan

# Activation buffers larger than this together live in files beside the shards.
BUFFERS_IN_MEMORY = 8 << 30

# What is told to whoever watches: blocks done (with the present one's share, where its method says
# it), blocks in all, what was done to them.
Progress = Callable[[float, int, str], None]
PACKED = "blocks packed"
LM_HEAD_FITTED = "output matrix learnt"


@dataclass(slots=True, kw_only=True)
class BlockWalk:
    """One walk over a checkpoint's blocks.

    `ids_SL` are the calibration sequences, None where no activations are needed, and `opened` says
    that each begins with a start token; `metadata` goes into every shard's header; `dtype` is what
    activations are computed in. `shell`, if it is built already, is what surrounds the blocks.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    plan: Plan
    seed: int
    writer: ArtifactWriter
    metadata: dict[str, Any]
    ids_SL: Tensor | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    opened: bool = False
    say: Callable[[str], None] = lambda line: None
    shell: ModelShell | None = None
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def run(self, progress: Progress) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The reports of what lies outside the blocks, and of every block."""
        blocks = self.architecture.blocks
        self._copy_outside()
        missing = [i for i in range(len(blocks)) if not self._is_done(i)]
        head = self._fitted_lm_head()
        head_missing = head is not None and self.writer.report(self._shard(len(blocks))) is None
        last = len(blocks) - 1 if head_missing else max(missing, default=-1)
        streams = self.start_streams() if last >= 0 else None
        # Finished blocks matter only for what flows through them.
        visits = missing if streams is None else list(range(last + 1))
        with ThreadPoolExecutor(1) as reader:
            following: Future[dict[str, Tensor]] | None = None
            for visit, index in enumerate(visits):
                name, present = blocks[index], following
                # Reading ahead costs a second block of host memory: worth it beside a GPU only.
                if self.device.type != "cpu" and visit + 1 < len(visits):
                    following = reader.submit(self.read, blocks[visits[visit + 1]])
                # Bound to no name here, or this block would live until the next one is read.
                self._step(
                    index,
                    name,
                    present.result() if present else self.read(name),
                    streams,
                    functools.partial(_tick, progress, index, len(blocks)),
                )
                trim_memory()
                progress(index + 1, len(blocks), PACKED)
        if head is not None and head_missing:
            assert streams is not None
            self._fit_lm_head(head, streams, lambda share: progress(share, 1, LM_HEAD_FITTED))
        reports = [self.writer.report(self._shard(i)) for i in range(-1, len(blocks))]
        outside, *inside = [report for report in reports if report is not None]
        assert len(inside) == len(blocks)
        if head is not None:
            said = self.writer.report(self._shard(len(blocks))) or {}
            outside = {"layers": outside["layers"] + said["layers"], "lm_head": said["lm_head"]}
        return outside, inside

    def _fitted_lm_head(self) -> Matrix | None:
        """The output matrix, if it is learnt."""
        found = (
            matrix
            for key, matrix in self.plan.outside.items()
            if matrix.kind == "lm_head" and self.plan.choices[key].method == LM_HEAD_METHOD
        )
        return next(found, None)

    def _is_done(self, index: int) -> bool:
        report = self.writer.report(self._shard(index))
        return report is not None and (self.ids_SL is None or "output_error" in report)

    def _shard(self, index: int) -> str:
        """Shard 0 holds what belongs to no block, and one after the blocks a learnt head."""
        total = len(self.architecture.blocks) + 1 + (self._fitted_lm_head() is not None)
        return f"packed-{index + 1:05d}-of-{total:05d}.safetensors"

    def read(self, block: str) -> dict[str, Tensor]:
        return self.architecture.read(self.checkpoint, self.architecture.tensors_of(block))

    def _copy_outside(self) -> None:
        """Write what belongs to no block, unless that is done."""
        shard = self._shard(-1)
        if self.writer.report(shard) is not None:
            return
        contents: dict[str, Content] = {}
        matrices, learnt = dict(self.plan.outside), self._fitted_lm_head()
        replaced = {
            name for matrix in matrices.values() for name in self.architecture.holding(matrix)
        }
        layers = []
        if learnt is not None:
            del matrices[learnt.name]
            # A bias that it has comes with it.
            bias = f"{learnt.name}.bias"
            replaced.add(bias)
            # Read in vain unless it is damaged: that is to be known before hours of work.
            for name in {learnt.parameter, bias} & self.architecture.origins.keys():
                self.architecture.read(self.checkpoint, [name])
        for key, matrix in matrices.items():
            tensors = self.architecture.read(self.checkpoint, [matrix.parameter])
            block = Block(key, {key: matrix}, {key: matrix.weight_nm(tensors)})
            generator = torch.Generator().manual_seed(derive_seed(self.seed, -1))
            choice = self.plan.choices[key]
            fields = fit_each(
                choice.quantizer, block, {}, choice.config, generator, self.device
            ).fields[key]
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
        """Learn the output matrix on what the packed blocks put out."""
        assert self.ids_SL is not None
        states_TD = self._lm_head_inputs(matrix, streams)
        names = [matrix.parameter, f"{matrix.name}.bias"]
        tensors = self.architecture.read(
            self.checkpoint, [name for name in names if name in self.architecture.origins]
        )
        weight_VD, bias_V = tensors[matrix.parameter], tensors.get(f"{matrix.name}.bias")
        config: Any = self.plan.choices[matrix.name].config
        fields, own_V, metrics = vq.fit_lm_head(
            weight_VD.to(self.device),
            None if bias_V is None else bias_V.float().to(self.device),
            vq.FitText(
                states_TD,
                torch.bincount(self.ids_SL.flatten(), minlength=len(weight_VD)).to(self.device),
                vq.special_tokens(self.architecture.config, len(weight_VD)),
            ),
            config,
            final_logits(self.architecture.config),
            torch.Generator().manual_seed(derive_seed(self.seed, len(self.architecture.blocks))),
            self.say,
            tick,
        )
        fields = {name: value.cpu() for name, value in fields.items()}
        block = Block(matrix.name, {matrix.name: matrix}, {matrix.name: weight_VD})
        layer = self._layer(matrix.name, block, fields)
        contents: dict[str, Content] = {
            f"{matrix.name}.q.{name}": value for name, value in fields.items()
        }
        contents[f"{matrix.name}.bias"] = own_V.to(weight_VD.dtype).cpu()
        shard = self._shard(len(self.architecture.blocks))
        self.writer.write_shard(
            shard, contents, self.metadata, {"layers": [layer], "lm_head": metrics}
        )

    def _lm_head_inputs(self, matrix: Matrix, streams: Streams) -> Tensor:
        """What the packed blocks' outputs become before the output matrix [T, D], on the host."""
        assert self.ids_SL is not None
        shell = ModelShell(
            self.architecture,
            self.checkpoint,
            dtype=self.dtype,
            device=self.device,
            with_lm_head=True,
        )
        begin = 1 if self.opened else 0
        num, length = self.ids_SL.shape
        states_SLD = torch.empty(num, length - begin, matrix.shape[1])
        for batch in streams.packed.batches(self.batch_size):
            hidden_BLD = streams.packed.hidden_SLD[batch].to(self.device)
            found_BLD = shell.head_inputs(self.ids_SL[batch], hidden_BLD)
            states_SLD[batch] = found_BLD[:, begin:]
        return states_SLD.flatten(0, 1)

    def start_streams(self) -> Streams | None:
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
        # A fit sees one sequence at a time.
        sizes = {1, *(len(self.ids_SL[batch]) for batch in batches)}
        self.calls = {size: shell.calls(size, length) for size in sizes}
        return streams

    def _packed_table(self) -> PackedLinear | None:
        """The embedding as the artifact's reader will see it, if it is packed; written first."""
        for key, matrix in self.plan.outside.items():
            if matrix.kind == "embedding":
                self._copy_outside()
                entries = read_header(self.writer.path(self._shard(-1)))[1]
                fields = {
                    entry.name.removeprefix(f"{key}.q."): read_tensor(entry)
                    for entry in entries
                    if entry.name.startswith(f"{key}.q.")
                }
                return load_packed(self.plan.choices[key], matrix, fields)
        return None

    def _step(
        self,
        index: int,
        name: str,
        tensors: dict[str, Tensor],
        streams: Streams | None,
        tick: Tick,
    ) -> None:
        """Pack and write one block, unless that is done, and advance both streams through it."""
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
        """A block of these tensors as a quantizer sees it; with its module if there are streams."""
        matrices = self.plan.matrices[name]
        block = Block(
            name=name,
            matrices=matrices,
            weights={key: matrix.weight_nm(tensors) for key, matrix in matrices.items()},
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
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index))
        groups: dict[Choice, list[str]] = {}
        for key in block.matrices:
            groups.setdefault(self.plan.choices[key], []).append(key)
        fields: dict[str, PackedFields] = {}
        seen_little: list[str] = []
        fits = []
        for choice, keys in groups.items():
            part = replace(
                block,
                matrices={key: block.matrices[key] for key in keys},
                weights={key: block.weights[key] for key in keys},
            )
            fitted, unseen = self._fit(choice, part, streams, generator, tick)
            fields |= fitted.fields
            seen_little += unseen
            fits += [fitted.report] if fitted.report else []
        taken = {matrix.parameter for matrix in block.matrices.values()}
        contents: dict[str, Content] = {
            key: tensor for key, tensor in tensors.items() if key not in taken
        }
        layers = []
        for key in block.matrices:
            contents.update({f"{key}.q.{name}": value for name, value in fields[key].items()})
            layers.append(self._layer(key, block, fields[key]))
        report = {"layers": layers, "data_free": seen_little, "fits": fits}
        self.writer.write_shard(shard, contents, self.metadata, report)
        # From here on only the module counts: the stored tensors need not stay beside it.
        block.weights = {}
        tensors.clear()
        trim_memory()
        return report

    def _fit(
        self,
        choice: Choice,
        block: Block,
        streams: Streams | None,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Fitted, list[str]]:
        """The block's matrices that one method packs, the others as they were; and the names of
        those that too little text came to."""
        method = choice.quantizer
        stats = self.observe(block, choice, streams) if streams is not None else {}
        seen_little = [
            key
            for key, matrix in block.matrices.items()
            if method.statistics
            and (
                key not in stats
                or (matrix.expert is not None and stats[key].num_tokens < MIN_EXPERT_TOKENS)
            )
        ]
        for key in seen_little:
            stats.pop(key, None)
        for key, found in stats.items():
            for statistic in found.wanted:
                value = getattr(found, statistic)
                if value is not None and not all_finite(value):
                    raise not_finite(key, f"{statistic} of its inputs is NaN or infinite")
        if hasattr(method, "fit"):
            with disk_errors(self.writer.partial):
                fitted: Fitted = method.fit(block, streams, stats, choice.config, generator, tick)
        else:
            fitted = fit_each(method, block, stats, choice.config, generator, self.device)
        return fitted, seen_little

    def _layer(self, key: str, block: Block, fields: PackedFields) -> dict[str, Any]:
        """Stored bits per weight, and the relative squared error of the weights."""
        matrix = block.matrices[key]
        module = load_packed(self.plan.choices[key], matrix, fields)
        error = relative_error(block.weights[key], module)
        if not math.isfinite(error):
            raise UnsupportedError(
                f"{key}: {self.plan.choices[key].method} cannot hold its weights, the largest is "
                f"{float(block.weights[key].abs().max()):.3g}",
                hint="leave it dense with --skip",
            )
        stored_bytes = sum(value.numel() * value.element_size() for value in fields.values())
        return {
            "name": key,
            "bits": 8 * stored_bytes / matrix.num_weights,
            "error": error,
        }

    def observe(self, block: Block, choice: Choice, streams: Streams) -> dict[str, LinearStats]:
        """The statistics the method asks for, each at the stream it names."""
        assert block.module is not None
        passes: list[dict[str, LinearStats]] = []
        by_stream: dict[Stream, list[Statistic]] = {}
        for statistic, stream in choice.quantizer.statistics.items():
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
        # Routing differs between the streams: an expert counts the tokens that both sent to it.
        found, *others = passes or [{}]
        for key in list(found):
            for more, wanted in zip(others, list(by_stream.values())[1:], strict=True):
                if key not in more:
                    del found[key]
                    break
                for statistic in wanted:
                    setattr(found[key], statistic, getattr(more[key], statistic))
                found[key].num_tokens = min(found[key].num_tokens, more[key].num_tokens)
        return found

    def _advance(self, block: Block, streams: Streams, shard: str) -> float:
        """Push both streams through the block; returns the relative squared error of its output."""
        dense = block.module
        assert dense is not None
        for batch in streams.original.batches(self.batch_size):
            self.advance_batch(dense, block, streams.original, batch)
        # One of the two modules at a time: the dense one has done its part.
        block.module = dense = None
        trim_memory()
        packed = self._reload(block, shard)
        wrong, all_of_it = 0.0, 0.0
        for batch in streams.packed.batches(self.batch_size):
            self.advance_batch(packed, block, streams.packed, batch)
            wanted = streams.original.hidden_SLD[batch].float()
            found = streams.packed.hidden_SLD[batch].float()
            wrong += float((wanted - found).square().sum())
            all_of_it += float(wanted.square().sum())
        return wrong / all_of_it if all_of_it else 0.0

    def advance_batch(
        self, module: nn.Module, block: Block, side: Activations, batch: slice
    ) -> None:
        """Replace one batch of a block's inputs by its outputs."""
        call = block.calls[batch.stop - batch.start]
        hidden_BLD = side.hidden_SLD[batch].to(self.device)
        out_BLD = run_block(module, call, hidden_BLD).cpu()
        if not all_finite(out_BLD):
            raise not_finite(block.name, "its output is NaN or infinite on the calibration text")
        side.hidden_SLD[batch] = out_BLD

    def _reload(self, block: Block, shard: str) -> nn.Module:
        """The block as the artifact's reader will see it."""
        entries = read_header(self.writer.path(shard))[1]
        return self.architecture.materialise(
            block.name,
            {entry.name: read_tensor(entry) for entry in entries},
            dtype=self.dtype,
            device=self.device,
            modules={
                key: make_entry(self.plan.choices[key], matrix)
                for key, matrix in block.matrices.items()
            },
        )


def _tick(progress: Progress, done: int, total: int, share: float) -> None:
    progress(done + share, total, PACKED)


def make_entry(choice: Choice, matrix: Matrix) -> dict[str, Any]:
    """A matrix's line in the artifact's configuration."""
    said: dict[str, Any] = {**choice.as_dict(), "shape": list(matrix.shape)}
    if matrix.expert is not None:
        said["expert"] = True
    if matrix.kind in ("embedding", "lm_head"):
        said["outside"] = matrix.kind
    if matrix.tied is not None:
        said["tied"] = matrix.tied
    if choice.method == LM_HEAD_METHOD and matrix.kind == "lm_head":
        said["bias"] = True
    return said


def load_packed(choice: Choice, matrix: Matrix, fields: PackedFields) -> PackedLinear:
    """A packed matrix of these fields, on the host."""
    spec = {name: (value.dtype, tuple(value.shape)) for name, value in fields.items()}
    linear = build_packed(make_entry(choice, matrix), spec)
    linear.q.load_state_dict(fields)
    return linear


def derive_seed(seed: int, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{block}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
