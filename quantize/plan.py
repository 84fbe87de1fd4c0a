"""What a quantization will do, take and make, known from headers before anything is read.

A plan needs the architecture and the shapes, not the weights, so it can be had for a hub id
without fetching it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectool.checkpoint.headers import DTYPE_BITS
from spectool.errors import UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.matrices import Matrix
from spectool.quantize.choice import Choice, Rule
from spectool.quantize.lm_head.vq import VQ, learning_bytes, special_tokens

# What the interpreter with torch and transformers loaded holds, hashing threads included (measured:
# 0.34 GB, 0.39 GB after the source was hashed; 0.46 GB with calibration of the smallest model).
BASE_BYTES = 470_000_000

# The allocator keeps much of what was freed (measured: 1.3 times what is alive at once).
RETAINED = 1.5

# At most this share of the blocks' weights may stay dense without being asked for.
DENSE_LIMIT = 0.10

# The method of output matrices that are learnt.
LEARNT_HEAD = "vq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sites to pack by block, and `outside` the blocks; the choice for each by name; names left
    dense with the reason, and the sizes that follow.

    Bytes: `packed_bytes` of all fields of the blocks' matrices, which have `num_weights`;
    `outside_bytes` of embedding and output matrix as they will be stored; `file_bytes` of the
    weight files without headers, `host_bytes` and `device_bytes` resident at most, `buffer_bytes`
    of one of the `num_buffers` activation buffers: a stream each, and for methods with a fit a
    target each.
    """

    matrices: Mapping[str, Mapping[str, Matrix]]
    outside: Mapping[str, Matrix]
    choices: Mapping[str, Choice]
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
        return 8 * self.packed_bytes / self.num_weights

    @property
    def bits_file(self) -> float:
        return 8 * self.file_bytes / self.num_parameters


def make_plan(
    architecture: Architecture,
    choice: Choice,
    *,
    rules: Sequence[Rule] = (),
    embeddings: Choice | None = None,
    lm_head: Choice | None = None,
    allow_dense: bool = False,
    calibration_tokens: int = 0,
    sequence_tokens: int = 0,
    batch_tokens: int = 0,
    on_device: bool = False,
) -> Plan:
    """The plan for a model. `choice` is for the blocks' matrices that no rule names, `embeddings`
    for embedding and output matrix, `lm_head` for an output matrix that is learnt.
    `calibration_tokens` is 0 where no activations are needed; `sequence_tokens` are those of one
    sequence, `batch_tokens` of those run together.

    Raises:
        UsageError: a rule that matches nothing, or only what earlier ones decide otherwise; a
            method that cannot do what it is named for.
        UnsupportedError: nothing to pack, or more than a tenth of the blocks' weights left dense.
    """
    matrices: dict[str, dict[str, Matrix]] = {}
    choices: dict[str, Choice] = {}
    skipped: dict[str, str] = {}
    outside = architecture.outside(own_lm_head=lm_head is not None)
    inside, packed = 0, 0
    unused = list(rules)
    never: dict[str, str] = {}
    found_by_block = [architecture.matrices(block) for block in architecture.blocks]
    for block, found in zip(architecture.blocks, found_by_block, strict=True):
        unused = [rule for rule in unused if not any(rule.means(s.name) for s in found)]
        never |= (reasons := architecture.dense(block))
        ruled = {matrix.name: _first(matrix, rules) for matrix in found}
        # Experts of one fused tensor stay together: the tensor is either packed or not.
        dense = {
            matrix.parameter: rule.origin
            for matrix in found
            if (rule := ruled[matrix.name]) and not rule.choice
        }
        matrices[block] = {matrix.name: matrix for matrix in found if matrix.parameter not in dense}
        for matrix in found:
            rule = ruled[matrix.name]
            if matrix.parameter in dense:
                skipped[matrix.name] = dense[matrix.parameter]
                continue
            own = rule.choice if rule and rule.choice else choice
            if matrix.expert is not None and not own.is_matrix:
                raise UnsupportedError(
                    f"{matrix.name}: {own.method} rounds inputs of layers, and this is an "
                    "expert of a fused tensor",
                    hint="a --rules that packs the experts by olive",
                )
            check_codes(matrix, own)
            choices[matrix.name] = own
        skipped |= reasons
        taken = {matrix.parameter for matrix in found} | {f"{name}.weight" for name in reasons}
        for name, parameter in architecture.model.get_submodule(block).named_parameters(
            prefix=block
        ):
            inside += parameter.numel() if parameter.ndim >= 2 else 0
            if parameter.ndim >= 2 and name not in taken:
                skipped[name] = "not a linear layer"
        packed += sum(matrix.num_weights for matrix in matrices[block].values())
    unused = [rule for rule in unused if not any(rule.means(s.name) for s in outside)]
    for rule in list(unused):
        meant = next((name for name in never if rule.means(name)), None)
        if meant is not None and rule.choice is not None:
            raise UsageError(f"{rule.origin}: {meant} stays dense: {never[meant]}")
        if meant is not None:
            unused.remove(rule)
    if unused:
        for matrix in outside:
            if matrix.tied is not None and unused[0].means(matrix.tied):
                raise UsageError(
                    f"{unused[0].origin}: {matrix.tied} shares its matrix with {matrix.name}; "
                    "name that"
                )
        raise UsageError(f"{unused[0].origin}: matches no linear layer of the model")
    _check_reached(rules, [*(matrix for each in found_by_block for matrix in each), *outside])
    if not packed:
        raise UnsupportedError(f"{architecture.config.model_type}: nothing in it can be packed")
    if inside - packed > DENSE_LIMIT * inside and not allow_dense:
        named = ", ".join(list(skipped)[:3])
        raise UnsupportedError(
            f"{(inside - packed) / inside:.0%} of the blocks' weights would stay dense "
            f"({named}, …); at most {DENSE_LIMIT:.0%} may",
            hint="--allow-dense accepts that",
        )
    if lm_head is not None:
        _check_lm_head(architecture, lm_head, outside)
    for matrix in outside:
        rule = _first(matrix, rules)
        if lm_head is not None and matrix.kind == "lm_head":
            if rule is not None:
                raise UsageError(f"{rule.origin}: {matrix.name} is what --lm-head learns")
            choices[matrix.name] = lm_head
            continue
        found_choice = rule.choice if rule else embeddings
        if found_choice is None:
            continue
        origin = rule.origin if rule else "--embeddings"
        if found_choice.method == LEARNT_HEAD:
            raise UsageError(f"{origin}: {LEARNT_HEAD} is learnt, by --lm-head {LEARNT_HEAD}")
        if found_choice.calibrates:
            raise UsageError(
                f"{origin}: {found_choice.method} needs activations, which are collected for the "
                f"blocks only; {matrix.name} takes a method that needs none, such as int8 or rtn"
            )
        choices[matrix.name] = found_choice
    return _sized(
        architecture,
        matrices,
        {matrix.name: matrix for matrix in outside},
        choices,
        skipped,
        calibration_tokens,
        sequence_tokens,
        batch_tokens or sequence_tokens,
        on_device=on_device,
    )


