"""Packed matrices inside a transformers model: the module every method builds on, and the swap.

A packed matrix is a set of named tensors ("fields") below `<module>.q.`; the method that wrote
them says how they become a matrix again. `dequantize` is the specification of a format; a forward
may do better, never differently. An embedding is a packed matrix whose rows are looked up; a tied
output matrix is the same one.

Shapes: n outputs, m inputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.errors import CheckpointError
from spectool.methods import resolve
from spectool.options import Config

# Rows are unpacked, and summed in double precision, in pieces of about this many weights.
PIECE = 1 << 19

# A field's name -> its dtype and shape: what a safetensors header says about it.
FieldSpec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Fields(nn.Module):
    """The buffers of one packed matrix. They move between devices but never change their dtype."""

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
    """Base of every method's runtime linear, `y = x W^T + b` with W in packed form.

    A subclass implements `rows`, or `dequantize` if its rows do not stand alone, and `forward`
    where it has something faster.
    """

    q: Fields
    bias: nn.Parameter | None

    def __init__(self, spec: FieldSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.q = Fields(spec)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """See `stand_in`."""
        return stand_in(self.out_features, next(self.q.buffers()).device)

    def dequantize(self) -> Tensor:
        """The matrix W [n, m] in float32, exactly as the codes say."""
        return self.rows(slice(None))

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Some of its rows, a slice or their numbers, so that the matrix need never be whole."""
        return self.dequantize()[rows]

    def pieces(self) -> Iterator[Tensor]:
        """The same matrix from its first row to its last, in pieces of some rows."""
        if type(self).rows is PackedLinear.rows:
            yield self.dequantize()
            return
        for rows in self.row_slices():
            yield self.rows(rows)

    def row_slices(self) -> Iterator[slice]:
        """All rows in pieces that stay in cache when they are unpacked."""
        size = max(1, PIECE // self.in_features)
        for start in range(0, self.out_features, size):
            yield slice(start, start + size)

    @property
    def is_matrix(self) -> bool:
        """Whether `forward` is a product with one matrix, which can then take its place."""
        return True

    def has_kernel(self) -> bool:
        """Whether `forward` here works on the codes instead of unpacking them each time."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def stand_in(rows: int, device: torch.device) -> Tensor:
    """A weight for models that initialise their children or ask for a device.

    It says that it needs no initialisation; a product with it fails, and what else is made of it is
    NaN. Its width is not 0, for some divide by that.
    """
    absent = torch.full((1, 1), torch.nan, device=device).expand(rows, 1)
    absent._is_hf_initialized = True  # type: ignore[attr-defined]
    return absent


class EmbeddingRows(nn.Module):
    """Stands in for an embedding, whose weight it takes: `rows` gives those that a batch needs.

    The original module does the rest, so that what it adds (a scale) stays.
    """

    def __init__(self, embedding: nn.Embedding, device: torch.device | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        device = device or embedding.weight.device
        del embedding._parameters["weight"]
        embedding.weight = stand_in(embedding.num_embeddings, device)
        # It numbers rows of the whole table, and says something of gradients only.
        embedding.padding_idx = None

    @property
    def weight(self) -> Tensor:
        """See `stand_in`."""
        weight: Tensor = self.embedding.weight
        return weight

    def rows(self, ids_N: Tensor) -> Tensor:
        """The rows [N, D] of these tokens, in the dtype of activations."""
        raise AssertionError("every kind defines this")

    def forward(self, ids: Tensor) -> Tensor:
        used_N, places = torch.unique(ids, return_inverse=True)
        embedding, empty = self.embedding, self.embedding.weight
        embedding.weight = self.rows(used_N)
        try:
            found: Tensor = embedding(places)
        finally:
            embedding.weight = empty
        return found


class PackedEmbedding(EmbeddingRows):
    """An embedding whose table is a packed matrix [V, D], which a tied head may share.

    `like` carries the dtype of activations, so that `.to(dtype)` keeps working; it holds nothing.
    """

    q: Fields
    like: Tensor

    def __init__(self, embedding: nn.Embedding, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__(embedding)
        self.q = packed.q
        # Its fields are this module's; as a child they would be found twice.
        self.__dict__["packed"] = packed
        self.register_buffer("like", torch.zeros(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """See `stand_in`."""
        packed: PackedLinear = self.__dict__["packed"]
        return packed.weight

    def rows(self, ids_N: Tensor) -> Tensor:
        packed: PackedLinear = self.__dict__["packed"]
        return packed.rows(ids_N).to(self.like.dtype)

    def dequantize(self) -> Tensor:
        """The table [V, D] in float32."""
        packed: PackedLinear = self.__dict__["packed"]
        return packed.dequantize()


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear or an embedding, packed or not."""
    if isinstance(module, (PackedLinear, PackedEmbedding)):
        return module.dequantize()
    weight: Any = module.weight
    found: Tensor = weight
    return found


class PackedExperts(nn.Module):
    """Stands in for a fused expert tensor [E, …]: indexing it unpacks one expert's matrix.

    `like` carries the dtype of activations, so that `.to(dtype)` keeps working; it holds nothing.
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

    def __getitem__(self, index: int | Tensor) -> Tensor:
        expert = self._modules[str(int(index))]
        assert isinstance(expert, PackedLinear)
        weight = expert.dequantize().to(self.like.dtype)
        return weight.T if self.transposed else weight


class Packer(Protocol):
    """What a quantizer's class offers to the loader; `Quantizer` in the room above adds to it."""

    Config: type[Config]

    @classmethod
    def layout(cls, shape: tuple[int, int], config: Any) -> FieldSpec:
        """The fields of a matrix of this shape."""
        ...

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: Any) -> PackedLinear:
        """The runtime linear with empty fields, on the current default device."""
        ...


