"""Plan of a quantization: methods per matrix, file size and memory, from headers alone.

A plan needs the architecture and the shapes but no weights, so a model of the hub can be planned
without downloading it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spectool.checkpoint.headers import DTYPE_BITS
from spectool.errors import UnsupportedError, UsageError
from spectool.methods import names
from spectool.model.architecture import Architecture
from spectool.model.matrices import Matrix, saved_bytes
from spectool.quantize.base import Quantizer
from spectool.quantize.fitting import BlockQuantizer
from spectool.quantize.lm_head.base import LmHeadQuantizer, special_tokens
from spectool.quantize.rules import Rule

# Resident memory of a process with torch and transformers loaded (measured: 0.34 GB, 0.39 GB after
# hashing the source; 0.46 GB with calibration of the smallest model).
BASE_BYTES = 470_000_000

# Peak memory relative to live tensors, as the allocator keeps freed memory (measured: 1.3).
RETAINED = 1.5

# Largest share of the blocks' weights that stays dense without --allow-dense.
DENSE_LIMIT = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """Matrices to pack with their methods, and the resulting sizes.

    `matrices` by block and name, `outside` the blocks by name, of these `lm_head` if it is fitted;
    `quantizers` by name; `skipped`: names
    of dense matrices with the reason. Bytes: `packed_bytes` of the fields of the blocks' matrices,
    which have `num_weights`; `outside_bytes` of embedding and lm_head as stored; `file_bytes` of
    the weight files without headers; `host_bytes` and `device_bytes` are peak memory;
    `buffer_bytes` of one activation buffer. `num_buffers`: one per stream, for methods with a fit
    also one per target, and one for the inputs of a fitted lm_head.
    """

    architecture: Architecture = field(repr=False, compare=False)
    matrices: Mapping[str, Mapping[str, Matrix]]
    outside: Mapping[str, Matrix]
    lm_head: Matrix | None
    quantizers: Mapping[str, Quantizer]
    skipped: Mapping[str, str]
    num_weights: int
    num_parameters: int
    packed_bytes: int
    outside_bytes: int
    file_bytes: int
    buffer_bytes: int
    num_buffers: int
    host_bytes: int
    device_bytes: int

    @property
    def bits_linears(self) -> float:
        """Bits per weight of the blocks' packed matrices."""
        return 8 * self.packed_bytes / self.num_weights

    @property
    def bits_file(self) -> float:
        """Bits per parameter of all weight files."""
        return 8 * self.file_bytes / self.num_parameters


