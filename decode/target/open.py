"""The choice of a target's implementation, of one model or of two."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import methods
from spectool.checkpoint.foreign import is_encoder_decoder
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.options import FORWARDS
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.base import Target
from spectool.decode.target.encoder_decoder import EncoderDecoderTarget
from spectool.decode.target.fit import is_recurrent
from spectool.decode.target.recurrent import RecurrentTarget
from spectool.errors import UnsupportedError, UsageError
from spectool.model.loading import hash_vocabulary, load_model, load_tokenizer


def open_target(
    model: PreTrainedModel,
    *,
    context: int | None = None,
    kv: str = "dense",
    forward: str = "auto",
) -> Target[Any]:
    """Open a model as the target that its architecture asks for.

    `forward`: how its decoder layers run, `fused`, `modules` or `auto` (`fused.py`). Layers of a
    model that is opened several times run as the last target asks.

    Raises:
        UnsupportedError: an architecture that cannot be decoded correctly, or layers that cannot
            all be fused if that is wanted.
        UsageError: a context longer than the model's.
    """
    if forward not in FORWARDS:
        raise UsageError(f"forward {forward}: expected one of {', '.join(FORWARDS)}")
    target: Target[Any]
    if is_encoder_decoder(model.config):
        target = EncoderDecoderTarget(model, context=context, kv=kv)
    elif is_recurrent(model):
        target = RecurrentTarget(model, context=context, kv=kv)
    else:
        target = AttentionTarget(model, context=context, kv=kv, forward=forward)
    if forward == "fused" and target.num_fused < target.num_layers:
        kept = ", ".join(target.unfused) or "an architecture that has no steps"
        raise UnsupportedError(
            f"--forward fused: {target.num_layers - target.num_fused} of {target.num_layers} "
            f"layers keep their modules ({kept})",
            hint="--forward auto fuses those that it can",
        )
    return target


def open_strategy(
    text: str,
    large: Target[Any],
    small: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
    activations: str = "auto",
    checksums: bool = True,
) -> Target[Any]:
    """Open a strategy, `NAME:key=value,...`, of a model and a smaller checkpoint.

    The smaller one is loaded with the dtype, the device and the kind of cache of the model.
    `tokenizer` is the model's; `context` and `activations` (`spectool.load`) those that were asked
    for.

    Raises:
        InputError: a wrong strategy, another tokenizer, a checkpoint that cannot be decoded.
    """
    if large.start_ids:
        raise UsageError(f"--strategy {text} is not for {large.name}, an encoder-decoder")
    name, _, pairs = text.partition(":")
    strategy = methods.import_method(name, "strategy")
    config = strategy.Config.from_text(pairs)
    checkpoint = open_checkpoint(small, checksums=checksums)
    if hash_vocabulary(load_tokenizer(checkpoint)) != hash_vocabulary(tokenizer):
        raise UsageError(
            f"--small {small}: its tokenizer is not the large model's, so neither model could read "
            "what the other one writes"
        )
    model = load_model(
        checkpoint, dtype=large.dtype, device=str(large.device), activations=activations
    )
    opened: Target[Any] = strategy(
        large, open_target(model, context=context, kv=large.kv, forward=large.forward), config
    )
    opened.notes += checkpoint.layout.notes
    return opened
