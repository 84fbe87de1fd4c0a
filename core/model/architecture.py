"""A checkpoint's architecture without its weights: blocks, and what each of them is made of.

The model is built on the meta device from its configuration, so any size fits. Nothing here is
written per architecture: the decoder's longest homogeneous list of modules is the list of blocks,
and inside a block every plain linear layer, transposed Conv1D and fused 3-D expert tensor is a site
that can be packed.
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
from spectool.checkpoint.headers import Layout, read_json
from spectool.checkpoint.tensors import Checkpoint, check_finite, same_values
from spectool.errors import UnsupportedError, opening
from spectool.model.causal import why_not_causal
from spectool.model.decoder import decoder_of
from spectool.model.matrices import Matrix, find_matrices, stay_dense
from spectool.model.origins import Origin, find_origins, read_origin, resolve_ties
from spectool.model.packed import PackedExperts, field_specs, swap_in


class Architecture:
    """The meta model of a checkpoint, dense or packed, with the names of its blocks and sites.

    Raises:
        UnsupportedError: an unknown or unsuitable architecture, or packed by another tool.
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """

    def __init__(self, layout: Layout, *, trust_remote_code: bool = False) -> None:
        self.layout = layout
        self.config = read_config(layout.path, trust_remote_code=trust_remote_code)
        self._trust_remote_code = trust_remote_code
        if layout.quantization is not None and not layout.is_packed:
            by = layout.quantization.get("quant_method", "an unnamed method")
            raise UnsupportedError(f"{layout.path}: is quantized by {by}, not by spectool")
        self.modules = layout.modules
        found = resolve(layout, self.config, trust_remote_code=trust_remote_code, compare=True)
        self.model, self.origins, self.untied = found
        self._built = {torch.float32: self.model}
        self.decoder_name, self.blocks = find_blocks(self.model)

    @functools.cached_property
    def unused(self) -> list[str]:
        """Names of the stored tensors that no module takes."""
        return unused_tensors(self.model, self.layout)

    @functools.cached_property
    def zeroed(self) -> dict[str, int]:
        """Embeddings' weights whose row of the padding token transformers sets to zero when it
        loads, whatever is stored (Youtu's), with that row."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with opening(self.layout.path, "its padding token does not fit its embedding"):
                    if _loses_padding(_owner(self.model, name), module):
                        found[f"{name}.weight"] = module.padding_idx
        return found

    def built_in(self, dtype: torch.dtype) -> PreTrainedModel:
        """The meta model as transformers builds it to run in `dtype`: some tensors have another."""
        if dtype not in self._built:
            model = build_meta(self.config, dtype=dtype, trust_remote_code=self._trust_remote_code)
            model.all_tied_weights_keys = dict(self.model.all_tied_weights_keys)
            self._built[dtype] = model
        return self._built[dtype]

    def matrices(self, block: str) -> list[Matrix]:
        """The packable matrices of a block, in the order of its modules."""
        found = find_matrices(self.model.get_submodule(block), block, self._around(block))
        return [matrix for matrix in found if matrix.parameter not in self._shared]

    def dense(self, block: str) -> dict[str, str]:
        """The block's linear layers and routers that are never packed, with the reason."""
        module = self.model.get_submodule(block)
        shared = (name for name in self._shared if name.startswith(f"{block}."))
        return {
            **{name.rpartition(".")[0]: "shares its weight with another block" for name in shared},
            **stay_dense(module, block, self._around(block)),
        }

    @property
    def _shared(self) -> set[str]:
        """Weights of matrices inside the blocks that are tied to others (Zamba's)."""
        ties = self.model.all_tied_weights_keys
        inside = tuple(f"{block}." for block in self.blocks)
        tied = {name for name in (*ties, *ties.values()) if name.startswith(inside)}
        return {name for name in tied if self.model.get_parameter(name).ndim > 1}

    def _around(self, block: str) -> tuple[nn.Module, ...]:
        """The modules that a block lies in."""
        paths = {block[:end] for end in _ends(block)} - {block}
        return tuple(self.model.get_submodule(path) for path in sorted(paths))

    def outside(self, *, own_lm_head: bool = False) -> list[Matrix]:
        """The embedding and the output matrix: one site if they are tied, unless the output gets
        a matrix of its own."""
        names = {id(module): name for name, module in self.model.named_modules()}
        table: Any = self.model.get_input_embeddings()
        output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        lm_head = names.get(id(output), "")
        tied = f"{lm_head}.weight" in self.model.all_tied_weights_keys
        found, name = [], names.get(id(table), "")
        if isinstance(table, nn.Embedding):
            shared = lm_head if tied and not own_lm_head else None
            found.append(_outside(name, f"{name}.weight", "embedding", table, shared))
        if isinstance(output, nn.Linear) and (own_lm_head or not tied):
            found.append(
                _outside(lm_head, f"{name if tied else lm_head}.weight", "lm_head", output)
            )
        return found

    def holding(self, matrix: Matrix) -> set[str]:
        """Names of the stored tensors that a site's codes take the place of."""
        if matrix.kind == "lm_head":
            # A tied matrix stays: it is the embedding's.
            return {f"{matrix.name}.weight"} & self.origins.keys()
        names = {matrix.parameter}
        if matrix.tied is not None:
            names.add(f"{matrix.tied}.weight")
        return names & self.origins.keys()

    def tensors_of(self, block: str) -> list[str]:
        """Names of the block's tensors that are stored."""
        return [name for name in self.origins if name.startswith(block + ".")]

    def tensors_outside(self) -> list[str]:
        """Names of the stored tensors that belong to no block: embeddings, norms, head, towers."""
        prefixes = tuple(block + "." for block in self.blocks)
        return [name for name in self.origins if not name.startswith(prefixes)]

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors in their stored dtypes, merged as the architecture wants them.

        Eight-bit floats, with which torch does not compute, come as bfloat16, which holds them.

        Raises:
            CheckpointError: weights that are NaN or infinite.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:
                read = read_origin(self.model, checkpoint.read, name, self.origins[name])
                for key, tensor in read.items():
                    check_finite(key, tensor)
                    eight_bit = tensor.is_floating_point() and tensor.element_size() == 1
                    found[key] = tensor.bfloat16() if eight_bit else tensor
                    if key in self.zeroed:
                        found[key][self.zeroed[key]] = 0
        return found

    def cast(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors in the dtypes that a model which runs in `dtype` has them in."""
        model = self.built_in(dtype)
        like = model.state_dict()
        return {
            name: _cast(name, tensor, like.get(name, tensor), model, dtype)
            for name, tensor in tensors.items()
        }

    def materialise(
        self,
        name: str,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> nn.Module:
        """A real copy of the submodule `name` with these tensors, in eval mode.

        `modules` says which of its matrices are packed in `tensors`; by default those that the
        checkpoint itself has packed.
        """
        model = self.built_in(dtype)
        module = self._copied(model, name)
        prefix = f"{name}." if name else ""
        packed = self.modules if modules is None else modules
        specs = field_specs({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})
        with torch.device("meta"):
            swap_in(
                module,
                {key: said for key, said in packed.items() if key in specs},
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
            # What is packed has other ties than the architecture says.
            module.tie_weights(recompute_mapping=False)
        return module.eval()

    def _copied(self, model: PreTrainedModel, name: str) -> nn.Module:
        """A copy of a submodule in which buffers that no file holds have their values.

        Modules fill such buffers themselves, or a module around them does (Falcon-H1's): all of
        them are asked, inner ones first, in the model itself, where they find each other.
        """
        module = model.get_submodule(name)
        unstored = [
            (path, owner._buffers, key)
            for path, owner in module.named_modules(prefix=name)
            for key, buffer in owner._buffers.items()
            if buffer is not None and (f"{path}.{key}" if path else key) not in self.origins
        ]
        empty = [buffers[key] for _, buffers, key in unstored]
        asked = {path[:end] for path, _, _ in unstored for end in _ends(path)}
        try:
            for (_, buffers, key), buffer in zip(unstored, empty, strict=True):
                buffers[key] = torch.empty_like(buffer, device="cpu")
            with torch.no_grad():
                for path in sorted(asked, key=lambda path: (-len(path), path)):
                    initialise: Any = _owner(model, path)._init_weights
                    initialise(model.get_submodule(path))
            return copy.deepcopy(module)
        finally:
            for (_, buffers, key), buffer in zip(unstored, empty, strict=True):
                buffers[key] = buffer


def _ends(path: str) -> Iterator[int]:
    """Where the names of the modules around a module end in its name, its own included."""
    yield 0
    if path:
        yield from (at for at, sign in enumerate(path) if sign == ".")
        yield len(path)


def _loses_padding(model: PreTrainedModel, embedding: nn.Embedding) -> bool:
    """Whether the model, asked to fill an embedding that is loaded, empties the padding's row."""
    if not type(model).__module__.startswith("transformers."):
        # transformers does not ask foreign code about what is loaded.
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
    """The innermost model that holds the module: it knows how its buffers are made."""
    while True:
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
        name = name.rpartition(".")[0]


def _cast(
    name: str, tensor: Tensor, like: Tensor, model: PreTrainedModel, dtype: torch.dtype
) -> Tensor:
    """A tensor in the dtype that transformers would give it; fields of packed matrices as they are.

    `like` is the meta tensor whose place it takes.
    """
    if not tensor.is_floating_point() or ".q." in name:
        return tensor
    kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    own = (to for part, to in kept.items() if re.search(part.replace("*", ".*"), name))
    return tensor.to(next(own, like.dtype if like.is_floating_point() else dtype))


def read_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UnsupportedError: transformers does not know the model type.
        CheckpointError: the configuration contradicts itself.
    """
    said = read_json(path / "config.json")
    foreign.check_config(path, said)
    with opening(path, "its config.json is not valid"):
        plain = with_plain_dtypes(said, path)
        try:
            if plain == said:
                return _config_in(path, trust_remote_code)
            return _config_of(plain, path, trust_remote_code)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            known = "trust_remote_code" in str(error)
            if not known and said.get("model_type") in CONFIG_MAPPING:
                raise
            hint = "--trust-remote-code runs the code in it" if known else None
            raise UnsupportedError(f"{path}: unknown architecture: {reason}", hint=hint) from error


def _config_in(place: Path, trust_remote_code: bool) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        place, trust_remote_code=trust_remote_code
    )
    return config


def _config_of(said: Mapping[str, Any], path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration that `said` describes, as if it stood in `path`."""
    remote = said.get("auto_map")
    if isinstance(remote, dict):
        # The code stays where it is.
        own = {key: f"{path}--{value}" for key, value in remote.items() if "--" not in value}
        said = {**said, "auto_map": {**remote, **own}}
    with tempfile.TemporaryDirectory(prefix="spectool-") as place:
        file = Path(place) / "config.json"
        file.write_text(json.dumps(said), encoding="utf-8")
        config = _config_in(file, trust_remote_code)
    config._name_or_path = str(path)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """The auto class that opens this configuration: a causal model, else a multimodal wrapper.

    Raises:
        UnsupportedError: neither knows it, or it is an encoder-decoder.
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
    """The whole model on the meta device, in eval mode, as built to run in `dtype`.

    Raises:
        CheckpointError: no model can be built of this configuration.
    """
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    kind = model_class(config)
    where = config._name_or_path or config.model_type
    with opening(where, "no model can be built of its config.json"):
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(
                dense, dtype=dtype, trust_remote_code=trust_remote_code
            )
        # Fused expert kernels hide which expert saw which token; the plain loop shows it.
        model.set_experts_implementation("eager")
    model.train(False)
    return model


def resolve(
    layout: Layout,
    config: PreTrainedConfig,
    *,
    trust_remote_code: bool = False,
    compare: bool = False,
) -> tuple[PreTrainedModel, dict[str, Origin], bool]:
    """The meta model of a dense or packed checkpoint, where each of its tensors comes from, and
    whether matrices that the configuration ties are not.

    Whether two stored matrices are tied is seen if they are to be read (`compare`).

    Raises:
        UnsupportedError: a model that is not causal.
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """

    def equal(first: Origin, second: Origin) -> bool:
        entries = [layout.tensors[origin.stored[0][0]] for origin in (first, second)]
        return not compare or same_values(*entries)

    with contents.limit_parameters(layout):
        model = build_meta(config, trust_remote_code=trust_remote_code)
    check_causal(model, layout.path)
    with opening(layout.path, "its tensors do not fit its configuration"):
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
    """Raises: UnsupportedError: logits of a token depend on later ones."""
    decoder: nn.Module = decoder_of(model) or model
    reason = why_not_causal(model.config.get_text_config(), decoder.modules())
    if reason is not None:
        raise UnsupportedError(f"{path}: is no causal model: {reason}")


def _missing(model: PreTrainedModel, layout: Layout, origins: Mapping[str, Origin]) -> list[str]:
    """Tensors of the architecture that are in no file."""
    wanted, modules = model.state_dict(keep_vars=True), layout.modules
    expected = set(wanted) - {
        name if said.get("expert") else f"{name}.weight" for name, said in modules.items()
    }
    if any(said.get("expert") for said in modules.values()):
        expected -= {name.rpartition(".")[0] for name in modules}
    # A module that two others share has two names, and its tensors are stored under one.
    shared = {id(wanted[name]) for name in wanted.keys() & origins.keys()}
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "$^")
    return sorted(
        name
        for name in expected - set(origins) - set(model.all_tied_weights_keys)
        if id(wanted[name]) not in shared and not optional.search(name)
    )


def _shape_of(model: PreTrainedModel, layout: Layout, name: str, origin: Origin) -> torch.Size:
    """The shape of a model's tensor as it would be read, joined on the meta device if need be."""
    if origin.converter is None:
        return torch.Size(layout.tensors[origin.stored[0][0]].shape)
    return read_origin(model, functools.partial(_shell, layout), name, origin)[name].shape


def _shell(layout: Layout, name: str) -> Tensor:
    """A tensor of the stored shape without values."""
    return torch.empty(layout.tensors[name].shape, device="meta")


def unused_tensors(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Names of a dense checkpoint's stored tensors that no module of this model takes."""
    if layout.quantization is not None:
        return []
    origins = find_origins(model, layout.tensors)
    taken = [key for origin in origins.values() for key, _ in origin.stored]
    return contents.find_unused(model, layout.tensors, taken)


def find_blocks(model: PreTrainedModel) -> tuple[str, list[str]]:
    """The decoder's name in the model and the names of its blocks, in order.

    Raises:
        UnsupportedError: the decoder has no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder = decoder_of(model)
    if decoder is None or id(decoder) not in names:
        raise UnsupportedError(f"{type(model).__name__} has no decoder that spectool can find")
    lists = _block_lists(decoder, names)
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    best = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return names[id(decoder)], [names[id(block)] for block in best]


def _block_lists(decoder: nn.Module, names: Mapping[int, str]) -> list[nn.ModuleList]:
    """Lists of modules with matrices inside a decoder, but for those of other models in it."""
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


def _outside(
    name: str,
    parameter: str,
    kind: Literal["embedding", "lm_head"],
    module: nn.Linear | nn.Embedding,
    tied: str | None = None,
) -> Matrix:
    rows, width = module.weight.shape
    return Matrix(
        name=name, parameter=parameter, kind=kind, shape=(rows, width), transposed=False, tied=tied
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a `--skip` pattern means this name: a glob, or some of its dotted parts in order."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
