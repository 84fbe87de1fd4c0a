"""Mapping from a model's tensors to the stored tensors they come from, as in transformers.

Resolves an architecture's renamings and conversions, an optional base model's prefix, tensors that
are stored twice, and tied matrices that are stored under either name or both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

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
    origins: dict[str, Origin],
    ties: dict[str, str],
    equal: Callable[[Origin, Origin], bool],
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
