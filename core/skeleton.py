"""A checkpoint's architecture without its weights: blocks, linears, and how names map.

The model is built on the meta device from its configuration, so any size fits. Nothing here is
written per architecture: the decoder's longest homogeneous list of modules is the list of blocks,
and inside a block every linear layer, transposed Conv1D and fused 3-D expert tensor is a site that
can be packed.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from spectool import contents, given
from spectool.checkpoint import Checkpoint, read_tensor
from spectool.dtypes import with_plain_dtypes
from spectool.errors import UnsupportedError, opening
from spectool.headers import Layout, read_json
from spectool.packed import PackedExperts, field_specs, swap_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight matrix that a quantizer may pack.

    `name` is the module's, or `<parameter>.<expert>` for a slice of a fused expert tensor;
    `parameter` the tensor that holds it. `shape` is (outputs, inputs) however it is stored. An
    embedding may be `tied` to the output matrix of this name.
    """

    name: str
    parameter: str
    kind: Literal["linear", "conv1d", "expert", "embedding", "head"]
    shape: tuple[int, int]
    transposed: bool
    expert: int | None = None
    tied: str | None = None

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def weight_nm(self, tensors: dict[str, Tensor]) -> Tensor:
        """The matrix [outputs, inputs] out of the block's tensors; a view where possible."""
        weight = tensors[self.parameter]
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self.transposed else weight


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model's tensor comes from: the stored names, and the converter that joins them."""

    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None


class Skeleton:
    """The meta model of a checkpoint, dense or packed, with the names of its blocks and sites.

    Raises:
        UnsupportedError: an unknown or unsuitable architecture, or packed by another tool.
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """

    def __init__(self, layout: Layout, *, trust_remote_code: bool = False) -> None:
        self.layout = layout
        self.config = read_config(layout.path, trust_remote_code=trust_remote_code)
        if layout.quantization is not None and not layout.is_packed:
            by = layout.quantization.get("quant_method", "an unnamed method")
            raise UnsupportedError(f"{layout.path}: is quantized by {by}, not by spectool")
        self.modules = layout.modules
        self.model, self.origins = resolve(layout, self.config, trust_remote_code=trust_remote_code)
        self.decoder_name, self.blocks = find_blocks(self.model)

    @property
    def unused(self) -> list[str]:
        """Names of the stored tensors that no module takes."""
        return unused_tensors(self.model, self.layout)

    def sites(self, block: str) -> list[Site]:
        """The packable matrices of a block, in the order of its modules."""
        return list(find_sites(self.model.get_submodule(block), block))

    def outside(self, *, own_head: bool = False) -> list[Site]:
        """The embedding and the output matrix: one site if they are tied, unless the output gets
        a matrix of its own."""
        names = {id(module): name for name, module in self.model.named_modules()}
        table: Any = self.model.get_input_embeddings()
        output: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        head = names.get(id(output), "")
        tied = f"{head}.weight" in self.model.all_tied_weights_keys
        found, name = [], names.get(id(table), "")
        if isinstance(table, nn.Embedding):
            shared = head if tied and not own_head else None
            found.append(_outside(name, f"{name}.weight", "embedding", table, shared))
        if isinstance(output, nn.Linear) and (own_head or not tied):
            found.append(_outside(head, f"{name if tied else head}.weight", "head", output))
        return found

    def holding(self, site: Site) -> set[str]:
        """Names of the stored tensors that a site's codes take the place of."""
        if site.kind == "head":
            # A tied matrix stays: it is the embedding's.
            return {f"{site.name}.weight"} & self.origins.keys()
        names = {site.parameter}
        if site.tied is not None:
            # Some checkpoints store both.
            names |= {f"{site.name}.weight", f"{site.tied}.weight"}
        return names & self.origins.keys()

    def tensors_of(self, block: str) -> list[str]:
        """Names of the block's tensors that are stored."""
        return [name for name in self.origins if name.startswith(block + ".")]

    def tensors_outside(self) -> list[str]:
        """Names of the stored tensors that belong to no block: embeddings, norms, head, towers."""
        prefixes = tuple(block + "." for block in self.blocks)
        return [name for name in self.origins if not name.startswith(prefixes)]

    def read(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors in their stored dtypes, merged as the architecture wants them."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:
                get = functools.partial(_stored, checkpoint.layout)
                found.update(_realise(self.model, get, name, self.origins[name]))
        return found

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
        module = copy.deepcopy(self.model.get_submodule(name))
        prefix = f"{name}." if name else ""
        for path, owner in module.named_modules(prefix=name):
            plain = owner._non_persistent_buffers_set & {
                key for key, value in owner._buffers.items() if value is not None and value.is_meta
            }
            if plain:
                for key in plain:
                    owner._buffers[key] = torch.empty_like(owner._buffers[key], device="cpu")
                initialise: Any = self._owner(path)._init_weights
                initialise(owner)
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
            key: tensors[prefix + key] for key in module.state_dict() if prefix + key in tensors
        }
        module.load_state_dict(state, strict=False, assign=True)
        for part in module.modules():
            if isinstance(part, PackedExperts):
                part.like = torch.zeros(0, dtype=dtype)
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    value = parameter.detach()
                    value = value.to(dtype) if value.is_floating_point() else value
                    owner._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)
            for key, buffer in owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    owner._buffers[key] = buffer.to(device)
        if isinstance(module, PreTrainedModel):
            # What is packed has other ties than the architecture says.
            module.tie_weights(recompute_mapping=False)
        return module.eval()

    def _owner(self, name: str) -> PreTrainedModel:
        """The innermost model that holds the module: it knows how its buffers are made."""
        while True:
            module = self.model.get_submodule(name)
            if isinstance(module, PreTrainedModel):
                return module
            name = name.rpartition(".")[0]