def _check_lm_head(architecture: Architecture, lm_head: Choice, outside: Sequence[Matrix]) -> None:
    own = [matrix for matrix in outside if matrix.kind == "lm_head"]
    if lm_head.method != LEARNT_HEAD:
        raise UsageError(
            f"--lm-head {lm_head.method}: only {LEARNT_HEAD} learns an output matrix",
            hint=f"--embeddings {lm_head.method} packs it",
        )
    if not own:
        raise UnsupportedError(f"{architecture.config.model_type}: --lm-head: has no output matrix")
    check_codes(own[0], lm_head)
    assert isinstance(lm_head.config, VQ.Config)
    special = len(special_tokens(architecture.config, own[0].shape[0]))
    if lm_head.config.single and special + lm_head.config.frequent >= lm_head.config.codes:
        raise UsageError(
            f"--lm-head: {lm_head}: up to {special} special and {lm_head.config.frequent} frequent "
            "tokens "
            "have codes of their own, and others need some too"
        )


def check_codes(matrix: Matrix, choice: Choice) -> None:
    """Raises: UsageError: more codes than rows to share them."""
    config, rows = choice.config, matrix.shape[0]
    if isinstance(config, VQ.Config) and config.codes > rows:
        raise UsageError(f"{matrix.name}: {choice} has more codes than the {rows} rows of it")


def _check_reached(rules: Sequence[Rule], matrices: Sequence[Matrix]) -> None:
    """Raises: UsageError: a rule of a plan of which every layer is packed as an earlier one says.

    What `--skip` takes from a plan is meant, and two rules that say the same do no harm.
    """
    deciding = [_first(matrix, rules) for matrix in matrices]
    reached = {id(rule) for rule in deciding}
    for rule in rules:
        if id(rule) in reached:
            continue
        earlier = [
            other
            for matrix, other in zip(matrices, deciding, strict=True)
            if other is not None and rule.means(matrix.name) and other.choice != rule.choice
        ]
        if any(not other.is_skip for other in earlier):
            names = ", ".join(dict.fromkeys(other.origin for other in earlier))
            raise UsageError(
                f"{rule.origin}: decides nothing, for all that it matches is decided by {names}",
                hint="the first rule that matches decides: put the narrower one first",
            )


