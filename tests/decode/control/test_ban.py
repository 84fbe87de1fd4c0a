"""A banned text is never completed, wherever tokens begin and end, and nothing else is lost."""

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from spectool.decode.control.ban import BannedText, Vocabulary, token_bytes
from spectool.errors import UsageError

from ...conftest import SHARED, tokenizer

TOKENS = [b"a", b"b", b"ab", b"ba", b"", b"aab", "é".encode(), "é".encode()[:1], "é".encode()[1:]]


@pytest.mark.parametrize("text", ["a", "ab", "aab", "abab", "aaa", "é", "aéb", "baba"])
@pytest.mark.parametrize("prompt", [[], [0], [2, 0], [7], [5, 5]])
def test_exactly_the_tokens_that_complete_it_are_excluded(text: str, prompt: list[int]) -> None:
    """Every text of up to three tokens, against a search in its bytes."""
    control = BannedText(text, Vocabulary(TOKENS))
    start = b"".join(TOKENS[token] for token in prompt)

    def occurs(tokens: tuple[int, ...]) -> int:
        whole = start + b"".join(TOKENS[token] for token in tokens)
        return sum(whole.startswith(text.encode(), at) for at in range(len(whole)))

    for length in range(3):
        for tokens in itertools.product(range(len(TOKENS)), repeat=length):
            state: Any = control.start(prompt)
            for token in tokens:
                state = control.advance(state, token)
            logits = control.process(state, torch.zeros(len(TOKENS) + 2))
            excluded = [bool(logits[token] == -torch.inf) for token in range(len(TOKENS))]
            before = occurs(tokens)
            assert excluded == [occurs((*tokens, token)) > before for token in range(len(TOKENS))]
            assert (logits[len(TOKENS) :] == 0).all(), "ids that the tokenizer does not have"


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(UsageError, match="must not be empty"):
        BannedText("", Vocabulary(TOKENS))


TEXTS = ['One day, Lily said: "No!"\n\nThen 12 birds   flew.', "naïve café 日本 🙂\tx", "\n a"]


@pytest.mark.skipif(not SHARED.exists(), reason="real tokenizers are not here")
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char-a", "codestory-10M"])
def test_bytes_of_real_tokenizers_add_up_to_the_text(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    known = token_bytes(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # After a first token, whose leading space some decoders strip.
        first = tokenizer("x", add_special_tokens=False)["input_ids"]
        whole = tokenizer.decode([*first, *ids], skip_special_tokens=True)
        before = tokenizer.decode(first, skip_special_tokens=True)
        assert b"".join(known[i] for i in ids).decode() == whole.removeprefix(before)


def test_bytes_of_the_byte_level_tokenizer() -> None:
    made = tokenizer()
    known = token_bytes(made)
    for text in TEXTS:
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert b"".join(known[i] for i in ids).decode() == made.decode(ids)
    assert all(known[i] == b"" for i in made.all_special_ids)
