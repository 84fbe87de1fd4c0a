"""Budget of bits: choose each matrix's method and width by measured errors (`--bits-budget`).

Every candidate packs each matrix alone. With F the block, F' the block with that one matrix packed
and X the block's inputs in the original model on some calibration sequences, its error is

    e = |F'(X) - F(X)|^2 / |F(X)|^2.

Errors of matrices and of blocks are assumed to add up. Starting with the smallest candidates, the
change that saves the most error per byte is made until none fits. Methods with a fit are measured
before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectool.errors import UsageError
from spectool.machine import trim_memory
from spectool.model.blocks import run_block
from spectool.model.packed import PackedLinear
from spectool.options import options_of
from spectool.quantize.base import Block, Quantizer, Streams
from spectool.quantize.fitting import Substitute
from spectool.quantize.plan import QuantizePlan, check_shape
from spectool.quantize.rules import Rule
from spectool.quantize.statistics import LinearStats
from spectool.quantize.walk import BlockWalk, derive_seed, load_packed

# Errors are measured on at least this many calibration sequences, if there are.
NUM_MEASURED = 8
# Candidate widths go up to this many bits above the budget.
WIDER = 2


@dataclass(frozen=True, slots=True)
class Budget:
    """Most stored bits per weight of the blocks' packed matrices, and the candidate methods."""

    bits: float
    candidates: tuple[Quantizer, ...]

    def __post_init__(self) -> None:
        if not math.isfinite(self.bits):
            raise UsageError(f"--bits-budget {self.bits}: must be a number of bits")

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-safe form stored in artifacts."""
        return {
            "bits": self.bits,
            "candidates": [quantizer.as_dict() for quantizer in self.candidates],
        }


def widths(quantizer: Quantizer, budget: float) -> tuple[Quantizer, ...]:
    """Return a method's quantizers at all widths of up to `WIDER` bits above the budget.

    Raises:
        UsageError: the method has only one width, or the budget is not finite.
    """
    Budget(budget, ())
    option = next((o for o in options_of(type(quantizer.config)) if o.name == "bits"), None)
    if option is None:
        raise UsageError(
            f"--bits-budget: {quantizer.name} has one width",
            hint="name the methods to choose from with --candidate METHOD:key=value, repeated",
        )
    known = option.choices
    if not known:
        assert option.minimum is not None and option.maximum is not None
        known = tuple(range(int(option.minimum), int(option.maximum) + 1))
    tried = [bits for bits in known if bits <= math.ceil(budget) + WIDER] or [known[0]]
    return tuple(
        type(quantizer)(dataclasses.replace(quantizer.config, bits=bits)) for bits in tried
    )


def list_candidates(
    plan: QuantizePlan, budget: Budget, rules: Sequence[Rule]
) -> dict[str, tuple[Quantizer, ...]]:
    """List the candidates of each matrix by name: its rule's quantizer, or those of the budget.

    Raises:
        UsageError: the smallest candidates exceed the budget.
    """
    matrices = [matrix for block in plan.matrices.values() for matrix in block.values()]
    pinned = {name for name in plan.quantizers if any(rule.matches(name) for rule in rules)}
    candidates = {
        matrix.name: (plan.quantizers[matrix.name],) if matrix.name in pinned else budget.candidates
        for matrix in matrices
    }
    for matrix in matrices:
        for quantizer in candidates[matrix.name]:
            check_shape(matrix, quantizer)
    least = sum(
        min(quantizer.stored_bytes(s.shape) for quantizer in candidates[s.name]) for s in matrices
    )
    if 8 * least > budget.bits * plan.num_weights:
        raise UsageError(
            f"--bits-budget {budget.bits}: the smallest candidates take "
            f"{8 * least / plan.num_weights:.3f} bits a weight"
        )
    return candidates


def survey(
    walk: BlockWalk, candidates: Mapping[str, Sequence[Quantizer]]
) -> dict[str, list[float]]:
    """Measure the error of each candidate, by matrix and in the candidates' order.

    Finished blocks are recorded, so that an interrupted survey resumes.
    """
    streams = walk.start_streams()
    assert streams is not None
    blocks = walk.architecture.blocks
    errors: dict[str, list[float]] = {}
    for index in range(len(blocks)):
        errors |= _survey_block(walk, index, streams, candidates)
        trim_memory()
        walk.reporter.progress(index + 1, len(blocks), "blocks measured")
    return errors


def _survey_block(
    walk: BlockWalk, index: int, streams: Streams, candidates: Mapping[str, Sequence[Quantizer]]
) -> dict[str, list[float]]:
    """Measure one block, unless that is recorded, and advance the original stream through it."""
    name = walk.architecture.blocks[index]
    block = walk.open(index, name, walk.read(name), streams)
    assert block.module is not None
    shard = f"survey-{index + 1:05d}.safetensors"
    report: dict[str, list[float]] | None = walk.writer.report(shard)
    if report is None:
        report = _measure_block(walk, index, block, streams, candidates)
        walk.writer.write_shard(shard, {}, {}, report)
    for batch in streams.original.batches(walk.batch_size):
        walk.advance_batch(block.module, block, streams.original, batch)
    return report


def discard_survey(walk: BlockWalk) -> None:
    """Remove the recorded errors of a survey."""
    for index in range(len(walk.architecture.blocks)):
        walk.writer.discard(f"survey-{index + 1:05d}.safetensors")


def _measure_block(
    walk: BlockWalk,
    index: int,
    block: Block,
    streams: Streams,
    candidates: Mapping[str, Sequence[Quantizer]],
) -> dict[str, list[float]]:
    """Measure the error of every candidate of one block's matrices."""
    assert block.module is not None
    # Whole batches, as calls of the block are known for those sizes only.
    count = -(-NUM_MEASURED // walk.batch_size)
    slices = itertools.islice(streams.original.batches(walk.batch_size), count)
    batches = [streams.original.hidden_SLD[batch] for batch in slices]
    outputs = [_run_block(walk, block, hidden_BLD) for hidden_BLD in batches]
    energy = sum(float(out_BLD.double().square().sum()) for out_BLD in outputs)
    # The packed stream does not exist yet.
    original_only = Streams(streams.original, streams.original)
    errors = {name: [0.0] * len(candidates[name]) for name in block.matrices}
    by_method = {
        quantizer.name: quantizer for name in block.matrices for quantizer in candidates[name]
    }
    for method, example in by_method.items():
        # Statistics can be as large as the block: hold those of one method at a time.
        stats = walk.observe(block, example, original_only)
        for name, matrix in block.matrices.items():
            part = replace(block, matrices={name: matrix}, weights={name: block.weights[name]})
            part_stats = {key: stats[key] for key in {name} & stats.keys()}
            for position, quantizer in enumerate(candidates[name]):
                if quantizer.name != method:
                    continue
                # Packing consumes the statistics it is given, and every width needs them.
                linear = _pack_matrix(walk, index, part, dict(part_stats), quantizer)
                squares = 0.0
                with Substitute(part, {name: linear}):
                    for hidden_BLD, out_BLD in zip(batches, outputs, strict=True):
                        error_BLD = _run_block(walk, block, hidden_BLD) - out_BLD
                        squares += float(error_BLD.double().square().sum())
                errors[name][position] = squares / energy if energy else 0.0
    return errors


def _pack_matrix(
    walk: BlockWalk,
    index: int,
    part: Block,
    stats: dict[str, LinearStats],
    quantizer: Quantizer,
) -> PackedLinear:
    """Pack the only matrix of `part`; consumes `stats`."""
    ((name, matrix),) = part.matrices.items()
    generator = torch.Generator().manual_seed(derive_seed(walk.seed, index))
    fields = quantizer.pack_each(part, stats, generator)[name]
    return load_packed(quantizer, matrix, fields).to(walk.device)


def _run_block(walk: BlockWalk, block: Block, hidden_BLD: Tensor) -> Tensor:
    """Return the block's output [B, L, D] in float32, on the walk's device."""
    assert block.module is not None
    return run_block(block.module, block.calls[len(hidden_BLD)], hidden_BLD.to(walk.device)).float()


def choose(
    plan: QuantizePlan,
    budget: Budget,
    candidates: Mapping[str, Sequence[Quantizer]],
    errors: Mapping[str, Sequence[float]],
) -> list[Rule]:
    """Choose a candidate for each matrix within the budget; return a rule for each."""
    matrices = {
        matrix.name: matrix for block in plan.matrices.values() for matrix in block.values()
    }
    sizes = {
        name: [c.stored_bytes(matrix.shape) for c in candidates[name]]
        for name, matrix in matrices.items()
    }
    chosen = {}
    for name, each in sizes.items():
        ranked = list(zip(each, errors[name], strict=True))
        chosen[name] = ranked.index(min(ranked))
    left = int(budget.bits * plan.num_weights / 8) - sum(sizes[n][i] for n, i in chosen.items())
    while True:
        # Error saved per further byte, for every change that still fits.
        gains = [
            ((errors[name][now] - errors[name][other]) / (size - sizes[name][now]), name, other)
            for name, now in chosen.items()
            for other, size in enumerate(sizes[name])
            if 0 < size - sizes[name][now] <= left and errors[name][other] < errors[name][now]
        ]
        if not gains:
            break
        _, name, other = max(gains, key=lambda gain: gain[0])
        left -= sizes[name][other] - sizes[name][chosen[name]]
        chosen[name] = other
    origin = f"--bits-budget {budget.bits}"
    return [Rule(name, candidates[name][index], origin) for name, index in chosen.items()]