def make_plan(
    architecture: Architecture,
    quantizer: Quantizer,
    *,
    rules: Sequence[Rule] = (),
    embeddings: Quantizer | None = None,
    lm_head: Quantizer | None = None,
    allow_dense: bool = False,
    calibration_tokens: int = 0,
    sequence_tokens: int = 0,
    batch_tokens: int = 0,
    on_device: bool = False,
) -> QuantizePlan:
    """Make the plan for a model.

    `quantizer` packs the blocks' matrices without a rule, `embeddings` the embedding and the
    lm_head; `lm_head` fits the lm_head. `calibration_tokens` is 0 if no activations
    are needed; `sequence_tokens` are those of one sequence, `batch_tokens` of one batch.

    Raises:
        UsageError: a rule matches no matrix, or only matrices that earlier rules decide otherwise;
            a method cannot pack the matrix it is chosen for.
        UnsupportedError: nothing to pack, or more than a tenth of the blocks' weights stay dense.
    """
    matrices: dict[str, dict[str, Matrix]] = {}
    quantizers: dict[str, Quantizer] = {}
    skipped: dict[str, str] = {}
    outside = architecture.outside(own_lm_head=lm_head is not None)
    inside, packed = 0, 0
    unused = list(rules)
    kept_dense: dict[str, str] = {}
    found_by_block = [architecture.matrices(block) for block in architecture.blocks]
    for block, block_matrices in zip(architecture.blocks, found_by_block, strict=True):
        unused = [rule for rule in unused if not any(rule.matches(s.name) for s in block_matrices)]
        kept_dense |= (reasons := architecture.dense(block))
        ruled = {matrix.name: _deciding_rule(matrix, rules) for matrix in block_matrices}
        # Experts of one fused tensor stay together: the tensor is either packed or not.
        dense = {
            matrix.parameter: rule.origin
            for matrix in block_matrices
            if (rule := ruled[matrix.name]) and not rule.quantizer
        }
        matrices[block] = {
            matrix.name: matrix for matrix in block_matrices if matrix.parameter not in dense
        }
        for matrix in block_matrices:
            rule = ruled[matrix.name]
            if matrix.parameter in dense:
                skipped[matrix.name] = dense[matrix.parameter]
                continue
            chosen = rule.quantizer if rule and rule.quantizer else quantizer
            if matrix.expert is not None and chosen.rounds_inputs:
                raise UnsupportedError(
                    f"{matrix.name}: {chosen.name} rounds inputs of layers, and this is an "
                    "expert of a fused tensor",
                    hint="pack the experts by olive with --rules",
                )
            check_shape(matrix, chosen)
            quantizers[matrix.name] = chosen
        skipped |= reasons
        taken = {matrix.parameter for matrix in block_matrices} | {
            f"{name}.weight" for name in reasons
        }
        for name, parameter in architecture.model.get_submodule(block).named_parameters(
            prefix=block
        ):
            inside += parameter.numel() if parameter.ndim >= 2 else 0
            if parameter.ndim >= 2 and name not in taken:
                skipped[name] = "not a linear layer"
        packed += sum(matrix.num_weights for matrix in matrices[block].values())
    unused = [rule for rule in unused if not any(rule.matches(s.name) for s in outside)]
    for rule in list(unused):
        matched = next((name for name in kept_dense if rule.matches(name)), None)
        if matched is not None and rule.quantizer is not None:
            raise UsageError(f"{rule.origin}: {matched} stays dense: {kept_dense[matched]}")
        if matched is not None:
            unused.remove(rule)
    if unused:
        for matrix in outside:
            if matrix.tied is not None and unused[0].matches(matrix.tied):
                raise UsageError(
                    f"{unused[0].origin}: {matrix.tied} is tied to {matrix.name}; "
                    f"name {matrix.name}"
                )
        raise UsageError(f"{unused[0].origin}: matches no linear layer of the model")
    _check_reached(rules, [*(matrix for each in found_by_block for matrix in each), *outside])
    if not packed:
        raise UnsupportedError(f"{architecture.config.model_type}: nothing in it can be packed")
    if inside - packed > DENSE_LIMIT * inside and not allow_dense:
        named = ", ".join(list(skipped)[:3])
        raise UnsupportedError(
            f"{(inside - packed) / inside:.0%} of the blocks' weights would stay dense "
            f"({named}, ...); at most {DENSE_LIMIT:.0%} may",
            hint="--allow-dense accepts that",
        )
    fitting = None if lm_head is None else _check_lm_head(architecture, lm_head, outside)
    for matrix in outside:
        rule = _deciding_rule(matrix, rules)
        if lm_head is not None and matrix.kind == "lm_head":
            if rule is not None:
                raise UsageError(f"{rule.origin}: {matrix.name} is fitted by --lm-head already")
            quantizers[matrix.name] = lm_head
            continue
        outside_quantizer = rule.quantizer if rule else embeddings
        if outside_quantizer is None:
            continue
        origin = rule.origin if rule else "--embeddings"
        if isinstance(outside_quantizer, LmHeadQuantizer):
            name = outside_quantizer.name
            raise UsageError(f"{origin}: {name} is fitted on text, by --lm-head {name}")
        if outside_quantizer.calibrates:
            raise UsageError(
                f"{origin}: {outside_quantizer.name} needs activations, which are collected for "
                f"the blocks only; pack {matrix.name} by a method without, such as int8 or rtn"
            )
        quantizers[matrix.name] = outside_quantizer
    return _add_sizes(
        architecture,
        matrices,
        {matrix.name: matrix for matrix in outside},
        fitting,
        quantizers,
        skipped,
        calibration_tokens,
        sequence_tokens,
        batch_tokens or sequence_tokens,
        on_device=on_device,
    )