def _first(matrix: Matrix, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if rule.means(matrix.name)), None)


def _sized(
    architecture: Architecture,
    matrices: Mapping[str, Mapping[str, Matrix]],
    outside: Mapping[str, Matrix],
    choices: Mapping[str, Choice],
    skipped: Mapping[str, str],
    calibration_tokens: int,
    sequence_tokens: int,
    batch_tokens: int,
    *,
    on_device: bool,
) -> Plan:
    inside = [matrix for block in matrices.values() for matrix in block.values()]
    beside = [matrix for matrix in outside.values() if matrix.name in choices]

    def field_bytes(matrix: Matrix) -> int:
        return choices[matrix.name].stored_bytes(matrix.shape)

    # A checkpoint may hold tensors that the architecture does not know; they stay behind.
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
    dense = [matrix for matrix in outside.values() if matrix.name not in choices]
    outside_bytes = sum(map(field_bytes, beside)) + stored_bytes(dense)
    learnt = [matrix for matrix in beside if choices[matrix.name].method == LEARNT_HEAD]
    # Such a matrix has a bias, and where the architecture ties it nothing of it is stored yet.
    biases = [s.shape[0] for s in learnt if f"{s.name}.bias" not in architecture.origins]
    untied = [s.num_weights for s in learnt if not architecture.holding(s)]
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
    # Data-free: a block as stored, its codes, and one matrix unpacked beside itself in float32.
    # Calibrated: the block in float32 as well, what its packed twin unpacks while it runs, and two
    # buffers of activations. With a fit: what it keeps of every matrix, what one sequence leaves
    # for the backward pass, and two buffers of targets.
    working = block_weights * (element_bytes + 1) + 12 * largest
    passing = learning = 0
    if calibration_tokens:
        working += 8 * block_weights
        # Around a product of a whole batch, in float32 (measured: 4.1 times input and output).
        passing = 12 * batch_tokens * max(sum(matrix.shape) for matrix in inside)
    kinds = {choice: choice.quantizer for choice in {choices[matrix.name] for matrix in inside}}
    fitting: list[tuple[Any, Any]] = [
        (kind, choice.config) for choice, kind in kinds.items() if hasattr(kind, "fit")
    ]
    if fitting:
        learning = max(kind.fit_bytes(config) for kind, config in fitting) * block_weights
        learning += max(
            saved_bytes(architecture, s.values(), sequence_tokens) for s in matrices.values()
        )
    if any("hessian" in kind.statistics for kind in kinds.values()):
        # Of every matrix; the largest once more in double precision, where it is factored, and what
        # comes of that. All are gone before a fit.
        squares = [matrix.shape[1] ** 2 for matrix in inside]
        passing += 4 * sum(squares) // len(matrices) + 12 * max(squares)
    working += max(passing, learning)
    # Embedding and output matrix are packed by themselves, before the blocks.
    table = max((matrix.num_weights for matrix in beside), default=0)
    taught = max((learning_bytes(s.shape, choices[s.name].config) for s in learnt), default=0)
    working = int(RETAINED * max(working, (element_bytes + 5) * table, taught))
    num_buffers = (4 if fitting else 2) + bool(learnt)
    return Plan(
        matrices=matrices,
        outside={matrix.name: matrix for matrix in beside},
        choices=choices,
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


def saved_bytes(architecture: Architecture, matrices: Iterable[Matrix], tokens: int) -> int:
    """What the forward pass of a block over one sequence keeps for its gradients.

    Around each product about two tensors of its input's and of its output's size (measured with
    Llama: 1.9), and a third while gradients flow; scores and probabilities where attention writes
    them out.
    """
    text: Any = architecture.config.get_text_config()
    rows = 0
    for matrix in matrices:
        share = 1.0
        if matrix.expert is not None:
            total = architecture.model.get_parameter(matrix.parameter).shape[0]
            share = min(1.0, getattr(text, "num_experts_per_tok", total) / total)
        rows += int(share * sum(matrix.shape))
    heads = getattr(text, "num_attention_heads", 0)
    return 4 * tokens * 3 * (rows + heads * tokens)
