"""Text out of tokens as they are committed: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Tokens of the prompt that are decoded along, so that a first token keeps its leading space.
_LEAD = 6
_INCOMPLETE = "\ufffd"
# A character has at most four bytes; what is not whole after as many tokens never will be.
_LONGEST = 4


class TextStream:
    """Detokenizes one row. `text` is all text released so far; it never holds a stop string.

    A character spread over several tokens is released when it is whole, and text that may yet turn
    out to begin a stop string when it can no longer be one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        # Tokens before _read are decoded already; those from _prefix on give them context.
        self._tokens = list(prompt[-_LEAD:])
        self._prefix, self._read = 0, len(self._tokens)
        self._found = ""
        self._num_released = 0
        self.stopped = False

    @property
    def text(self) -> str:
        return self._found[: self._num_released]

    def push(self, token: int) -> str:
        """Take one token; return the text it releases. Sets `stopped` at a stop string."""
        self._tokens.append(token)
        before, now = self._decode(self._read), self._decode(len(self._tokens))
        if now.endswith(_INCOMPLETE) and len(self._tokens) - self._read < _LONGEST:
            return ""
        return self._advance(now[len(before) :])

    def finish(self) -> str:
        """Release what was held back: no token follows."""
        released = ""
        if not self.stopped:
            before, now = self._decode(self._read), self._decode(len(self._tokens))
            released = self._advance(now[len(before) :])
        return released + self._release(len(self._found))

    def _decode(self, end: int) -> str:
        text = self._tokenizer.decode(
            self._tokens[self._prefix : end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _advance(self, new: str) -> str:
        self._prefix, self._read = self._read, len(self._tokens)
        searched = len(self._found)
        self._found += new
        cuts = [self._found.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stops]
        cuts = [cut for cut in cuts if cut >= 0]
        if cuts:
            self.stopped = True
            self._found = self._found[: min(cuts)]
            return self._release(len(self._found))
        return self._release(len(self._found) - self._pending())

    def _pending(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._found)), longest, -1):
                if self._found.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, end: int) -> str:
        end = max(end, self._num_released)
        released = self._found[self._num_released : end]
        self._num_released = end
        return released