def read_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UnsupportedError: transformers does not know the model type.
        CheckpointError: the configuration contradicts itself.
    """
    said = read_json(path / "config.json")
    given.check_config(path, said)
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


# Configurations with a flag that their models do not read: these are decoders always.
_DECODERS = ("gpt_neox", "gpt_neox_japanese", "trocr", "evolla")


def no_decoder(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration is no causal decoder, if so."""
    if given.is_encoder_decoder(config):
        return given.ENCODER_DECODER
    flagged = getattr(config, "is_decoder", True) is False and config.model_type not in _DECODERS
    if flagged or getattr(config, "causal", True) is False:
        return "an encoder here: each token sees those after it; spectool handles causal models"
    return None


def model_class(config: PreTrainedConfig) -> Any:
    """The auto class that opens this configuration: a causal model, else a multimodal wrapper.

    Raises:
        UnsupportedError: neither knows it, or it is no causal decoder.
    """
    if (reason := no_decoder(config)) is not None:
        raise UnsupportedError(f"{config.model_type} is {reason}")
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    raise UnsupportedError(f"{config.model_type}: transformers has no causal model for it")


def build_meta(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The whole model on the meta device, in eval mode.

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
            model: PreTrainedModel = kind.from_config(dense, trust_remote_code=trust_remote_code)
        # Fused expert kernels hide which expert saw which token; the plain loop shows it.
        model.set_experts_implementation("eager")
    model.train(False)
    return model


def resolve(
    layout: Layout, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, Origin]]:
    """The meta model of a dense or packed checkpoint, and where each of its tensors comes from.

    Raises:
        CheckpointError: tensors of the architecture are in no file, or have another shape.
    """
    with contents.bounded(layout):
        model = build_meta(config, trust_remote_code=trust_remote_code)
    with opening(layout.path, "its tensors do not fit its configuration"):
        wanted = model.state_dict()
        if layout.is_packed:
            origins = {name: Origin(((name, name),), None) for name in layout.tensors}
        else:
            origins = _origins(model, layout.tensors)
        modules = layout.modules
        expected = set(wanted) - {
            name if said.get("expert") else f"{name}.weight" for name, said in modules.items()
        }
        if any(said.get("expert") for said in modules.values()):
            expected -= {name.rpartition(".")[0] for name in modules}
        tied = set(model.all_tied_weights_keys)
        contents.check_missing(model, layout, sorted(expected - set(origins) - tied))
        for name in sorted(wanted.keys() & origins.keys()):
            shape = _shape_of(model, layout, name, origins[name])
            contents.check_shape(layout, name, shape, wanted[name].shape)
        contents.check_tables(model, layout)
    return model, origins


def _shape_of(model: PreTrainedModel, layout: Layout, name: str, origin: Origin) -> torch.Size:
    """The shape of a model's tensor as it would be read, joined on the meta device if need be."""
    if origin.converter is None:
        return torch.Size(layout.tensors[origin.stored[0][0]].shape)
    return _realise(model, functools.partial(_shell, layout), name, origin)[name].shape


