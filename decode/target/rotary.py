"""Rotary positions whose frequencies depend on the length of the text.

- longrope has two sets of factors, for texts up to the original context and for longer ones.
- dynamic frequencies change with every token beyond it, which would make cached keys wrong: the
  context ends there.

Suffixes: B batch, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from spectool.errors import UsageError

# The context of models that know no longest one.
_UNBOUNDED = 1 << 20


@contextmanager
def use_long_factors(
    rotaries: Sequence[nn.Module], original: int | None, context: int
) -> Iterator[None]:
    """Use the long factors during one pass, if the text's context goes beyond the original one.

    transformers chooses the factors by the largest position of a pass: one such position is added.
    """
    with ExitStack() as hooks:
        if original is not None and context > original:
            before = _append_hook(original)
            for module in rotaries:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(_drop_last))
        yield


def choose_context(config: PreTrainedConfig, asked: int | None) -> int:
    """Return the context asked for, else the model's.

    Raises:
        UsageError: it is longer than the model's positions are correct for.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return asked if asked is not None else _UNBOUNDED
    limit = min([limit, *_list_original_contexts(config, "dynamic")])
    if asked is not None and asked > limit:
        raise UsageError(
            f"--context {asked}: {config.model_type} holds at most {limit} tokens",
            hint=explain_context(config),
        )
    return asked if asked is not None else limit


def _list_original_contexts(config: PreTrainedConfig, kind: str) -> list[int]:
    """Return the original contexts of rotary embeddings of this kind."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    default = getattr(config, "original_max_position_embeddings", None)
    found = [
        part.get("original_max_position_embeddings") or default
        for part in [rope, *nested]
        if part.get("rope_type") == kind
    ]
    return [length for length in found if isinstance(length, int) and length > 0]


def find_original_context(config: PreTrainedConfig) -> int | None:
    """Return the context up to which longrope uses the short factors; None without longrope."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    originals = _list_original_contexts(config, "longrope")
    return min(originals) if originals and limit and min(originals) < limit else None


def explain_context(config: PreTrainedConfig) -> str | None:
    """Explain why the context is shorter than the model's own; None if it is not."""
    if not _list_original_contexts(config, "dynamic"):
        return None
    return (
        "the dynamic rotary frequencies change with every token beyond that, which makes cached "
        "keys wrong"
    )


def list_longrope_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute longrope positions."""
    kinds = [(module, getattr(module, "rope_type", None)) for module in model.modules()]
    return [
        module
        for module, kind in kinds
        if kind == "longrope" or (isinstance(kind, dict) and "longrope" in kind.values())
    ]


def _append_hook(position: int) -> Any:
    """Make a pre-hook that appends this position to those of a rotary embedding."""

    def append(ids_BN: Tensor) -> Tensor:
        return torch.cat([ids_BN, ids_BN.new_full((*ids_BN.shape[:-1], 1), position)], -1)

    def hook(module: nn.Module, inputs: Any, options: Any) -> Any:
        if "position_ids" in options:
            return inputs, {**options, "position_ids": append(options["position_ids"])}
        return (inputs[0], append(inputs[1]), *inputs[2:]), options

    return hook


def _drop_last(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> Any:
    """Drop the appended position from a rotary embedding's output."""
    return tuple(part[..., :-1, :] for part in output)
