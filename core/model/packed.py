"""Packed matrices in a transformers model: the modules that hold them.

A packed matrix is a set of named tensors ("fields") below `<module>.q.`; the method that wrote
them defines how to unpack them. `dequantize` is the specification of a format; a `forward` may be
faster but must compute the same. A packed embedding is a packed matrix whose rows are looked up; a
tied lm_head shares its fields.

Shapes: n outputs, m inputs, N tokens, V vocabulary, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.errors import CheckpointError
from spectool.kernels.segments import Segment
from spectool.methods import import_method

# Weights per piece of rows that is unpacked, or summed in double precision, at once.
PIECE = 1 << 19

# Dtype and shape of a tensor, as in a safetensors header, and those of a matrix's fields by name.
TensorSpec = tuple[torch.dtype, tuple[int, ...]]
FieldSpec = Mapping[str, TensorSpec]


class Fields(nn.Module):
    """Buffers of one packed matrix; they move between devices but keep their dtypes."""

    def __init__(self, spec: FieldSpec) -> None:
        super().__init__()
        for name, (dtype, shape) in spec.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fields:
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class PackedLinear(nn.Module):
    """Base of every method's runtime linear, `y = x W^T + b` with packed W.

    A subclass implements `rows`, or `dequantize` if rows cannot be unpacked one by one, `segments`
    if products can read the format, and `forward` if it has a faster one, by `product` where that
    is given. `format` names the rows of the kernels' table for a format that is no segments.
    `method`: the method that packed it, in a model that was loaded. `config`: its options, if
    unpacking depends on them.
    """

    format: ClassVar[str | None] = None
    method = ""
    product: Any = None
    q: Fields
    bias: nn.Parameter | None

    def __init__(self, spec: FieldSpec, shape: tuple[int, int], config: Any = None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.config = config
        self.q = Fields(spec)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """See `make_placeholder`."""
        return make_placeholder(self.out_features, next(self.q.buffers()).device)

    def dequantize(self) -> Tensor:
        """Unpack the matrix W [n, m] in float32."""
        return self.rows(slice(None))

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Unpack some rows, a slice or their numbers, in float32."""
        return self.dequantize()[rows]

    def segments(self) -> list[Segment] | None:
        """Return the matrix as products read it; None if only torch multiplies with it.

        Codes are unpacked to bytes for that, so a caller needs memory for n m of them.
        """
        return None

    def pieces(self) -> Iterator[Tensor]:
        """Yield the unpacked matrix in pieces of consecutive rows."""
        if type(self).rows is PackedLinear.rows:
            yield self.dequantize()
            return
        for rows in self.row_slices():
            yield self.rows(rows)

    def row_slices(self) -> Iterator[slice]:
        """Yield slices of all rows, small enough to stay in cache when they are unpacked."""
        size = max(1, PIECE // self.in_features)
        for start in range(0, self.out_features, size):
            yield slice(start, start + size)

    @property
    def is_matrix(self) -> bool:
        """Whether `forward` is a product with one matrix, so that a dense linear may replace it."""
        return True

    @property
    def is_differentiable(self) -> bool:
        """Whether the unpacked matrix has a gradient with respect to the floating fields."""
        return self.is_matrix

    def has_kernel(self) -> bool:
        """Whether `forward` computes with the codes on this machine instead of unpacking them."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def make_placeholder(rows: int, device: torch.device) -> Tensor:
    """Make a placeholder of a weight, for models that initialise their children or read a device.

    It is marked as initialised. A product with it fails; any other result is NaN.
    """
    # Width 1, not 0: some models divide by the width.
    placeholder = torch.full((1, 1), torch.nan, device=device).expand(rows, 1)
    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
    return placeholder


class EmbeddingRows(nn.Module):
    """Embedding that fetches only the rows of a batch's tokens, by a subclass's `rows`.

    Calls the original module on these rows, so that what it adds (a scale) is kept.
    """

    def __init__(self, embedding: nn.Embedding, device: torch.device | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        device = device or embedding.weight.device
        del embedding._parameters["weight"]
        embedding.weight = make_placeholder(embedding.num_embeddings, device)
        # An index into the whole table, which matters for gradients only.
        embedding.padding_idx = None

    @property
    def weight(self) -> Tensor:
        """See `make_placeholder`."""
        weight: Tensor = self.embedding.weight
        return weight

    def rows(self, ids_N: Tensor) -> Tensor:
        """Fetch the rows [N, D] of these tokens, in the dtype of activations."""
        raise AssertionError("every subclass defines this")

    def forward(self, ids: Tensor) -> Tensor:
        used_N, inverse = torch.unique(ids, return_inverse=True)
        embedding, placeholder = self.embedding, self.embedding.weight
        embedding.weight = self.rows(used_N)
        try:
            states: Tensor = embedding(inverse)
        finally:
            embedding.weight = placeholder
        return states


class PackedEmbedding(EmbeddingRows):
    """Embedding whose table is a packed matrix [V, D], which a tied lm_head may share.

    `like` is an empty tensor in the dtype of activations, so that `.to(dtype)` works.
    """

    q: Fields
    like: Tensor

    def __init__(self, embedding: nn.Embedding, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__(embedding)
        self.q = packed.q
        # Not a child: its fields are registered above, and would be found twice.
        self.__dict__["_packed"] = packed
        self.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)

    @property
    def packed(self) -> PackedLinear:
        """The table as a linear."""
        packed: PackedLinear = self.__dict__["_packed"]
        return packed

    @property
    def weight(self) -> Tensor:
        """See `make_placeholder`."""
        return self.packed.weight

    def rows(self, ids_N: Tensor) -> Tensor:
        return self.packed.rows(ids_N).to(self.like.dtype)

    def dequantize(self) -> Tensor:
        """Unpack the table [V, D] in float32."""
        return self.packed.dequantize()


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear or an embedding, unpacked if it is packed."""
    if isinstance(module, (PackedLinear, PackedEmbedding)):
        return module.dequantize()
    stored: Any = module.weight
    weight: Tensor = stored
    return weight


class ExpertMatrix:
    """One expert's matrix, for code that takes its slice of a fused tensor and multiplies with it.

    Products with it are those of its packed linear. Whatever else is done with it is done with the
    unpacked matrix, in the dtype of activations.
    """

    def __init__(self, linear: PackedLinear, *, transposed: bool, dtype: torch.dtype) -> None:
        self.linear, self.transposed, self.dtype = linear, transposed, dtype

    def unpack(self) -> Tensor:
        """Unpack the matrix, transposed or not."""
        weight = self.linear.dequantize().to(self.dtype)
        return weight.T if self.transposed else weight

    def __getattr__(self, name: str) -> Any:
        if name == "T":
            return ExpertMatrix(self.linear, transposed=not self.transposed, dtype=self.dtype)
        return getattr(self.unpack(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # x W^T with W as it is, and x W with W transposed, are what the linear computes.
        transposed = {F.linear: False, **dict.fromkeys(_MATMULS, True)}.get(func)
        if not kwargs and transposed is not None and isinstance(args[1], ExpertMatrix):
            x, matrix, *bias = args
            if matrix.transposed is transposed:
                y = matrix.linear(x)
                return y if not bias or bias[0] is None else y + bias[0]
        plain = [each.unpack() if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedExperts(nn.Module):
    """Replacement of a fused expert tensor [E, n, m] that gives one expert's matrix per index.

    The matrix is unpacked, or an `ExpertMatrix` where it has a kernel. `like` is an empty tensor in
    the dtype of activations, so that `.to(dtype)` works.
    """

    like: Tensor

    def __init__(
        self, experts: Mapping[int, PackedLinear], *, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        for index in range(len(experts)):
            self.add_module(str(index), experts[index])
        self.transposed = transposed
        self.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)

    def matrices(self) -> Iterator[ExpertMatrix]:
        """Yield the matrix of each expert."""
        for expert in self.children():
            assert isinstance(expert, PackedLinear)
            yield ExpertMatrix(expert, transposed=self.transposed, dtype=self.like.dtype)

    def has_kernel(self) -> bool:
        """Whether all experts have a kernel."""
        return all(matrix.linear.has_kernel() for matrix in self.matrices())

    def unpack(self) -> Tensor:
        """Unpack the whole tensor."""
        return torch.stack([matrix.unpack() for matrix in self.matrices()])

    def __getitem__(self, index: int | Tensor) -> Tensor | ExpertMatrix:
        expert = self._modules[str(int(index))]
        assert isinstance(expert, PackedLinear)
        matrix = ExpertMatrix(expert, transposed=self.transposed, dtype=self.like.dtype)
        return matrix if expert.has_kernel() else matrix.unpack()


class Packer(Protocol):
    """Interface of a quantizer that loading needs; `Quantizer` in quantize extends it."""

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        """Return the fields of a matrix of this shape."""

    def build(self, shape: tuple[int, int]) -> PackedLinear:
        """Build the runtime linear with empty fields, on the current default device."""


def make_packer(entry: Mapping[str, Any]) -> Packer:
    """Create the quantizer of an artifact's entry (`method`, `options`)."""
    kind: Any = import_method(entry["method"], "quantizer")
    packer: Packer = kind(kind.Config.from_dict(entry["options"]))
    return packer


def build_packed(entry: Mapping[str, Any], spec: FieldSpec) -> PackedLinear:
    """Build the runtime linear of an artifact's entry (`method`, `options`, `shape`).

    Raises:
        CheckpointError: the stored fields are not those of such a matrix.
    """
    packer, (n, m) = make_packer(entry), entry["shape"]
    expected = packer.layout((n, m))
    for field in sorted(spec.keys() | expected.keys()):
        if spec.get(field) != expected.get(field):
            raise CheckpointError(
                f"field {field} of a packed {n} x {m} matrix is {_describe(spec.get(field))}, "
                f"expected {_describe(expected.get(field))}"
            )
    linear = packer.build((n, m))
    linear.method = entry["method"]
    return linear


def load_packed(entry: Mapping[str, Any], fields: Mapping[str, Tensor]) -> PackedLinear:
    """Build the runtime linear of an artifact's entry with these fields, on the host."""
    spec = {name: (value.dtype, tuple(value.shape)) for name, value in fields.items()}
    linear = build_packed(entry, spec)
    linear.q.load_state_dict(fields)
    return linear


def _describe(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec[0]} {list(spec[1])}"


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """Return all packed linears of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}


def relative_error(weight_nm: Tensor, module: PackedLinear) -> float:
    """Return the squared error of the unpacked matrix over the squared norm of `weight_nm`.

    Raises:
        CheckpointError: the two have different shapes.
    """
    shape = (module.out_features, module.in_features)
    if tuple(weight_nm.shape) != shape:
        raise CheckpointError(
            f"a packed {shape[0]} x {shape[1]} matrix stands for one of "
            f"{' x '.join(map(str, weight_nm.shape))}; the checkpoints do not belong together"
        )
    error, norm, done = 0.0, 0.0, 0
    rows = max(1, PIECE // shape[1])
    for piece_nm in module.pieces():
        for restored_rm in torch.split(piece_nm, rows):
            # Double: squares of weights below 1e-23 or above 1e19 leave the range of float32.
            weight_rm = weight_nm[done : done + len(restored_rm)].double()
            norm += float(weight_rm.square().sum())
            error += float((restored_rm - weight_rm).square_().sum())
            done += len(restored_rm)
    if norm == 0:
        return math.inf if error else 0.0
    return error / norm
