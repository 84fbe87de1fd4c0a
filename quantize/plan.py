"""Plan of a quantization: methods per matrix, file size and memory, from headers alone.

A plan needs the architecture and the shapes but no weights, so a model of the hub can be planned
without downloading it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spectool.errors import UnsupportedError, UsageError
from spectool.methods import list_methods
from spectool.model.architecture import Architecture
from spectool.model.matrices import Matrix
from spectool.quantize.base import Quantizer
from spectool.quantize.footprint import Assignment, TextSize, measure_file, measure_memory
from spectool.quantize.lm_head.base import LmHeadQuantizer, special_tokens
from spectool.quantize.rules import Rule

# Largest share of the blocks' weights that stays dense without --allow-dense.
DENSE_LIMIT = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """Matrices to pack with their methods, and the resulting sizes.

    `matrices` by block and name, `outside` the blocks by name, of these `lm_head` if it is fitted;
    `quantizers` by name; `skipped`: names of dense matrices with the reason. Bytes: `packed_bytes`
    of the fields of the blocks' matrices, which have `num_weights`; `outside_bytes` of embedding
    and lm_head as stored; `file_bytes` of the weight files without headers; `host_bytes` and
    `device_bytes` are peak memory, `buffer_bytes` and `num_buffers` see `footprint.Memory`.
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
    def inside(self) -> list[Matrix]:
        """All matrices to pack inside the blocks."""
        return [matrix for block in self.matrices.values() for matrix in block.values()]

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
    text: TextSize = TextSize(),  # noqa: B008  It is frozen.
    on_device: bool = False,
) -> QuantizePlan:
    """Make the plan for a model.

    `quantizer` packs the blocks' matrices without a rule, `embeddings` the embedding and the
    lm_head; `lm_head` fits the lm_head.

    Raises:
        UsageError: a rule matches no matrix, or only matrices that earlier rules decide otherwise;
            a method cannot pack the matrix it is chosen for.
        UnsupportedError: nothing to pack, or more than a tenth of the blocks' weights stay dense.
    """
    outside = architecture.outer_matrices(own_lm_head=lm_head is not None)
    found = {block: architecture.block_matrices(block) for block in architecture.blocks}
    _check_rules(architecture, rules, [m for each in found.values() for m in each], outside)
    matrices: dict[str, dict[str, Matrix]] = {}
    quantizers: dict[str, Quantizer] = {}
    skipped: dict[str, str] = {}
    for block, candidates in found.items():
        skipped |= _find_skipped(architecture, block, candidates, rules)
        matrices[block] = {each.name: each for each in candidates if each.name not in skipped}
        for matrix in matrices[block].values():
            rule = _deciding_rule(matrix, rules)
            chosen = rule.quantizer if rule and rule.quantizer else quantizer
            check_matrix(matrix, chosen)
            quantizers[matrix.name] = chosen
    num_weights = sum(each.num_weights for block in matrices.values() for each in block.values())
    _check_share(architecture, num_weights, skipped, allow_dense=allow_dense)
    fitted = None
    if lm_head is not None:
        fitted = _find_fitted(architecture, lm_head, outside)
        if rule := _deciding_rule(fitted, rules):
            raise UsageError(f"{rule.origin}: {fitted.name} is fitted by --lm-head already")
        quantizers[fitted.name] = lm_head
    others = [matrix for matrix in outside if matrix is not fitted]
    quantizers |= _choose_outside(others, rules, embeddings)
    assignment = Assignment(
        architecture=architecture,
        matrices=matrices,
        outside=tuple(outside),
        lm_head=fitted,
        quantizers=quantizers,
    )
    size, memory = measure_file(assignment), measure_memory(assignment, text)
    return QuantizePlan(
        architecture=architecture,
        matrices=matrices,
        outside={matrix.name: matrix for matrix in assignment.packed_outside},
        lm_head=fitted,
        quantizers=quantizers,
        skipped=skipped,
        num_weights=num_weights,
        num_parameters=size.num_parameters,
        packed_bytes=size.packed,
        outside_bytes=size.outside,
        file_bytes=size.file,
        buffer_bytes=memory.buffer_bytes,
        num_buffers=memory.num_buffers,
        host_bytes=memory.host,
        device_bytes=memory.device if on_device else 0,
    )


def _choose_outside(
    matrices: Sequence[Matrix], rules: Sequence[Rule], embeddings: Quantizer | None
) -> dict[str, Quantizer]:
    """Choose the quantizers, by name, of the matrices outside the blocks that are packed."""
    chosen = {}
    for matrix in matrices:
        rule = _deciding_rule(matrix, rules)
        quantizer = rule.quantizer if rule else embeddings
        if quantizer is not None:
            _check_outside(matrix, quantizer, rule.origin if rule else "--embeddings")
            chosen[matrix.name] = quantizer
    return chosen


