"""Which stored tensors each tensor of a model comes from, exactly as transformers reads them.

The one place where names are resolved: renamings and conversions of an architecture, a base
model's prefix that is there or not, the same tensor stored twice, matrices that are tied and
stored under one name, the other, or both.
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
    """Where a model's tensor comes from: the stored names, and the converter that joins them."""

    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    @classmethod
    def of(cls, key: str) -> Origin:
        """The tensor stored under this name, as it is."""
        return cls(((key, key),), None)


def find_origins(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Origin]:
    """For every tensor of the model that is stored, the stored tensors it comes from.

    Of two stored tensors that mean the same one, the first in the order of names counts.
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
    for name, found in parts.items():
        first, pattern = found[0]
        if pattern is None:
            origins[name] = Origin.of(first)
            continue
        converter = by_pattern[pattern]
        joined = tuple((key, each) for key, each in found if each is not None)
        for target in _targets(name, converter):
            origins[target] = Origin(joined, converter)
    return origins


def resolve_ties(
    origins: dict[str, Origin],
    ties: dict[str, str],
    equal: Callable[[Origin, Origin], bool],
) -> bool:
    """Let tied tensors have one origin, as transformers does, changing `origins` and `ties`.

    `ties` maps a tensor to the one whose values it shares. Where only the former is stored, it is
    the latter's origin; where both are and `equal` says so, the latter counts; where they differ
    they are not tied. Returns whether that was so for any.
    """
    untied = False
    for target, source in list(ties.items()):
        if target not in origins:
            continue
        if source not in origins:
            origins[source] = origins.pop(target)
        elif equal(origins[target], origins[source]):
            del origins[target]
        else:
            del ties[target]
            untied = True
    return untied


def read_origin(model: PreTrainedModel, read: Read, name: str, origin: Origin) -> dict[str, Tensor]:
    """The model's tensor `name`, and what its converter makes beside it; `read` gets a stored one.

    Tensors keep their stored dtype.
    """
    if origin.converter is None:
        return {name: read(origin.stored[0][0])}
    converter = copy.deepcopy(origin.converter)
    first = name
    for own in origin.converter.target_patterns:
        if own in name:
            first = name.replace(own, origin.converter.target_patterns[0])
    for key, pattern in origin.stored:
        # transformers annotates futures but takes tensors as well.
        converter.add_tensor(first, key, pattern, read(key))  # type: ignore[arg-type]
    made = converter.convert(first, model=model, config=model.config)
    return {
        key: (value[0] if isinstance(value, list) else value).contiguous()
        for key, value in made.items()
    }


def _targets(first: str, converter: WeightConverter) -> list[str]:
    """All names that a converter makes, given the first: it may split one tensor into several."""
    head = converter.target_patterns[0]
    return [first.replace(head, pattern) for pattern in converter.target_patterns]
