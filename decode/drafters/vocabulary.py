"""Comparison of a draft model's vocabulary with its target's."""

from __future__ import annotations

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.decode.target.base import Target
from spectool.errors import UnsupportedError

# Models of one family pad lm_head to different multiples. Without tokenizers to compare, a larger
# difference than this means another vocabulary (the bound that llama.cpp uses).
_PADDING = 128


def check_vocabulary(
    draft: Target[Any],
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Check that ids mean the same in both models; their lm_heads may be padded differently.

    Raises:
        UnsupportedError: they do not.
    """
    if tokenizer is None or target_tokenizer is None:
        if abs(draft.vocab_size - target.vocab_size) > _PADDING:
            raise UnsupportedError(
                f"the draft model has {draft.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model must share the target's tokenizer"
            )
        return
    draft_vocab, target_vocab = tokenizer.get_vocab(), target_tokenizer.get_vocab()
    if draft_vocab != target_vocab:
        differing = {token for token, _ in draft_vocab.items() ^ target_vocab.items()}
        token = min(differing)
        raise UnsupportedError(
            f"the draft model's tokenizer is not the target's: {len(differing)} tokens differ, "
            f"{token!r} has id {draft_vocab.get(token)} in it and {target_vocab.get(token)} in the "
            "target's"
        )
    # Tokens may have been added to both tokenizers but to the target's embedding alone.
    highest = min(max(draft_vocab.values()) + 1, target.num_tokens)
    if draft.num_tokens < highest:
        raise UnsupportedError(
            f"the draft model has {draft.num_tokens} tokens, the target's texts have ids up to "
            f"{highest - 1}"
        )