def _check_lm_head(
    architecture: Architecture, lm_head: Quantizer, outside: Sequence[Matrix]
) -> LmHeadQuantizer:
    """Check that `lm_head` can fit the model's lm_head, and return it.

    Raises:
        UsageError: another kind of method, or one that cannot fit this lm_head.
        UnsupportedError: the model has no lm_head.
    """
    if not isinstance(lm_head, LmHeadQuantizer):
        raise UsageError(
            f"--lm-head {lm_head.name}: only {', '.join(names('lm_head'))} fits an lm_head",
            hint=f"--embeddings {lm_head.name} packs it",
        )
    matrix = next((matrix for matrix in outside if matrix.kind == "lm_head"), None)
    if matrix is None:
        raise UnsupportedError(f"--lm-head: {architecture.config.model_type} has no lm_head")
    num_special = len(special_tokens(architecture.config, matrix.shape[0]))
    if misfit := lm_head.find_lm_head_misfit(matrix.shape, num_special):
        raise UsageError(f"{matrix.name}: {misfit}")
    return lm_head


def check_shape(matrix: Matrix, quantizer: Quantizer) -> None:
    """Check that a method can pack matrices of this shape.

    Raises:
        UsageError: it cannot.
    """
    if misfit := quantizer.find_misfit(matrix.shape):
        raise UsageError(f"{matrix.name}: {misfit}")


def _check_reached(rules: Sequence[Rule], matrices: Sequence[Matrix]) -> None:
    """Check that every rule decides at least one matrix.

    Rules that repeat an earlier one are accepted, and those whose matrices `--skip` leaves out.

    Raises:
        UsageError: earlier rules decide all matrices of a rule, and otherwise than it.
    """
    deciding = [_deciding_rule(matrix, rules) for matrix in matrices]
    reached = {id(rule) for rule in deciding}
    for rule in rules:
        if id(rule) in reached:
            continue
        earlier = [
            other
            for matrix, other in zip(matrices, deciding, strict=True)
            if other is not None and rule.matches(matrix.name) and other.quantizer != rule.quantizer
        ]
        if any(not other.is_skip for other in earlier):
            names = ", ".join(dict.fromkeys(other.origin for other in earlier))
            raise UsageError(
                f"{rule.origin}: has no effect, as earlier rules decide all its matches: {names}",
                hint="the first rule that matches decides: put the narrower one first",
            )


def _deciding_rule(matrix: Matrix, rules: Sequence[Rule]) -> Rule | None:
    """Return the first rule that matches, if any."""
    return next((rule for rule in rules if rule.matches(matrix.name)), None)


