"""Cutting of a checkpoint to its first layers, without a copy of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spectool.checkpoint.headers import COUNTS, find_extra_blocks
from spectool.checkpoint.tensors import Checkpoint
from spectool.errors import UnsupportedError
from spectool.model.meta import read_config


def count_layers(checkpoint: Checkpoint) -> int:
    """Return the number of decoder layers.

    Raises:
        UnsupportedError: the configuration does not give it.
    """
    found = _count_key(_text_config(checkpoint.layout.config))
    if found is None:
        raise UnsupportedError(f"{checkpoint.path}: config.json gives no number of layers")
    return int(_text_config(checkpoint.layout.config)[found])


def cut_layers(checkpoint: Checkpoint, count: int, **keys: Any) -> Checkpoint:
    """Return the checkpoint of the first `count` layers, the embedding, the final norm and lm_head.

    Its tensors are read from the files of the whole one. `keys` are added to its configuration.

    Raises:
        UnsupportedError: the configuration says of the first layers what depends on the later ones.
    """
    layout, layers = checkpoint.layout, count_layers(checkpoint)
    text = dict(_text_config(layout.config))
    text[str(_count_key(text))] = count
    for key, value in text.items():
        # One entry a layer: layer_types, mlp_layer_types, no_rope_layers, layers_block_type.
        of_layers = "layer" in key or key.endswith("_types")
        if of_layers and isinstance(value, list) and len(value) == layers:
            text[key] = value[:count]
    nested = layout.config.get("text_config")
    config = {**layout.config, **({"text_config": text} if nested else text), **keys}
    part = replace(layout, config=config, is_part=True)
    left_out = set(find_extra_blocks(part))
    tensors = {name: entry for name, entry in layout.tensors.items() if name not in left_out}
    cut = replace(checkpoint, layout=replace(part, tensors=tensors))
    whole, first = (read_config(each).get_text_config(decoder=True) for each in (checkpoint, cut))
    kinds = getattr(whole, "layer_types", None)
    if kinds is not None and getattr(first, "layer_types", None) != kinds[:count]:
        raise UnsupportedError(
            f"{checkpoint.path}: the kinds of its layers depend on their number; it cannot be cut"
        )
    return cut


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the text model."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text


def _count_key(text: Mapping[str, Any]) -> str | None:
    """Return the key of the number of layers; None without one."""
    return next((key for key in COUNTS if isinstance(text.get(key), int)), None)
