"""Mapping from a model's tensors to the stored tensors they come from, as in transformers.

Resolves an architecture's renamings and conversions, an optional base model's prefix, tensors that
are stored twice, and tied matrices that are stored under either name or both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from spectool.checkpoint import contents
from spectool.checkpoint.headers import Layout
from spectool.checkpoint.tensors import Checkpoint, same_values
from spectool.errors import wrap_errors
from spectool.model.causal import check_causal
from spectool.model.meta import build_meta

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of a model's tensor: the stored names, each with the converter's pattern that it
    matches, and the converter that merges them (None: stored as it is)."""

    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    @classmethod
    def of(cls, key: str) -> Origin:
        """Make the origin of a tensor that is stored under this name as it is."""
        return cls(((key, key),), None)


def find_origins(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Origin]:
    """Find the origin of every tensor of the model that is stored.

    If several stored names map to one tensor, the first in the order of names counts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name in wanted:
            parts.setdefault(name, []).append((key, pattern))
    origins: dict[str, Origin] = {}
    for name, sources in parts.items():
        first, pattern = sources[0]
        if pattern is None:
            origins[name] = Origin.of(first)
            continue
        converter = by_pattern[pattern]
        merged = tuple((key, matched) for key, matched in sources if matched is not None)
        for target in _list_targets(name, converter):
            origins[target] = Origin(merged, converter)
    return origins


def resolve_ties(
    origins: dict[str, Origin], ties: dict[str, str], equal: Callable[[Origin, Origin], bool]
) -> bool:
    """Give tied tensors one origin, as transformers does; changes `origins` and `ties` in place.

    `ties` maps a target to the source whose values it shares. Returns whether any pair is stored
    with different values, and so is not tied.
    """
    untied = False
    for target, source in list(ties.items()):
        if target not in origins:
            continue
        if source not in origins:
            # Only the target is stored: it is the source's origin.
            origins[source] = origins.pop(target)
        elif equal(origins[target], origins[source]):
            del origins[target]
        else:
            del ties[target]
            untied = True
    return untied


def read_origin(model: PreTrainedModel, read: Read, name: str, origin: Origin) -> dict[str, Tensor]:
    """Read the model's tensor `name`, and the other tensors that its converter makes with it.

    `read` reads one stored tensor. Stored dtypes are kept.
    """
    if origin.converter is None:
        return {name: read(origin.stored[0][0])}
    converter = copy.deepcopy(origin.converter)
    first = name
    for target_pattern in origin.converter.target_patterns:
        if target_pattern in name:
            first = name.replace(target_pattern, origin.converter.target_patterns[0])
    for key, pattern in origin.stored:
        # Annotated as futures, but tensors are accepted as well.
        converter.add_tensor(first, key, pattern, read(key))  # type: ignore[arg-type]
    made = converter.convert(first, model=model, config=model.config)
    return {
        key: (value[0] if isinstance(value, list) else value).contiguous()
        for key, value in made.items()
    }


def _list_targets(first: str, converter: WeightConverter) -> list[str]:
    """List the names of all tensors that a converter makes, given that of the first."""
    first_pattern = converter.target_patterns[0]
    return [first.replace(first_pattern, pattern) for pattern in converter.target_patterns]


def resolve_tensors(
    checkpoint: Checkpoint, config: PreTrainedConfig, *, compare: bool = False
) -> tuple[PreTrainedModel, dict[str, Origin], bool]:
    """Build the meta model of a dense or packed checkpoint and resolve its tensors' origins.

    Returns the model, the origin of each stored tensor, and whether matrices that the configuration
    ties are stored with different values; that is tested with `compare` only, which reads them.
    """
    layout = checkpoint.layout

    def equal(first: Origin, second: Origin) -> bool:
        entries = [layout.tensors[origin.stored[0][0]] for origin in (first, second)]
        return not compare or same_values(*entries)

    # Every check comes before anything of the model's size is allocated.
    with contents.limit_parameters(layout):
        model = build_meta(
            config,
            trust_remote_code=checkpoint.trust_remote_code,
            seq2seq=checkpoint.seq2seq,
        )
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

    def read(key: str) -> Tensor:
        return torch.empty(layout.tensors[key].shape, device="meta")

    return read_origin(model, read, name, origin)[name].shape


def unused_tensors(model: PreTrainedModel, layout: Layout) -> list[str]:
    """List a dense checkpoint's stored tensors that no module of this model takes."""
    if layout.quantization is not None:
        return []
    origins = find_origins(model, layout.tensors)
    taken = [key for origin in origins.values() for key, _ in origin.stored]
    return contents.find_unused(model, layout.tensors, taken)
