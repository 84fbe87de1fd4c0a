"""The choice of a target's implementation, of one model or of two."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import methods
from spectool.checkpoint.foreign import is_encoder_decoder
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.base import Target
from spectool.decode.target.encoder_decoder import EncoderDecoderTarget
from spectool.decode.target.fit import is_recurrent
from spectool.decode.target.recurrent import RecurrentTarget
from spectool.errors import UsageError
from spectool.model.loading import hash_vocabulary, load_model, load_tokenizer


def open_target(
    model: PreTrainedModel, *, context: int | None = None, kv: str = "dense"
) -> Target[Any]:
    """Open a model as the target that its architecture asks for.

    Raises:
        UnsupportedError: an architecture that cannot be decoded correctly.
        UsageError: a context longer than the model's.
    """
    kind: type[AttentionTarget | RecurrentTarget] = AttentionTarget
    if is_encoder_decoder(model.config):
        kind = EncoderDecoderTarget
    elif is_recurrent(model):
        kind = RecurrentTarget
    return kind(model, context=context, kv=kv)


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
    opened: Target[Any] = strategy(large, open_target(model, context=context, kv=large.kv), config)
    opened.notes += checkpoint.layout.notes
    return opened
