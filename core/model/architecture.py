"""A checkpoint's architecture without its weights: its blocks and their matrices.

The model is built on the meta device from its configuration, so any size fits. Nothing here is
written per architecture: the blocks are the decoder's list of modules with the most parameters, and
inside a block every plain linear layer, transposed Conv1D and slice of a fused 3-D expert tensor
can be packed.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import Checkpoint, check_finite
from spectool.errors import UnsupportedError, wrap_errors
from spectool.model.decoder import find_blocks
from spectool.model.exchange import field_specs, replace_with_packed
from spectool.model.matrices import Matrix, explain_dense, find_matrices
from spectool.model.meta import build_meta, read_config
from spectool.model.origins import (
    Origin,
    find_origins,
    read_origin,
    resolve_tensors,
    unused_tensors,
)
from spectool.model.packed import PackedExperts


class Architecture:
    """The meta model of a checkpoint, dense or packed, with the names of its blocks and matrices.

    Raises:
        UnsupportedError: an unknown or unsuitable architecture, or quantized by another tool.
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.layout = checkpoint, checkpoint.layout
        layout, self.config = self.layout, read_config(checkpoint)
        if layout.quantization is not None and not layout.is_packed:
            by = layout.quantization.get("quant_method", "an unnamed method")
            raise UnsupportedError(f"{layout.path}: is quantized by {by}, not by spectool")
        self.modules = layout.modules
        resolved = resolve_tensors(checkpoint, self.config, compare=True)
        self.model, self.origins, self.untied = resolved
        self._built = {torch.float32: self.model}
        self.decoder_name, self.blocks = find_blocks(self.model)

    @functools.cached_property
    def unused(self) -> list[str]:
        """Names of the stored tensors that no module takes."""
        return unused_tensors(self.model, self.layout)

    @functools.cached_property
    def zeroed_rows(self) -> dict[str, int]:
        """Names of embedding weights with the row of the padding token, if transformers sets that
        row to zero at loading, whatever is stored (Youtu)."""
        rows = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with wrap_errors(self.layout.path, "its padding token does not fit its embedding"):
                    if _zeroes_padding(_owner(self.model, name), module):
                        rows[f"{name}.weight"] = module.padding_idx
        return rows

    def meta_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return the meta model built to run in `dtype`; some tensors keep another dtype."""
        if dtype not in self._built:
            trusted = self.checkpoint.trust_remote_code
            model = build_meta(self.config, dtype=dtype, trust_remote_code=trusted)
            model.all_tied_weights_keys = dict(self.model.all_tied_weights_keys)
            self._built[dtype] = model
        return self._built[dtype]

    def block_matrices(self, block: str) -> list[Matrix]:
        """List the packable matrices of a block, in the order of its modules."""
        matrices = find_matrices(self.model.get_submodule(block), block, self._parents(block))
        return [matrix for matrix in matrices if matrix.parameter not in self._shared]

    def explain_dense(self, block: str) -> dict[str, str]:
        """Return the block's linear layers and routers that are never packed, with the reason."""
        module = self.model.get_submodule(block)
        shared = (name for name in self._shared if name.startswith(f"{block}."))
        return {
            **{name.rpartition(".")[0]: "shares its weight with another block" for name in shared},
            **explain_dense(module, block, self._parents(block)),
        }

    @property
    def _shared(self) -> set[str]:
        """Names of weight matrices inside the blocks that are tied to others (Zamba)."""
        ties = self.model.all_tied_weights_keys
        inside = tuple(f"{block}." for block in self.blocks)
        tied = {name for name in (*ties, *ties.values()) if name.startswith(inside)}
        return {name for name in tied if self.model.get_parameter(name).ndim > 1}

    def _parents(self, block: str) -> tuple[nn.Module, ...]:
        """Return the modules that contain a block, outermost first."""
        paths = {block[:end] for end in _ends(block)} - {block}
        return tuple(self.model.get_submodule(path) for path in sorted(paths))

    def outer_matrices(self, *, own_lm_head: bool = False) -> list[Matrix]:
        """List the matrices outside the blocks: the embedding and the lm_head.

        Tied ones are one matrix, unless `own_lm_head`: then the lm_head is a matrix of its own.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        table: Any = self.model.get_input_embeddings()
        output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        lm_head = names.get(id(output), "")
        tied = f"{lm_head}.weight" in self.model.all_tied_weights_keys
        matrices, name = [], names.get(id(table), "")
        if isinstance(table, nn.Embedding):
            shared = lm_head if tied and not own_lm_head else None
            matrices.append(_outer_matrix(name, f"{name}.weight", "embedding", table, shared))
        if isinstance(output, nn.Linear) and (own_lm_head or not tied):
            matrices.append(
                _outer_matrix(lm_head, f"{name if tied else lm_head}.weight", "lm_head", output)
            )
        return matrices

    def replaced_tensors(self, matrix: Matrix) -> set[str]:
        """Return the names of the stored tensors that a matrix's codes replace."""
        if matrix.kind == "lm_head":
            # A tied tensor is kept: the embedding still uses it.
            return {f"{matrix.name}.weight"} & self.origins.keys()
        names = {matrix.parameter}
        if matrix.tied is not None:
            names.add(f"{matrix.tied}.weight")
        return names & self.origins.keys()

    def block_tensors(self, block: str) -> list[str]:
        """List the names of the block's tensors that are stored."""
        return [name for name in self.origins if name.startswith(block + ".")]

    def outer_tensors(self) -> list[str]:
        """List the stored tensors of no block: embeddings, norms, lm_head, vision towers."""
        prefixes = tuple(block + "." for block in self.blocks)
        return [name for name in self.origins if not name.startswith(prefixes)]

    def stored_names(self, name: str) -> list[str]:
        """List the stored tensors that hold the tensor `name`: a tied one may be stored twice."""
        names = [self.origins[name].stored[0][0]]
        for target, source in self.model.all_tied_weights_keys.items():
            if source == name and target in self._stored_origins:
                names.append(self._stored_origins[target].stored[0][0])
        return list(dict.fromkeys(names))

    @functools.cached_property
    def _stored_origins(self) -> dict[str, Origin]:
        """The origin of each stored tensor, copies of tied ones included."""
        return find_origins(self.model, self.layout.tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named tensors in their stored dtypes, merged as the architecture expects.

        8-bit floats are converted to bfloat16, which represents them exactly.

        Raises:
            CheckpointError: weights that are NaN or infinite.
        """
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name not in tensors:
                made = read_origin(self.model, self.checkpoint.read, name, self.origins[name])
                for key, tensor in made.items():
                    check_finite(key, tensor)
                    # torch does not compute with 8-bit floats.
                    eight_bit = tensor.is_floating_point() and tensor.element_size() == 1
                    tensors[key] = tensor.bfloat16() if eight_bit else tensor
                    if key in self.zeroed_rows:
                        tensors[key][self.zeroed_rows[key]] = 0
        return tensors

    def cast(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Cast tensors to the dtypes that they have in a model that runs in `dtype`."""
        model = self.meta_model(dtype)
        like = model.state_dict()
        return {
            name: _cast(name, tensor, like.get(name, tensor), model, dtype)
            for name, tensor in tensors.items()
        }

    def build_module(
        self,
        name: str,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> nn.Module:
        """Build a real copy of the submodule `name` with these tensors, in eval mode.

        `modules`: entries of the matrices that are packed in `tensors`; None: the checkpoint's.
        """
        model = self.meta_model(dtype)
        module = self._copied(model, name)
        prefix = f"{name}." if name else ""
        packed = self.modules if modules is None else modules
        specs = field_specs({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})
        with torch.device("meta"):
            replace_with_packed(
                module,
                {key: entry for key, entry in packed.items() if key in specs},
                specs,
                dtype=dtype,
                prefix=name,
            )
        state = {
            key: _cast(prefix + key, tensors[prefix + key], part, model, dtype)
            for key, part in module.state_dict().items()
            if prefix + key in tensors
        }
        module.load_state_dict(state, strict=False, assign=True)
        for part in module.modules():
            if isinstance(part, PackedExperts):
                part.like = torch.zeros(0, dtype=dtype)
        move: Any = module._apply
        move(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        module.requires_grad_(False)
        if isinstance(module, PreTrainedModel):
            # A mapping computed anew would contain ties that packing has resolved.
            module.tie_weights(recompute_mapping=False)
        return module.eval()

    def _copied(self, model: PreTrainedModel, name: str) -> nn.Module:
        """Copy a submodule, with values in the buffers that no file holds."""
        module = model.get_submodule(name)
        unstored = [
            (path, owner._buffers, key)
            for path, owner in module.named_modules(prefix=name)
            for key, buffer in owner._buffers.items()
            if buffer is not None and (f"{path}.{key}" if path else key) not in self.origins
        ]
        empty = [buffers[key] for _, buffers, key in unstored]
        # Such a buffer is filled by its module or by one that contains it (Falcon-H1): all are
        # initialised, inner ones first, inside the model, since they refer to each other.
        owners = {path[:end] for path, _, _ in unstored for end in _ends(path)}
        try:
            for (_, buffers, key), buffer in zip(unstored, empty, strict=True):
                buffers[key] = torch.empty_like(buffer, device="cpu")
            with torch.no_grad():
                for path in sorted(owners, key=lambda path: (-len(path), path)):
                    initialise: Any = _owner(model, path)._init_weights
                    initialise(model.get_submodule(path))
            return copy.deepcopy(module)
        finally:
            for (_, buffers, key), buffer in zip(unstored, empty, strict=True):
                buffers[key] = buffer


def _ends(path: str) -> Iterator[int]:
    """Yield the lengths of the prefixes of `path` that name a module, itself included."""
    yield 0
    if path:
        yield from (at for at, sign in enumerate(path) if sign == ".")
        yield len(path)


def _zeroes_padding(model: PreTrainedModel, embedding: nn.Embedding) -> bool:
    """Whether the model's initialisation sets the padding row of a loaded embedding to zero."""
    if not type(model).__module__.startswith("transformers."):
        # transformers does not call it for loaded weights of remote code.
        return False
    row = embedding.padding_idx
    assert row is not None
    loaded: Any = copy.copy(embedding)
    weight: Any = nn.Parameter(torch.ones(row + 1, 1), requires_grad=False)
    weight._is_hf_initialized = True
    loaded._parameters = {**embedding._parameters, "weight": weight}
    with torch.no_grad():
        model._init_weights(loaded)  # type: ignore[no-untyped-call]
    return not weight[row].any()


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the innermost model that contains a module; its `_init_weights` fills buffers."""
    while True:
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
        name = name.rpartition(".")[0]


def _cast(
    name: str, tensor: Tensor, like: Tensor, model: PreTrainedModel, dtype: torch.dtype
) -> Tensor:
    """Cast a tensor as transformers would; `like` is the meta tensor that it replaces.

    Fields of packed matrices keep their dtype.
    """
    if not tensor.is_floating_point() or ".q." in name:
        return tensor
    by_pattern: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    planned = (to for part, to in by_pattern.items() if re.search(part.replace("*", ".*"), name))
    return tensor.to(next(planned, like.dtype if like.is_floating_point() else dtype))


def _outer_matrix(
    name: str,
    parameter: str,
    kind: Literal["embedding", "lm_head"],
    module: nn.Linear | nn.Embedding,
    tied: str | None = None,
) -> Matrix:
    """Describe the embedding or the lm_head as a matrix."""
    rows, width = module.weight.shape
    return Matrix(name=name, parameter=parameter, kind=kind, shape=(rows, width), tied=tied)
