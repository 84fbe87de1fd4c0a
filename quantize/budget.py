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
from dataclasses import replace

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.errors import UsageError
from spectool.machine import trim_memory
from spectool.model.packed import load_packed
from spectool.options import options_of
from spectool.quantize.base import Block, Quantizer, Streams
from spectool.quantize.fitting import Substitute
from spectool.quantize.job import Budget
from spectool.quantize.pack import make_entry
from spectool.quantize.plan import QuantizePlan, check_matrix
from spectool.quantize.rules import Rule
from spectool.quantize.stream import CalibratedStream
from spectool.report import Reporter

# Errors are measured on at least this many calibration sequences, if there are.
NUM_MEASURED = 8
# Candidate widths go up to this many bits above the budget.
WIDER = 2


def list_widths(quantizer: Quantizer, budget: float) -> tuple[Quantizer, ...]:
    """Return a method's quantizers at all widths of up to `WIDER` bits above the budget.

    Raises:
        UsageError: the method has only one width.
    """
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
    matrices = plan.inside
    pinned = {name for name in plan.quantizers if any(rule.matches(name) for rule in rules)}
    candidates = {
        matrix.name: (plan.quantizers[matrix.name],) if matrix.name in pinned else budget.candidates
        for matrix in matrices
    }
    for matrix in matrices:
        for quantizer in candidates[matrix.name]:
            check_matrix(matrix, quantizer)
    least = sum(
        min(quantizer.stored_bytes(s.shape) for quantizer in candidates[s.name]) for s in matrices
    )
    if 8 * least > budget.bits * plan.num_weights:
        raise UsageError(
            f"--bits-budget {budget.bits}: the smallest candidates take "
            f"{8 * least / plan.num_weights:.3f} bits a weight"
        )
    return candidates


def measure_candidates(
    stream: CalibratedStream,
    candidates: Mapping[str, Sequence[Quantizer]],
    writer: ArtifactWriter,
    reporter: Reporter,
) -> dict[str, list[float]]:
    """Measure the error of each candidate, by matrix and in the candidates' order.

    Finished blocks are recorded, so that an interrupted run resumes.
    """
    original = stream.embed("original")
    # The packed stream does not exist yet.
    streams = Streams(original, original)
    errors: dict[str, list[float]] = {}
    for index in range(len(stream.names)):
        shard = _shard(index)
        report: dict[str, list[float]] | None = writer.report(shard)
        block = stream.open(index, stream.blocks.read(index))
        if report is None:
            report = _measure_block(stream, index, block, streams, candidates)
            writer.write_shard(shard, {}, {}, report)
        errors |= report
        assert block.module is not None
        stream.blocks.advance(index, block.module, original)
        # Freed before the next block is read.
        del block
        trim_memory()
        reporter.progress(index + 1, len(stream.names), "blocks measured")
    return errors


def _shard(index: int) -> str:
    """Return the name of the file that records a block's errors."""
    return f"survey-{index + 1:05d}.safetensors"


def remove_measurements(plan: QuantizePlan, writer: ArtifactWriter) -> None:
    """Remove the recorded errors of candidates."""
    for index in range(len(plan.matrices)):
        writer.remove_shard(_shard(index))


def _measure_block(
    stream: CalibratedStream,
    index: int,
    block: Block,
    streams: Streams,
    candidates: Mapping[str, Sequence[Quantizer]],
) -> dict[str, list[float]]:
    """Measure the error of every candidate of one block's matrices."""
    # Whole batches, as calls of the block are known for those sizes only.
    size = stream.compute.batch_size
    slices = itertools.islice(streams.original.batches(size), -(-NUM_MEASURED // size))
    batches = [streams.original.hidden_SLD[batch] for batch in slices]
    outputs = [block.run(hidden_BLD).float() for hidden_BLD in batches]
    energy = sum(float(out_BLD.double().square().sum()) for out_BLD in outputs)
    errors = {name: [0.0] * len(candidates[name]) for name in block.matrices}
    by_method = {each.name: each for name in block.matrices for each in candidates[name]}
    for method, example in by_method.items():
        # Statistics can be as large as the block: hold those of one method at a time.
        stats = stream.observe(block, example, streams)
        for name, matrix in block.matrices.items():
            part = replace(block, matrices={name: matrix}, weights={name: block.weights[name]})
            part_stats = {key: stats[key] for key in {name} & stats.keys()}
            for position, quantizer in enumerate(candidates[name]):
                if quantizer.name != method:
                    continue
                # Packing consumes the statistics it is given, and every width needs them.
                generator = stream.make_generator(index)
                fields = quantizer.pack_each(part, dict(part_stats), generator)[name]
                linear = load_packed(make_entry(quantizer, matrix), fields).to(block.device)
                squares = 0.0
                with Substitute(part, {name: linear}):
                    for hidden_BLD, out_BLD in zip(batches, outputs, strict=True):
                        error_BLD = block.run(hidden_BLD).float() - out_BLD
                        squares += float(error_BLD.double().square().sum())
                errors[name][position] = squares / energy if energy else 0.0
    return errors


def choose(
    plan: QuantizePlan,
    budget: Budget,
    candidates: Mapping[str, Sequence[Quantizer]],
    errors: Mapping[str, Sequence[float]],
) -> list[Rule]:
    """Choose a candidate for each matrix within the budget; return a rule for each."""
    sizes = {
        matrix.name: [each.stored_bytes(matrix.shape) for each in candidates[matrix.name]]
        for matrix in plan.inside
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
