"""Texts that an output never completes, wherever tokens begin and end.

Each text is an automaton over the bytes of its UTF-8 form (Knuth, Morris and Pratt, 1977); a token
is excluded if its bytes reach the automaton's end. A text that the prompt began may not be
completed either. Suffix: V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.decode.control.base import Control
from spectool.errors import UsageError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Stands after the last byte of a token that is shorter than the longest.
_NO_BYTE = 256


class BannedText(Control[int]):
    """Excludes tokens that would complete `text`. The state is how many of its bytes stand there.

    `vocabulary` holds the bytes of the tokens; texts of one tokenizer share it.

    Raises:
        UsageError: an empty text.
    """

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        if not text:
            raise UsageError("--ban: a text must not be empty")
        self.vocabulary = vocabulary
        self._end = len(text.encode())
        self._next = _automaton(text.encode())
        self._excluded: dict[int, Tensor] = {}

    def start(self, tokens: Sequence[int]) -> int:
        state = 0
        for token in tokens:
            state = self.advance(state, token)
        return state

    def advance(self, state: int, token: int) -> int:
        for byte in self.vocabulary.bytes_of(token):
            state = int(self._next[state, byte])
        return state

    def process(self, state: int, logits_V: Tensor) -> Tensor:
        excluded_V = self._excluded.get(state)
        if excluded_V is None or excluded_V.device != logits_V.device:
            excluded_V = self._excluded[state] = self._exclude(state).to(logits_V.device)
        num_known = min(len(excluded_V), len(logits_V))
        logits_V[:num_known].masked_fill_(excluded_V[:num_known], -torch.inf)
        return logits_V

    def _exclude(self, state: int) -> Tensor:
        """Return which tokens complete the text from `state`, bools [V]."""
        columns = self.vocabulary.table
        states_V = torch.full((len(columns),), state)
        reached_V = torch.zeros(len(columns), dtype=torch.bool)
        for bytes_V in columns.T.long():
            states_V = self._next[states_V, bytes_V]
            # The prompt may have ended with the text: an empty token completes nothing.
            reached_V |= (states_V == self._end) & (bytes_V != _NO_BYTE)
        return reached_V


class Vocabulary:
    """The bytes that each token adds to a text, none for special tokens: see `token_bytes`.

    `table` [V, longest token] holds them padded with 256.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._bytes = list(token_bytes)
        longest = max(map(len, self._bytes), default=0)
        padded = [[*each, *[_NO_BYTE] * (longest - len(each))] for each in self._bytes]
        self.table = torch.tensor(padded, dtype=torch.int16)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; none of an id that the tokenizer does not have."""
        return self._bytes[token] if token < len(self._bytes) else b""


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of each token, as it continues a text.

    Byte-level tokens are mapped byte by byte, `<0x0A>` stands for its byte, and any other token for
    what it adds to the decoding of a token before it.
    """
    size = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else None
    before = next((i for i, piece in enumerate(pieces) if piece and piece.isalpha()), 0)
    text_before = _decode(tokenizer, [before])
    found = []
    for token, piece in enumerate(pieces):
        if token in special or not piece:
            found.append(b"")
        elif alphabet is not None:
            found.append(b"".join(alphabet.get(c, c.encode()) for c in piece))
        elif byte := _BYTE.fullmatch(piece):
            found.append(bytes([int(byte[1], 16)]))
        else:
            both = _decode(tokenizer, [before, token])
            found.append(both.removeprefix(text_before).encode())
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    return '"ByteLevel"' in json.dumps(decoder)


def _byte_alphabet() -> dict[str, bytes]:
    """Return the byte of each character of GPT-2's byte-level alphabet.

    Printable bytes stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    characters |= {chr(256 + at): byte for at, byte in enumerate(others)}
    return {character: bytes([byte]) for character, byte in characters.items()}


def _automaton(text: bytes) -> Tensor:
    """Return the next state [len + 1, 257] after each state and byte; column 256 stays."""
    table = torch.zeros(len(text) + 1, _NO_BYTE + 1, dtype=torch.long)
    table[:, _NO_BYTE] = torch.arange(len(text) + 1)
    table[0, text[0]] = 1
    border = 0
    for state in range(1, len(text) + 1):
        table[state, :_NO_BYTE] = table[border, :_NO_BYTE]
        if state < len(text):
            table[state, text[state]] = state + 1
            border = int(table[border, text[state]])
    return table
