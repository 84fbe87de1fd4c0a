"""Bits where they count: each matrix's method and width by measured errors, under a size budget.

Every candidate packs every matrix by itself; what the block puts out then, on some calibration
sequences as the original model has them, against what it put out before, is its error

    e = |F'(X) - F(X)|^2 / |F(X)|^2.

Errors of matrices are taken to add up, those of blocks too. From the smallest candidates on, the
change that saves the most error a byte is made until none fits. Methods with a fit are measured as
they begin it.
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
from spectool.quantize.calibration import Block, LinearStats, Streams, fit_each
from spectool.quantize.choice import Choice, Rule
from spectool.quantize.fitting import Substitute
from spectool.quantize.plan import Plan, check_codes
from spectool.quantize.walk import BlockWalk, Progress, derive_seed, load_packed

# Sequences that errors are measured on, at least, if there are so many.
MEASURED = 8
# Widths above the budget that are worth a try.
WIDER = 2


@dataclass(frozen=True, slots=True)
class Budget:
    """At most so many stored bits a weight of the blocks' packed matrices, of these candidates."""

    bits: float
    candidates: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not math.isfinite(self.bits):
            raise UsageError(f"--bits-budget {self.bits}: must be a number of bits")

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe, as artifacts store it."""
        return {"bits": self.bits, "candidates": [choice.as_dict() for choice in self.candidates]}


def widths(choice: Choice, budget: float) -> tuple[Choice, ...]:
    """A method at all its widths, but for those far above the budget.

    Raises:
        UsageError: it has only one, or the budget is no number.
    """
    Budget(budget, ())
    option = next((o for o in options_of(type(choice.config)) if o.name == "bits"), None)
    if option is None:
        raise UsageError(
            f"--bits-budget: {choice.method} has one width",
            hint="name what to choose from with --candidate METHOD:key=value, repeated",
        )
    known = option.choices
    if not known:
        assert option.minimum is not None and option.maximum is not None
        known = tuple(range(int(option.minimum), int(option.maximum) + 1))
    wanted = [bits for bits in known if bits <= math.ceil(budget) + WIDER] or [known[0]]
    return tuple(
        Choice(choice.method, dataclasses.replace(choice.config, bits=bits))  # type: ignore[call-arg]
        for bits in wanted
    )


def list_candidates(
    plan: Plan, budget: Budget, rules: Sequence[Rule]
) -> dict[str, tuple[Choice, ...]]:
    """What each matrix may be packed by: its rule's choice where one names it.

    Raises:
        UsageError: the smallest of all do not fit.
    """
    matrices = [matrix for block in plan.matrices.values() for matrix in block.values()]
    pinned = {name for name in plan.choices if any(rule.matches(name) for rule in rules)}
    found = {
        matrix.name: (plan.choices[matrix.name],) if matrix.name in pinned else budget.candidates
        for matrix in matrices
    }
    for matrix in matrices:
        for choice in found[matrix.name]:
            check_codes(matrix, choice)
    least = sum(min(choice.stored_bytes(s.shape) for choice in found[s.name]) for s in matrices)
    if 8 * least > budget.bits * plan.num_weights:
        raise UsageError(
            f"--bits-budget {budget.bits}: the smallest candidates take "
            f"{8 * least / plan.num_weights:.3f} bits a weight"
        )
    return found


def survey(
    walk: BlockWalk, wanted: Mapping[str, Sequence[Choice]], progress: Progress
) -> dict[str, list[float]]:
    """The error of each matrix's candidates, in their order. What a killed run measured is kept."""
    streams = walk.start_streams()
    assert streams is not None
    blocks = walk.architecture.blocks
    errors: dict[str, list[float]] = {}
    for index in range(len(blocks)):
        errors |= _step(walk, index, streams, wanted)
        trim_memory()
        progress(index + 1, len(blocks), "blocks measured")
    return errors


