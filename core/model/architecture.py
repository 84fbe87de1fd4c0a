"""A checkpoint's architecture without its weights: its blocks and their matrices.

The model is built on the meta device from its configuration, so any size fits. Nothing here is
written per architecture: the blocks are the decoder's list of modules with the most parameters, and
inside a block every plain linear layer, transposed Conv1D and slice of a fused 3-D expert tensor
can be packed.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from spectool.checkpoint import contents, foreign
from spectool.checkpoint.dtypes import with_plain_dtypes
from spectool.checkpoint.headers import Layout
from spectool.checkpoint.tensors import Checkpoint, check_finite, same_values
from spectool.errors import UnsupportedError, wrap_errors
from spectool.model.causal import why_not_causal
from spectool.model.decoder import find_decoder
from spectool.model.matrices import Matrix, explain_dense, find_matrices
from spectool.model.origins import Origin, find_origins, read_origin, resolve_ties
from spectool.model.packed import PackedExperts, field_specs, replace_with_packed


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
        self.model, self.origins, self.untied = resolve(checkpoint, self.config, compare=True)
        self._built = {torch.float32: self.model}
        self.decoder_name, self.blocks = find_blocks(self.model)

    @functools.cached_property
    def unused(self) -> list[str]:
        """Names of the stored tensors that no module takes."""
        return unused_tensors(self.model, self.layout)

    @functools.cached_property
    def zeroed(self) -> dict[str, int]:
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
        copies = find_origins(self.model, self.layout.tensors)
        for target, source in self.model.all_tied_weights_keys.items():
            if source == name and target in copies:
                names.append(copies[target].stored[0][0])
        return list(dict.fromkeys(names))

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
                    if key in self.zeroed:
                        tensors[key][self.zeroed[key]] = 0
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
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    value = parameter.detach().to(device)
                    owner._parameters[key] = nn.Parameter(value, requires_grad=False)
            for key, buffer in owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    owner._buffers[key] = buffer.to(device)
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


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Make the configuration of a checkpoint.

    Raises:
        UnsupportedError: transformers does not know the model type.
        CheckpointError: the configuration contradicts itself.
    """
    path, raw, trusted = checkpoint.path, checkpoint.layout.config, checkpoint.trust_remote_code
    with wrap_errors(path, "its config.json is not valid"):
        plain = with_plain_dtypes(raw, path)
        try:
            if plain == raw:
                return _load_config(path, trusted)
            return _make_config(plain, path, trusted)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            is_remote = "trust_remote_code" in str(error)
            if not is_remote and raw.get("model_type") in CONFIG_MAPPING:
                raise
            hint = "--trust-remote-code runs the code in it" if is_remote else None
            raise UnsupportedError(f"{path}: unknown architecture: {reason}", hint=hint) from error


def _load_config(path: Path, trusted: bool) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    return config