def unused_tensors(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Names of a dense checkpoint's stored tensors that no module of this model takes."""
    if layout.quantization is not None:
        return []
    origins = _origins(model, layout.tensors)
    taken = [key for origin in origins.values() for key, _ in origin.stored]
    return contents.left_over(model, layout.tensors, taken)


def find_blocks(model: PreTrainedModel) -> tuple[str, list[str]]:
    """The decoder's name in the model and the names of its blocks, in order.

    Raises:
        UnsupportedError: the decoder has no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder: nn.Module | None = model.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is None or id(decoder) not in names:
        raise UnsupportedError(f"{type(model).__name__} has no decoder that spectool can find")
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(find_sites(module[0], ""))
        and all(id(child) in names for child in module)
    ]
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    best = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return names[id(decoder)], [names[id(block)] for block in best]


def find_sites(block: nn.Module, prefix: str) -> Iterator[Site]:
    """The packable matrices inside a module whose full name is `prefix`."""
    for path, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            n, m = module.weight.shape
            yield Site(
                name=path, parameter=f"{path}.weight", kind="linear", shape=(n, m), transposed=False
            )
        elif isinstance(module, Conv1D):
            m, n = module.weight.shape
            yield Site(
                name=path, parameter=f"{path}.weight", kind="conv1d", shape=(n, m), transposed=True
            )
        elif hasattr(module, "is_transposed"):
            # transformers marks fused experts with its experts decorator.
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim != 3:
                    continue
                num_experts, n, m = weight.shape
                if module.is_transposed:
                    n, m = m, n
                for expert in range(num_experts):
                    yield Site(
                        name=f"{path}.{key}.{expert}",
                        parameter=f"{path}.{key}",
                        kind="expert",
                        shape=(n, m),
                        transposed=bool(module.is_transposed),
                        expert=expert,
                    )


def _outside(
    name: str,
    parameter: str,
    kind: Literal["embedding", "head"],
    module: nn.Linear | nn.Embedding,
    tied: str | None = None,
) -> Site:
    rows, width = module.weight.shape
    return Site(
        name=name, parameter=parameter, kind=kind, shape=(rows, width), transposed=False, tied=tied
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a `--skip` pattern means this name: a glob, or some of its dotted parts in order."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _origins(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Origin]:
    """For every tensor of the model, the stored tensors it comes from."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted = model.state_dict()
    joined: dict[str, list[tuple[str, str]]] = {}
    origins: dict[str, Origin] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted:
            continue
        if pattern is None:
            origins[name] = Origin(((key, key),), None)
        else:
            joined.setdefault(name, []).append((key, pattern))
    for name, parts in joined.items():
        converter = by_pattern[parts[0][1]]
        for target in _targets(name, converter):
            origins[target] = Origin(tuple(parts), converter)
    return origins


def _targets(first: str, converter: WeightConverter) -> list[str]:
    """All names that a converter makes, given the first: it may split one tensor into several."""
    head = converter.target_patterns[0]
    return [first.replace(head, pattern) for pattern in converter.target_patterns]


def _stored(layout: Layout, name: str) -> Tensor:
    return read_tensor(layout.tensors[name])


def _shell(layout: Layout, name: str) -> Tensor:
    """A tensor of the stored shape without values."""
    return torch.empty(layout.tensors[name].shape, device="meta")


def _realise(
    model: PreTrainedModel, get: Callable[[str], Tensor], name: str, origin: Origin
) -> dict[str, Tensor]:
    read = {key: get(key) for key, _ in origin.stored}
    if origin.converter is None:
        (tensor,) = read.values()
        return {name: tensor}
    converter = copy.deepcopy(origin.converter)
    first = name
    for own in origin.converter.target_patterns:
        if own in name:
            first = name.replace(own, origin.converter.target_patterns[0])
    for key, pattern in origin.stored:
        # transformers annotates futures but takes tensors as well.
        converter.add_tensor(first, key, pattern, read.pop(key))  # type: ignore[arg-type]
    made = converter.convert(first, model=model, config=model.config)
    return {
        key: (value[0] if isinstance(value, list) else value).contiguous()
        for key, value in made.items()
    }
