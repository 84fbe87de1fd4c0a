"""Sizes of a quantization, from headers alone: what is stored, and the memory of each phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spectool.checkpoint.headers import DTYPE_BITS
from spectool.model.architecture import Architecture
from spectool.model.matrices import Matrix, saved_bytes
from spectool.quantize.base import Quantizer
from spectool.quantize.fitting import BlockQuantizer
from spectool.quantize.lm_head.base import LmHeadQuantizer

# Resident memory of a process with torch and transformers loaded (measured: 0.34 GB, 0.39 GB after
# hashing the source; 0.46 GB with calibration of the smallest model).
BASE_BYTES = 470_000_000

# Peak memory relative to live tensors, as the allocator keeps freed memory (measured: 1.3).
RETAINED = 1.5

# Bytes per weight or element of a float32 tensor, of its double, and of temporaries in float32 that
# come with a matrix that is packed, a Hessian that is factored or a product (measured: 4.1 times
# input and output).
FLOAT, TEMPORARIES = 4, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSize:
    """Calibration tokens that run through the model: all (0: none), of a sequence, of a batch."""

    total: int = 0
    sequence: int = 0
    batch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Matrices to pack by block, all matrices outside the blocks, and the quantizers by name.

    `lm_head` is the one of `outside` that is fitted, if any.
    """

    architecture: Architecture
    matrices: Mapping[str, Mapping[str, Matrix]]
    outside: tuple[Matrix, ...]
    lm_head: Matrix | None
    quantizers: Mapping[str, Quantizer]

    @property
    def inside(self) -> list[Matrix]:
        """All matrices to pack inside the blocks."""
        return [matrix for block in self.matrices.values() for matrix in block.values()]

    @property
    def packed_outside(self) -> list[Matrix]:
        """The matrices to pack outside the blocks."""
        return [matrix for matrix in self.outside if matrix.name in self.quantizers]

    def field_bytes(self, matrices: Iterable[Matrix]) -> int:
        """Return the bytes of the fields of packed matrices."""
        return sum(self.quantizers[each.name].stored_bytes(each.shape) for each in matrices)

    def stored_bytes(self, matrices: Iterable[Matrix]) -> int:
        """Return the bytes of matrices as the checkpoint stores them."""
        names = {name for matrix in matrices for name in self.architecture.replaced_tensors(matrix)}
        stored = {key for name in names for key, _ in self.architecture.origins[name].stored}
        return sum(self.architecture.layout.tensors[key].num_bytes for key in stored)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the widest stored matrix."""
        origins, tensors = self.architecture.origins, self.architecture.layout.tensors
        keys = {key for matrix in self.inside for key, _ in origins[matrix.parameter].stored}
        return max(DTYPE_BITS[tensors[key].dtype] for key in keys) // 8

    @property
    def block_weights(self) -> int:
        """Parameters of the largest block."""
        blocks = map(self.architecture.model.get_submodule, self.architecture.blocks)
        return max(sum(p.numel() for p in block.parameters()) for block in blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSize:
    """Bytes of the artifact: fields inside the blocks, all outside them, weight files in all."""

    packed: int
    outside: int
    file: int
    num_parameters: int


def measure_file(assignment: Assignment) -> FileSize:
    """Compute the stored sizes; tensors that the architecture does not know are not copied."""
    architecture = assignment.architecture
    keys = {key for origin in architecture.origins.values() for key, _ in origin.stored}
    stored = [architecture.layout.tensors[key] for key in keys]
    packed_outside = assignment.packed_outside
    dense = [matrix for matrix in assignment.outside if matrix not in packed_outside]
    packed = assignment.field_bytes(assignment.inside)
    outside = assignment.field_bytes(packed_outside) + assignment.stored_bytes(dense)
    new_parameters = 0
    if (fitted := assignment.lm_head) is not None:
        # A fitted lm_head adds a bias, and its matrix is new if the architecture ties it.
        if f"{fitted.name}.bias" not in architecture.origins:
            outside += assignment.element_bytes * fitted.shape[0]
            new_parameters += fitted.shape[0]
        new_parameters += 0 if architecture.replaced_tensors(fitted) else fitted.num_weights
    replaced = assignment.stored_bytes(assignment.inside) + assignment.stored_bytes(
        assignment.outside
    )
    return FileSize(
        packed=packed,
        outside=outside,
        file=sum(entry.num_bytes for entry in stored) - replaced + packed + outside,
        num_parameters=sum(entry.num_elements for entry in stored) + new_parameters,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak bytes of a quantization: all that is computed with, and `num_buffers` of activations.

    There is a buffer for each stream, for methods with a fit also one for each target, and one for
    the inputs of a fitted lm_head.
    """

    working: int
    buffer_bytes: int
    num_buffers: int

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return BASE_BYTES + self.working + self.num_buffers * self.buffer_bytes

    @property
    def device(self) -> int:
        """Bytes of a device's memory, where one computes; buffers stay on the host."""
        return BASE_BYTES + self.working


def measure_memory(assignment: Assignment, text: TextSize) -> Memory:
    """Estimate peak memory, in the phases of packing the largest block or outside the blocks."""
    inside, weights = assignment.inside, assignment.block_weights
    used = {assignment.quantizers[matrix.name] for matrix in inside}
    # The block, its codes, and the matrix that is packed.
    stored = weights * (assignment.element_bytes + 1)
    stored += TEMPORARIES * max(matrix.num_weights for matrix in inside)
    products = hessians = fit = 0
    if text.total:
        # The block in float32, and the matrices that its packed module unpacks.
        stored += 2 * FLOAT * weights
        products = TEMPORARIES * text.batch * max(sum(matrix.shape) for matrix in inside)
    if any("hessian" in quantizer.statistics for quantizer in used):
        # Those of a block, of which the largest also in double precision and as its factor.
        squares = [matrix.shape[1] ** 2 for matrix in inside]
        hessians = FLOAT * sum(squares) // len(assignment.matrices) + TEMPORARIES * max(squares)
    fits = [each.fit_bytes() for each in used if isinstance(each, BlockQuantizer)]
    if fits:
        # The state of a fit, and the activations of one sequence that are saved for gradients.
        model = assignment.architecture.model
        blocks = (block.values() for block in assignment.matrices.values())
        fit = weights * max(fits) + max(saved_bytes(model, b, text.sequence) for b in blocks)
    # Hessians are freed before a fit.
    live = [stored + max(products + hessians, fit)]
    # Embedding and lm_head are packed while no block is in memory.
    tables = [matrix.num_weights for matrix in assignment.packed_outside]
    live += [(assignment.element_bytes + 5) * size for size in tables]
    if assignment.lm_head is not None:
        fitted = assignment.quantizers[assignment.lm_head.name]
        assert isinstance(fitted, LmHeadQuantizer)
        live.append(fitted.fit_lm_head_bytes(assignment.lm_head.shape))
    width = getattr(assignment.architecture.config.get_text_config(), "hidden_size", 0)
    return Memory(
        working=int(RETAINED * max(live)),
        buffer_bytes=FLOAT * text.total * width,
        num_buffers=(4 if fits else 2) + (assignment.lm_head is not None),
    )