def _make_config(raw: Mapping[str, Any], path: Path, trusted: bool) -> PreTrainedConfig:
    """Make a configuration of the JSON object `raw`, as if it were read from `path`."""
    remote = raw.get("auto_map")
    if isinstance(remote, dict):
        # The remote code is still loaded from `path`.
        local = {key: f"{path}--{value}" for key, value in remote.items() if "--" not in value}
        raw = {**raw, "auto_map": {**remote, **local}}
    with tempfile.TemporaryDirectory(prefix="spectool-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(raw), encoding="utf-8")
        config = _load_config(file, trusted)
    config._name_or_path = str(path)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """Return transformers' auto class for this configuration: causal, else image-text-to-text.

    Raises:
        UnsupportedError: neither class supports it, or it is an encoder-decoder.
    """
    if foreign.is_encoder_decoder(config):
        raise UnsupportedError(f"{config.model_type} is {foreign.ENCODER_DECODER}")
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    raise UnsupportedError(f"{config.model_type}: transformers has no causal model for it")


def build_meta(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the whole model on the meta device, in eval mode, to run in `dtype`.

    Raises:
        CheckpointError: no model can be built of this configuration.
        UnsupportedError: see `model_class`.
    """
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    kind = model_class(config)
    where = config._name_or_path or config.model_type
    with wrap_errors(where, "no model can be built of its config.json"):
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(
                dense, dtype=dtype, trust_remote_code=trust_remote_code
            )
        # Fused expert kernels do not expose the inputs of each expert; the eager loop does.
        model.set_experts_implementation("eager")
    model.train(False)
    return model


def resolve(
    checkpoint: Checkpoint, config: PreTrainedConfig, *, compare: bool = False
) -> tuple[PreTrainedModel, dict[str, Origin], bool]:
    """Build the meta model of a dense or packed checkpoint and resolve its tensors' origins.

    Returns the model, the origin of each stored tensor, and whether matrices that the configuration
    ties are stored with different values; that is tested with `compare` only, which reads them.

    Raises:
        UnsupportedError: a model that is not causal.
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """
    layout = checkpoint.layout

    def equal(first: Origin, second: Origin) -> bool:
        entries = [layout.tensors[origin.stored[0][0]] for origin in (first, second)]
        return not compare or same_values(*entries)

    # Every check comes before anything of the model's size is allocated.
    with contents.limit_parameters(layout):
        model = build_meta(config, trust_remote_code=checkpoint.trust_remote_code)
    check_causal(model, layout.path)
    with wrap_errors(layout.path, "its tensors do not fit its configuration"):
        wanted = model.state_dict(keep_vars=True)
        if layout.is_packed:
            origins = {name: Origin.of(name) for name in layout.tensors}
        else:
            origins = find_origins(model, layout.tensors)
        for name in sorted(wanted.keys() & origins.keys()):
            shape = _shape_of(model, layout, name, origins[name])
            contents.check_shape(layout, name, shape, wanted[name].shape)
            stored = [layout.tensors[key].dtype for key, _ in origins[name].stored]
            contents.check_kind(layout, name, stored, wanted[name])
        untied = resolve_ties(origins, model.all_tied_weights_keys, equal)
        contents.check_missing(model, layout, _missing(model, layout, origins))
        contents.check_tables(model, layout)
    return model, origins, untied


def check_causal(model: PreTrainedModel, path: Path) -> None:
    """Check that a token's logits do not depend on later tokens.

    Raises:
        UnsupportedError: they do.
    """
    decoder: nn.Module = find_decoder(model) or model
    reason = why_not_causal(model.config.get_text_config(), decoder.modules())
    if reason is not None:
        raise UnsupportedError(f"{path}: is no causal model: {reason}")


def _missing(model: PreTrainedModel, layout: Layout, origins: Mapping[str, Origin]) -> list[str]:
    """List the tensors of the architecture that are in no file."""
    wanted, modules = model.state_dict(keep_vars=True), layout.modules
    expected = set(wanted) - {
        name if entry.get("expert") else f"{name}.weight" for name, entry in modules.items()
    }
    if any(entry.get("expert") for entry in modules.values()):
        expected -= {name.rpartition(".")[0] for name in modules}
    # A module shared by two others has two names; its tensors are stored under one of them.
    shared = {id(wanted[name]) for name in wanted.keys() & origins.keys()}
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "$^")
    return sorted(
        name
        for name in expected - set(origins) - set(model.all_tied_weights_keys)
        if id(wanted[name]) not in shared and not optional.search(name)
    )


def _shape_of(model: PreTrainedModel, layout: Layout, name: str, origin: Origin) -> torch.Size:
    """Return the shape that a model's tensor would be read with, converted on the meta device."""
    if origin.converter is None:
        return torch.Size(layout.tensors[origin.stored[0][0]].shape)
    return read_origin(model, functools.partial(_meta_tensor, layout), name, origin)[name].shape


def _meta_tensor(layout: Layout, name: str) -> Tensor:
    """Return a meta tensor of a stored tensor's shape."""
    return torch.empty(layout.tensors[name].shape, device="meta")


def unused_tensors(model: PreTrainedModel, layout: Layout) -> list[str]:
    """List a dense checkpoint's stored tensors that no module of this model takes."""
    if layout.quantization is not None:
        return []
    origins = find_origins(model, layout.tensors)
    taken = [key for origin in origins.values() for key, _ in origin.stored]
    return contents.find_unused(model, layout.tensors, taken)


def find_blocks(model: PreTrainedModel) -> tuple[str, list[str]]:
    """Return the decoder's name in the model and the names of its blocks, in order.

    Raises:
        UnsupportedError: the decoder has no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = find_decoder(model)
    if decoder is None or id(decoder) not in names:
        raise UnsupportedError(f"{type(model).__name__} has no decoder that spectool can find")
    lists = _block_lists(decoder, names)
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    best = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return names[id(decoder)], [names[id(block)] for block in best]


def _block_lists(decoder: nn.Module, names: Mapping[int, str]) -> list[nn.ModuleList]:
    """Find the decoder's lists of modules with matrices, without those of vision towers in it."""
    text = type(getattr(decoder, "config", None))
    towers = tuple(
        f"{names[id(part)]}."
        for part in decoder.modules()
        if isinstance(part, PreTrainedModel) and type(part.config) is not text
    )
    return [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(find_matrices(module[0], ""))
        and all(id(child) in names for child in module)
        and not names[id(module)].startswith(towers)
    ]


def _outer_matrix(
    name: str,
    parameter: str,
    kind: Literal["embedding", "lm_head"],
    module: nn.Linear | nn.Embedding,
    tied: str | None = None,
) -> Matrix:
    """Describe the embedding or the lm_head as a matrix."""
    rows, width = module.weight.shape
    return Matrix(
        name=name, parameter=parameter, kind=kind, shape=(rows, width), transposed=False, tied=tied
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a `--skip` pattern matches a name: a glob, or consecutive dotted parts of it."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