def _add_sizes(
    architecture: Architecture,
    matrices: Mapping[str, Mapping[str, Matrix]],
    outside: Mapping[str, Matrix],
    lm_head: LmHeadQuantizer | None,
    quantizers: Mapping[str, Quantizer],
    skipped: Mapping[str, str],
    calibration_tokens: int,
    sequence_tokens: int,
    batch_tokens: int,
    *,
    on_device: bool,
) -> QuantizePlan:
    """Compute the sizes of a plan; arguments as for `make_plan`."""
    inside = [matrix for block in matrices.values() for matrix in block.values()]
    packed_outside = [matrix for matrix in outside.values() if matrix.name in quantizers]

    def field_bytes(matrix: Matrix) -> int:
        return quantizers[matrix.name].stored_bytes(matrix.shape)

    # Tensors of the checkpoint that the architecture does not know are not copied.
    stored = {
        key: architecture.layout.tensors[key]
        for origin in architecture.origins.values()
        for key, _ in origin.stored
    }
    source_bytes = sum(entry.num_bytes for entry in stored.values())

    def stored_bytes(which: Iterable[Matrix]) -> int:
        keys = {
            key
            for matrix in which
            for name in architecture.holding(matrix)
            for key, _ in architecture.origins[name].stored
        }
        return sum(stored[key].num_bytes for key in keys)

    element_bytes = (
        max(
            DTYPE_BITS[stored[key].dtype]
            for s in inside
            for key, _ in architecture.origins[s.parameter].stored
        )
        // 8
    )
    num_weights = sum(matrix.num_weights for matrix in inside)
    packed_bytes = sum(map(field_bytes, inside))
    dense = [matrix for matrix in outside.values() if matrix.name not in quantizers]
    outside_bytes = sum(map(field_bytes, packed_outside)) + stored_bytes(dense)
    fitted = [] if lm_head is None else [m for m in packed_outside if m.kind == "lm_head"]
    # A fitted lm_head adds a bias, and its matrix is new if the architecture ties it.
    biases = [s.shape[0] for s in fitted if f"{s.name}.bias" not in architecture.origins]
    untied = [s.num_weights for s in fitted if not architecture.holding(s)]
    outside_bytes += element_bytes * sum(biases)
    file_bytes = source_bytes - stored_bytes(inside) + packed_bytes
    file_bytes += outside_bytes - stored_bytes(outside.values())
    block_weights = max(
        sum(p.numel() for p in architecture.model.get_submodule(block).parameters())
        for block in architecture.blocks
    )
    largest = max(matrix.num_weights for matrix in inside)
    width = getattr(architecture.config.get_text_config(), "hidden_size", 0)
    buffer_bytes = calibration_tokens * width * 4
    # Data-free: a block as stored, its codes, and one matrix with temporaries in float32.
    # Calibrated: also the block in float32, the matrices that its packed module dequantizes, and
    # two activation buffers. With a fit: also its state per weight, the saved activations of one
    # sequence, and two target buffers.
    working = block_weights * (element_bytes + 1) + 12 * largest
    transient = fit_bytes = 0
    if calibration_tokens:
        working += 8 * block_weights
        # Temporaries of a product over a batch, float32 (measured: 4.1 times input and output).
        transient = 12 * batch_tokens * max(sum(matrix.shape) for matrix in inside)
    used = {quantizers[matrix.name] for matrix in inside}
    fitting = [quantizer for quantizer in used if isinstance(quantizer, BlockQuantizer)]
    if fitting:
        fit_bytes = max(quantizer.fit_bytes() for quantizer in fitting) * block_weights
        fit_bytes += max(
            saved_bytes(architecture.model, s.values(), sequence_tokens) for s in matrices.values()
        )
    if any("hessian" in quantizer.statistics for quantizer in used):
        # Hessians of a block; the largest also in double precision and as its factor. All are
        # freed before a fit.
        squares = [matrix.shape[1] ** 2 for matrix in inside]
        transient += 4 * sum(squares) // len(matrices) + 12 * max(squares)
    working += max(transient, fit_bytes)
    # Embedding and lm_head are packed one at a time, while no block is in memory.
    table = max((matrix.num_weights for matrix in packed_outside), default=0)
    lm_head_bytes = max(
        (lm_head.fit_lm_head_bytes(s.shape) for s in fitted if lm_head is not None), default=0
    )
    working = int(RETAINED * max(working, (element_bytes + 5) * table, lm_head_bytes))
    num_buffers = (4 if fitting else 2) + bool(fitted)
    return QuantizePlan(
        architecture=architecture,
        matrices=matrices,
        outside={matrix.name: matrix for matrix in packed_outside},
        lm_head=fitted[0] if fitted else None,
        quantizers=quantizers,
        skipped=skipped,
        num_weights=num_weights,
        num_parameters=sum(entry.num_elements for entry in stored.values())
        + sum(biases)
        + sum(untied),
        packed_bytes=packed_bytes,
        outside_bytes=outside_bytes,
        file_bytes=file_bytes,
        buffer_bytes=buffer_bytes,
        num_buffers=num_buffers,
        host_bytes=BASE_BYTES + working + num_buffers * buffer_bytes,
        device_bytes=working + BASE_BYTES if on_device else 0,
    )
