"""From prompts to token ids, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.data.text import check_ids
from spectool.decode.target.base import Target
from spectool.errors import CheckpointError, UsageError


def encode(prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return a prompt's token ids; an empty text becomes the start token, if there is one.

    Raises:
        UsageError: a text has no tokenizer.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise UsageError("a prompt of text needs a tokenizer; give token ids")
    tokens: list[int] = list(tokenizer(prompt)["input_ids"])
    if not tokens and tokenizer.bos_token_id is not None:
        tokens = [tokenizer.bos_token_id]
    return tokens


def encode_checked(
    prompt: str | Sequence[int],
    number: int,
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[int]:
    """Return the token ids of the prompt of this number, which the target can read.

    Raises:
        UsageError: there are none, or more than the context holds, or a text has no tokenizer.
        CheckpointError: an id that the model does not have.
    """
    tokens = encode(prompt, tokenizer)
    if not tokens:
        raise UsageError(f"prompt {number} is empty and the model has no start token")
    if len(tokens) > target.context:
        raise UsageError(
            f"prompt {number} has {len(tokens)} tokens; the context holds {target.context}",
            hint=target.context_reason,
        )
    origin, vocab_size = f"prompt {number}", 0 if tokenizer is None else len(tokenizer)
    if isinstance(prompt, str) or 0 <= min(tokens) <= max(tokens) < vocab_size:
        origin = f"{target.model.config._name_or_path or target.name}: its tokenizer"
    check_ids(tokens, target.num_tokens, origin)
    return tokens


def list_end_ids(target: Target[Any], tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Return the end-of-text ids of the generation configuration, else the tokenizer's.

    Raises:
        CheckpointError: eos_token_id is neither an id nor a list of ids.
    """
    for source in (target.model.generation_config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            ids = found if isinstance(found, (list, tuple)) else [found]
            if not all(type(each) is int for each in ids):
                raise CheckpointError(
                    f"{target.model.config._name_or_path}: generation_config.json: "
                    f"eos_token_id is {found!r}, expected an id or a list of ids"
                )
            return frozenset(ids)
    return frozenset()