def build_packed(said: Mapping[str, Any], spec: FieldSpec) -> PackedLinear:
    """The runtime linear that an artifact's entry (`method`, `options`, `shape`) describes.

    Raises:
        CheckpointError: the stored fields are not those of such a matrix.
    """
    packer: Packer = resolve(said["method"], "quantizer")
    n, m = said["shape"]
    config = packer.Config.from_dict(said["options"])
    expected = packer.layout((n, m), config)
    for field in sorted(spec.keys() | expected.keys()):
        if spec.get(field) != expected.get(field):
            raise CheckpointError(
                f"field {field} of a packed {n} x {m} matrix is {_said(spec.get(field))}, "
                f"expected {_said(expected.get(field))}"
            )
    return packer.build(spec, (n, m), config)


def _said(header: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if header is None else f"{header[0]} {list(header[1])}"


def swap_in(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    specs: Mapping[str, FieldSpec],
    *,
    dtype: torch.dtype,
    prefix: str = "",
) -> None:
    """Replace the named matrices of `model` by empty packed ones, biases kept.

    An embedding that is `tied` to an output matrix takes the place of both.

    `modules` are an artifact's entries by name, `specs` the fields' headers by the same names;
    `prefix` is the name of `model` itself within them.

    Raises:
        CheckpointError: a name that the model does not have, or fields that are absent.
    """
    experts: dict[str, dict[int, PackedLinear]] = {}
    for name, said in modules.items():
        if name not in specs:
            raise CheckpointError(f"{name}: the artifact says it is packed, but holds no codes")
        local = name.removeprefix(prefix + ".") if prefix else name
        try:
            packed = build_packed(said, specs[name])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if said.get("expert"):
            tensor, _, index = local.rpartition(".")
            experts.setdefault(tensor, {})[int(index)] = packed
            continue
        parent, leaf = _parent(model, local)
        old = getattr(parent, leaf)
        if isinstance(old, nn.Embedding):
            setattr(parent, leaf, PackedEmbedding(old, packed, dtype))
            if "tied" not in said:
                continue
            parent, leaf = _parent(model, said["tied"])
            old = getattr(parent, leaf)
            ties: Any = model.all_tied_weights_keys
            if ties.pop(f"{said['tied']}.weight", None) is None:
                raise CheckpointError(f"{said['tied']}: the architecture does not tie it to {name}")
            # The fields are the embedding's; transformers knows ties of parameters only.
            packed.__dict__["q"] = packed._modules.pop("q")
        elif said.get("outside"):
            # An output matrix of its own, whatever the architecture ties.
            getattr(model, "all_tied_weights_keys", {}).pop(f"{local}.weight", None)
        packed.bias = old.bias
        if said.get("bias") and old.bias is None:
            packed.bias = nn.Parameter(torch.empty(packed.out_features, dtype=dtype), False)
        setattr(parent, leaf, packed)
    for local, slices in experts.items():
        parent, leaf = _parent(model, local)
        transposed = bool(parent.is_transposed)
        del parent._parameters[leaf]
        setattr(parent, leaf, PackedExperts(slices, transposed=transposed, dtype=dtype))
        # Only the loop over experts indexes the tensor; the fused kernels read it whole.
        parent.config._experts_implementation = "eager"


def _parent(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{name}: the architecture has no such module") from error
    if not hasattr(parent, leaf):
        raise CheckpointError(f"{name}: the architecture has no such module")
    return parent, leaf


def field_specs(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Group stored tensors `<name>.q.<field>` by name."""
    found: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for key, header in tensors.items():
        name, infix, field = key.rpartition(".q.")
        if infix:
            found.setdefault(name, {})[field] = header
    return found


def unpack_in_place(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Put dense weights in the place of all codes, one matrix after another (`runtime="dense"`)."""
    tables: dict[int, nn.Parameter] = {}
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, PackedExperts):
                stacked = torch.stack([child[index] for index in range(len(child._modules))])
                delattr(parent, leaf)
                parent.register_parameter(leaf, nn.Parameter(stacked.to(dtype), False))
                continue
            if isinstance(parent, PackedExperts):
                continue
            if not isinstance(child, (PackedLinear, PackedEmbedding)):
                continue
            if isinstance(child, PackedLinear) and not child.is_matrix:
                continue
            # A tied head has the fields of the embedding.
            if id(child.q) not in tables:
                tables[id(child.q)] = nn.Parameter(child.dequantize().to(dtype), False)
            if isinstance(child, PackedEmbedding):
                table = child.embedding
                del table.weight
                table.register_parameter("weight", tables[id(child.q)])
                setattr(parent, leaf, table)
            else:
                dense = nn.Linear(
                    child.in_features, child.out_features, bias=False, device="meta", dtype=dtype
                )
                dense.weight = tables[id(child.q)]
                dense.register_parameter("bias", child.bias)
                setattr(parent, leaf, dense)


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    """All packed linears of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}


def relative_error(weight_nm: Tensor, module: PackedLinear) -> float:
    """Squared error of the unpacked matrix over the squared norm of `weight_nm`.

    In double precision: squares of weights below 1e-23 or above 1e19 leave float32.

    Raises:
        CheckpointError: the two have different shapes.
    """
    shape = (module.out_features, module.in_features)
    if tuple(weight_nm.shape) != shape:
        raise CheckpointError(
            f"a packed {shape[0]} x {shape[1]} matrix stands for one of "
            f"{' x '.join(map(str, weight_nm.shape))}; the checkpoints do not belong together"
        )
    wrong, whole, done = 0.0, 0.0, 0
    rows = max(1, PIECE // shape[1])
    for piece_nm in module.pieces():
        for restored_rm in torch.split(piece_nm, rows):
            weight_rm = weight_nm[done : done + len(restored_rm)].double()
            whole += float(weight_rm.square().sum())
            wrong += float((restored_rm - weight_rm).square_().sum())
            done += len(restored_rm)
    if whole == 0:
        return math.inf if wrong else 0.0
    return wrong / whole