def _find_skipped(
    architecture: Architecture, block: str, matrices: Sequence[Matrix], rules: Sequence[Rule]
) -> dict[str, str]:
    """Return what stays dense in a block, with the reason."""
    # Experts of one fused tensor stay together: the tensor is either packed or not.
    dense = {
        matrix.parameter: rule.origin
        for matrix in matrices
        if (rule := _deciding_rule(matrix, rules)) and not rule.quantizer
    }
    skipped = {m.name: dense[m.parameter] for m in matrices if m.parameter in dense}
    reasons = architecture.explain_dense(block)
    taken = {matrix.parameter for matrix in matrices} | {f"{name}.weight" for name in reasons}
    parameters = architecture.model.get_submodule(block).named_parameters(prefix=block)
    others = (name for name, each in parameters if each.ndim >= 2 and name not in taken)
    return skipped | reasons | dict.fromkeys(others, "not a linear layer")


def _check_rules(
    architecture: Architecture,
    rules: Sequence[Rule],
    inside: Sequence[Matrix],
    outside: Sequence[Matrix],
) -> None:
    """Raise a UsageError if a rule decides no matrix and does not ask for what is dense anyway."""
    kept_dense: dict[str, str] = {}
    for block in architecture.blocks:
        kept_dense |= architecture.explain_dense(block)
    for rule in rules:
        if any(rule.matches(matrix.name) for matrix in (*inside, *outside)):
            continue
        matched = next((name for name in kept_dense if rule.matches(name)), None)
        if matched is not None and rule.quantizer is None:
            continue
        if matched is not None:
            raise UsageError(f"{rule.origin}: {matched} stays dense: {kept_dense[matched]}")
        for matrix in outside:
            if matrix.tied is not None and rule.matches(matrix.tied):
                raise UsageError(
                    f"{rule.origin}: {matrix.tied} is tied to {matrix.name}; name {matrix.name}"
                )
        raise UsageError(f"{rule.origin}: matches no linear layer of the model")
    _check_reached(rules, [*inside, *outside])


def _check_share(
    architecture: Architecture, packed: int, skipped: Mapping[str, str], *, allow_dense: bool
) -> None:
    """Raise an UnsupportedError if more than a tenth of the blocks' weights would stay dense."""
    if not packed:
        raise UnsupportedError(f"{architecture.config.model_type}: nothing in it can be packed")
    blocks = map(architecture.model.get_submodule, architecture.blocks)
    inside = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim >= 2)
    if inside - packed > DENSE_LIMIT * inside and not allow_dense:
        named = ", ".join(list(skipped)[:3])
        raise UnsupportedError(
            f"{(inside - packed) / inside:.0%} of the blocks' weights would stay dense "
            f"({named}, ...); at most {DENSE_LIMIT:.0%} may",
            hint="--allow-dense accepts that",
        )


def _find_fitted(
    architecture: Architecture, lm_head: Quantizer, outside: Sequence[Matrix]
) -> Matrix:
    """Find the lm_head that `lm_head` fits, and check that it can."""
    if not isinstance(lm_head, LmHeadQuantizer):
        raise UsageError(
            f"--lm-head {lm_head.name}: only {', '.join(list_methods('lm_head'))} fits an lm_head",
            hint=f"--embeddings {lm_head.name} packs it",
        )
    matrix = next((matrix for matrix in outside if matrix.kind == "lm_head"), None)
    if matrix is None:
        raise UnsupportedError(f"--lm-head: {architecture.config.model_type} has no lm_head")
    num_special = len(special_tokens(architecture.config, matrix.shape[0]))
    if misfit := lm_head.find_lm_head_misfit(matrix.shape, num_special):
        raise UsageError(f"{matrix.name}: {misfit}")
    return matrix


def _check_outside(matrix: Matrix, quantizer: Quantizer, origin: str) -> None:
    """Raise a UsageError if a method cannot pack a matrix outside the blocks, as `origin` asks."""
    if isinstance(quantizer, LmHeadQuantizer):
        name = quantizer.name
        raise UsageError(f"{origin}: {name} is fitted on text, by --lm-head {name}")
    if quantizer.needs_calibration:
        raise UsageError(
            f"{origin}: {quantizer.name} needs activations, which are collected for the blocks "
            f"only; pack {matrix.name} by a method without, such as int8 or rtn"
        )


def check_matrix(matrix: Matrix, quantizer: Quantizer) -> None:
    """Raise an InputError if a method cannot pack a matrix of a block."""
    if matrix.expert is not None and quantizer.rounds_inputs:
        raise UnsupportedError(
            f"{matrix.name}: {quantizer.name} rounds inputs of layers, and this is an expert of a "
            "fused tensor",
            hint="pack the experts by olive with --rules",
        )
    if misfit := quantizer.find_misfit(matrix.shape):
        raise UsageError(f"{matrix.name}: {misfit}")


def _check_reached(rules: Sequence[Rule], matrices: Sequence[Matrix]) -> None:
    """Raise a UsageError if earlier rules decide all matrices of a rule, and otherwise than it.

    Rules that repeat an earlier one are accepted, and those whose matrices `--skip` leaves out.
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