def _step(
    walk: BlockWalk, index: int, streams: Streams, wanted: Mapping[str, Sequence[Choice]]
) -> dict[str, list[float]]:
    """Measure one block, unless that is done, and advance the stream; all of it is freed then."""
    name = walk.architecture.blocks[index]
    block = walk.open(index, name, walk.read(name), streams)
    assert block.module is not None
    shard = f"survey-{index + 1:05d}.safetensors"
    report: dict[str, list[float]] | None = walk.writer.report(shard)
    if report is None:
        report = _measure_block(walk, index, block, streams, wanted)
        walk.writer.write_shard(shard, {}, {}, report)
    for batch in streams.original.batches(walk.batch_size):
        walk.advance_batch(block.module, block, streams.original, batch)
    return report


def discard_survey(walk: BlockWalk) -> None:
    """Remove what a survey kept."""
    for index in range(len(walk.architecture.blocks)):
        walk.writer.discard(f"survey-{index + 1:05d}.safetensors")


def _measure_block(
    walk: BlockWalk,
    index: int,
    block: Block,
    streams: Streams,
    wanted: Mapping[str, Sequence[Choice]],
) -> dict[str, list[float]]:
    assert block.module is not None
    # Whole batches: of other sizes it is not known how the block is called.
    count = -(-MEASURED // walk.batch_size)
    places = itertools.islice(streams.original.batches(walk.batch_size), count)
    batches = [streams.original.hidden_SLD[batch] for batch in places]
    before = [_run_block(walk, block, hidden_BLD) for hidden_BLD in batches]
    whole = sum(float(out_BLD.double().square().sum()) for out_BLD in before)
    # Of both streams only the original is known.
    alike = Streams(streams.original, streams.original)
    errors = {name: [0.0] * len(wanted[name]) for name in block.matrices}
    asked = {choice.method: choice for name in block.matrices for choice in wanted[name]}
    for method, like in asked.items():
        # One method's at a time: they are as large as what is packed.
        stats = walk.observe(block, like, alike)
        for name, matrix in block.matrices.items():
            part = replace(block, matrices={name: matrix}, weights={name: block.weights[name]})
            known = {key: stats[key] for key in {name} & stats.keys()}
            for place, choice in enumerate(wanted[name]):
                if choice.method != method:
                    continue
                linear = _pack_matrix(walk, index, part, known, choice)
                wrong = 0.0
                with Substitute(part, {name: linear}):
                    for hidden_BLD, out_BLD in zip(batches, before, strict=True):
                        apart_BLD = _run_block(walk, block, hidden_BLD) - out_BLD
                        wrong += float(apart_BLD.double().square().sum())
                errors[name][place] = wrong / whole if whole else 0.0
    return errors


def _pack_matrix(
    walk: BlockWalk,
    index: int,
    part: Block,
    stats: dict[str, LinearStats],
    choice: Choice,
) -> PackedLinear:
    """The one matrix of a part as a method packs it."""
    ((name, matrix),) = part.matrices.items()
    generator = torch.Generator().manual_seed(derive_seed(walk.seed, index))
    fitted = fit_each(choice.quantizer, part, stats, choice.config, generator, walk.device)
    return load_packed(choice, matrix, fitted.fields[name]).to(walk.device)


def _run_block(walk: BlockWalk, block: Block, hidden_BLD: Tensor) -> Tensor:
    assert block.module is not None
    return run_block(block.module, block.calls[len(hidden_BLD)], hidden_BLD.to(walk.device)).float()


def choose(
    plan: Plan,
    budget: Budget,
    wanted: Mapping[str, Sequence[Choice]],
    errors: Mapping[str, Sequence[float]],
) -> list[Rule]:
    """A rule for each matrix, within the budget."""
    matrices = {
        matrix.name: matrix for block in plan.matrices.values() for matrix in block.values()
    }
    sizes = {
        name: [c.stored_bytes(matrix.shape) for c in wanted[name]]
        for name, matrix in matrices.items()
    }
    chosen = {}
    for name, each in sizes.items():
        ranked = list(zip(each, errors[name], strict=True))
        chosen[name] = ranked.index(min(ranked))
    left = int(budget.bits * plan.num_weights / 8) - sum(sizes[n][i] for n, i in chosen.items())
    while True:
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
    return [Rule(name, wanted[name][index], origin) for name, index in chosen.items()]
