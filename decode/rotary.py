"""Rotary positions whose frequencies depend on how long a text is.

- longrope has two sets of factors, for texts up to the original context and for longer ones.
- dynamic frequencies change with every token beyond it, so what is cached would be wrong: texts end
  there.

Suffixes: B batch, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


@contextmanager
def long_factors(
    rotaries: Sequence[nn.Module], original: int | None, context: int
) -> Iterator[None]:
    """During one pass of a text whose context goes beyond the original one, the long factors.

    transformers chooses them by the largest position of a pass: one more is added.
    """
    if original is None or context <= original:
        yield
        return
    before = _beside_position(original)
    handles: list[Any] = []
    for module in rotaries:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(_without_last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's positions are right for, if it says."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    originals = _originals(config, "dynamic")
    return min([limit, *originals]) if limit else limit


def _originals(config: PreTrainedConfig, kind: str) -> list[int]:
    """The original contexts of rotary embeddings of this kind, which change beyond it."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    own = getattr(config, "original_max_position_embeddings", None)
    found = [
        part.get("original_max_position_embeddings") or own
        for part in [rope, *nested]
        if part.get("rope_type") == kind
    ]
    return [length for length in found if isinstance(length, int) and length > 0]


def two_ranges(config: PreTrainedConfig) -> int | None:
    """The tokens up to which a model with two sets of rotary factors takes the short ones."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    originals = _originals(config, "longrope")
    return min(originals) if originals and limit and min(originals) < limit else None


def bound_by(config: PreTrainedConfig) -> str | None:
    """Why the context is shorter than the model's own, if so."""
    if not _originals(config, "dynamic"):
        return None
    return (
        "beyond that its dynamic rotary frequencies change with every further token, and with "
        "them all keys that are cached"
    )


def longropes(model: nn.Module) -> list[nn.Module]:
    """The modules that make positions with two sets of factors."""
    kinds = [(module, getattr(module, "rope_type", None)) for module in model.modules()]
    return [
        module
        for module, kind in kinds
        if kind == "longrope" or (isinstance(kind, dict) and "longrope" in kind.values())
    ]


def _beside_position(position: int) -> Any:
    """A hook that adds this position to those that a rotary embedding is asked for."""

    def further(ids_BN: Tensor) -> Tensor:
        return torch.cat([ids_BN, ids_BN.new_full((*ids_BN.shape[:-1], 1), position)], -1)

    def hook(module: nn.Module, inputs: Any, options: Any) -> Any:
        if "position_ids" in options:
            return inputs, {**options, "position_ids": further(options["position_ids"])}
        return (inputs[0], further(inputs[1]), *inputs[2:]), options

    return hook


def _without_last(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> Any:
    return tuple(part[..., :-1, :] for part in output)
