"""Text out of tokens as they are committed: what later tokens cannot change, and no stop string.

The tokenizer's decoding of the whole is the specification; a stream decodes a short window of it.
Two sorts of text may still change. The last character of a byte-level text is a replacement
character while its bytes are not all there. And decoders with byte fallback read a run of byte
tokens (`<0x0A>`) as one: a byte more that fits nowhere spoils every character of the run.
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
    """Detokenizes one row. `text` is all text released so far; it never holds a stop string.

    It continues the prompt: the text of prompt and tokens together, without what it shares with
    the prompt's. Text that may change is released when it no longer can, and text that may begin a
    stop string when it no longer does. Not `live` and without stop strings, nothing is decoded
    before `finish`.
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
        self._skipped = _skipped(tokenizer)
        self._prompt = self._tail(prompt)
        self.reset()

    def reset(self) -> None:
        """Begin again after the prompt."""
        # The first _done characters of the window's text are dealt with; None: all those that it
        # shares with the prompt's, which may itself end within a character.
        self._window = list(self._prompt)
        self._done: int | None = None
        self._held = ""
        self._released: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
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
            # Should a stop string be complete, the text ends here and nothing can change it.
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
        """Release what was held back: no token follows."""
        if self.stopped:
            return ""
        released = self._take(self._decode())
        return released if self.stopped else released + self._release(len(self._held))

    def _piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None or empty where decoding passes it over."""
        if token in self._skipped:
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        assert piece is None or isinstance(piece, str)
        return piece

    def _tail(self, tokens: Sequence[int]) -> list[int]:
        """The last tokens that have a text, at least _KEPT, not beginning inside a run of bytes."""
        kept: list[int] = []
        for token in reversed(tokens):
            if piece := self._piece(token):
                kept.append(token)
                if len(kept) >= _KEPT and not _BYTE.fullmatch(piece):
                    break
        return kept[::-1]

    def _decode(self, tokens: list[int] | None = None) -> str:
        text = self._tokenizer.decode(
            self._window if tokens is None else tokens,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _known(self, now: str) -> int:
        if self._done is not None:
            return self._done
        return _shared(self._decode(self._prompt), now)

    def _take_stopped(self, now: str) -> str:
        text = self._held + now[self._known(now) :]
        return self._take(now) if any(stop in text for stop in self._stops) else ""

    def _take(self, now: str) -> str:
        """Go on to the end of the window's text as it is `now`."""
        known = self._known(now)
        if len(now) > known:
            self._done = len(now)
        self._held += now[known:]
        cuts = [cut for stop in self._stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            return self._release(min(cuts))
        return self._release(len(self._held) - self._pending())

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        if released:
            self._released.append(released)
        return released


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _skipped(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens without a text of their own, as `decode(skip_special_tokens=True)` finds them."""
    if not tokenizer.is_fast:
        return frozenset(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    return frozenset(token for token, content in added.items() if content.special)
