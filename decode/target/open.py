"""The choice of a target's implementation."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.base import Target
from spectool.decode.target.fit import is_recurrent
from spectool.decode.target.recurrent import RecurrentTarget


def open_target(
    model: PreTrainedModel, *, context: int | None = None, kv: str = "dense"
) -> Target[Any]:
    """Open a model as a `RecurrentTarget` if it has a recurrent state, else an `AttentionTarget`.

    Raises:
        UnsupportedError: an architecture that cannot be decoded correctly.
        UsageError: a context longer than the model's.
    """
    kind = RecurrentTarget if is_recurrent(model) else AttentionTarget
    return kind(model, context=context, kv=kv)
