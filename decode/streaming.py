"""Incremental detokenization: text that later tokens cannot change, cut before stop strings.

The specification is the tokenizer's decoding of the whole; a stream decodes a short window of it.
Two sorts of text may still change. The last character of a byte-level text is a replacement
character while some of its bytes are missing. And decoders with byte fallback read a run of byte
tokens (`<0x0A>`) as one: one more byte that is invalid spoils every character of the run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Tokens that a window keeps when it is cut: a character has at most four bytes, and some decoders
# strip a space from the first token.
_KEPT = 8
_INCOMPLETE = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The detokenizer of one request. `text` is all text released so far, never with a stop string.

    The text continues the prompt: it is that of prompt and tokens together without the common
    prefix with the prompt's. Text that may change is released when it no longer can, and text that
    may begin a stop string when it no longer does. Not `live` and without stop strings, nothing is
    decoded before `finish`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        *,
        live: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._stop_ends = {stop.encode()[-1] for stop in self._stops}
        self._live = live or bool(stops)
        self._skipped = _list_skipped_ids(tokenizer)
        self._prompt = self._tail(prompt)
        self.reset()

    def reset(self) -> None:
        """Start again after the prompt."""
        # The first _done characters of the window's text were released or held; None: those of the
        # common prefix with the prompt's text, which may itself end within a character.
        self._window = list(self._prompt)
        self._done: int | None = None
        self._held = ""
        self._released: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Return all text released so far."""
        return "".join(self._released)

    def push(self, token: int) -> str:
        """Take one token; return the text it releases. Sets `stopped` at a stop string."""
        piece = self._piece(token)
        if not piece:
            return ""
        self._window.append(token)
        if not self._live:
            return ""
        if byte := _BYTE.fullmatch(piece):
            # If a stop string is complete, the text ends here, so no later byte can change it.
            ends = int(byte[1], 16) in self._stop_ends
            return self._take_stopped(self._decode()) if ends else ""
        now = self._decode()
        sure = len(now) - now.endswith(_INCOMPLETE)
        released = self._take(now[:sure])
        if self._done is not None and len(self._window) > 2 * _KEPT:
            self._window = self._tail(self._window)
            self._done = len(self._decode()) - (len(now) - sure)
        return released

    def finish(self) -> str:
        """Release the text held back, as no token follows."""
        if self.stopped:
            return ""
        released = self._take(self._decode())
        return released if self.stopped else released + self._release(len(self._held))

    def _piece(self, token: int) -> str | None:
        """Return the token's piece in the vocabulary; None or empty if decoding skips it."""
        if token in self._skipped:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        assert piece is None or isinstance(piece, str)
        return piece

    def _tail(self, tokens: Sequence[int]) -> list[int]:
        """Return the last _KEPT or more tokens with a text, not starting inside a run of bytes."""
        kept: list[int] = []
        for token in reversed(tokens):
            if piece := self._piece(token):
                kept.append(token)
                if len(kept) >= _KEPT and not _BYTE.fullmatch(piece):
                    break
        return kept[::-1]

    def _decode(self, tokens: list[int] | None = None) -> str:
        """Decode tokens, by default the window's."""
        text = self._tokenizer.decode(
            self._window if tokens is None else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _count_taken(self, now: str) -> int:
        """Return how many characters of the window's text were taken already."""
        if self._done is not None:
            return self._done
        return _count_shared(self._decode(self._prompt), now)

    def _take_stopped(self, now: str) -> str:
        """Take the window's text only if it completes a stop string."""
        text = self._held + now[self._count_taken(now) :]
        return self._take(now) if any(stop in text for stop in self._stops) else ""

    def _take(self, now: str) -> str:
        """Take the window's text up to its end; return the text it releases."""
        known = self._count_taken(now)
        if len(now) > known:
            self._done = len(now)
        self._held += now[known:]
        cuts = [cut for stop in self._stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            return self._release(min(cuts))
        return self._release(len(self._held) - self._pending())

    def _pending(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, end: int) -> str:
        """Release the held text up to `end`."""
        released, self._held = self._held[:end], self._held[end:]
        if released:
            self._released.append(released)
        return released


def _count_shared(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _list_skipped_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that `decode(skip_special_tokens=True)` skips."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    return frozenset(token for token, content in added.items() if content.special)
