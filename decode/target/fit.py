"""The check that a model can verify trees of tokens.

Such a model has no layers but attention steered by mask, positions and cache. Others are refused by
name, with the reason.
"""

from __future__ import annotations

import inspect

from transformers import PreTrainedConfig, PreTrainedModel

from spectool.checkpoint.foreign import is_encoder_decoder
from spectool.decode.cache import cache_argument
from spectool.errors import UnsupportedError
from spectool.families import encoder_decoders, family
from spectool.model.causal import why_not_causal
from spectool.model.decoder import find_decoder

# Arguments that a forward must take besides a cache.
_NEEDED = ("position_ids", "attention_mask")


def check_fit(model: PreTrainedModel, *, seq2seq: bool = False) -> None:
    """Raise UnsupportedError unless tree passes can be correct with a model.

    `seq2seq`: it is to be an encoder-decoder; else none is accepted.
    """
    config = model.config.get_text_config(decoder=True)
    if is_recurrent(model):
        # Decoding such a model works nevertheless: see `recurrent.py`.
        raise UnsupportedError(
            f"{config.model_type} can neither be a draft model nor have heads trained for it: its "
            "recurrent state cannot go back to an earlier token"
        )
    if seq2seq and config.model_type in encoder_decoders():
        if type(model).__module__.startswith("transformers."):
            return
        raise cannot_decode(config, "its positions are known in transformers' own code alone")
    if (reason := _why_unfit(model, config)) is not None:
        raise cannot_decode(config, reason)


def _why_unfit(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """Explain why tree passes cannot be correct; None if they can."""
    accepted = inspect.signature(model.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if is_encoder_decoder(model.config):
        return f"it is an encoder-decoder, and known are those of {', '.join(encoder_decoders())}"
    modules = (find_decoder(model) or model).modules()
    if (reason := why_not_causal(config, modules)) is not None:
        return f"it is no causal model: {reason}"
    if (reason := family(config).no_trees) is not None:
        return reason
    if getattr(config, "alibi", False):
        return "its ALiBi biases are derived from a 2-D mask"
    if cache_argument(accepted) is None or not all(key in accepted for key in _NEEDED):
        return f"its forward takes no cache, {_NEEDED[0]} or {_NEEDED[1]}"
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        return f"its {', '.join(sorted(unknown))} layers are not known"
    if getattr(config, "attention_chunk_size", None):
        return "its chunked attention is not known"
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int | None):
        return f"its sliding_window is {window!r}, expected a whole number"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share their keys and values"
    if not hasattr(config, "num_hidden_layers"):
        return "its configuration gives no number of layers"
    return None


def cannot_decode(config: PreTrainedConfig, reason: str) -> UnsupportedError:
    """Make the error for a model that cannot be decoded at all."""
    return UnsupportedError(f"{config.model_type} cannot be decoded by spectool: {reason}")


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether a layer has a state that cannot go back to an earlier token."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = {"linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding"}
    return bool(model._is_stateful or kinds & recurrent)
