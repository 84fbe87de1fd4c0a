"""Prompt lookup: propose what followed the latest n-gram when it occurred before.

Saxena 2023; here several distinct continuations are merged into one tree, longest match first, and
the index grows by committed tokens only. While the output copies a passage of the text, the drafter
follows it as Aggressive Decoding does (Sun et al. 2021): among equally long matches, the one that
continues the copy (the nearest at or after its position) comes first; the draft's depth doubles
while whole drafts are accepted; and after an edit that matches nothing, the copy resumes one token
further on.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectool import options
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.tree import Draft, Trie
from spectool.errors import UsageError
from spectool.options import option

# Latest matches of one length that are used: older ones add little.
_RECENT = 16
# Tokens accepted one after the other from one passage that make it a copy.
_COPYING = 3
# Shorter matches come after an interrupted copy.
_TRUSTED = 2


class NgramIndex:
    """Index of a growing text: where each of its n-grams ended, most recent last."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._lengths = range(max_n, min_n - 1, -1)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._num_indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index all of `tokens`, whose beginning was indexed before."""
        for end in range(self._num_indexed + 1, len(tokens) + 1):
            for n in self._lengths:
                if n <= end:
                    self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._num_indexed = len(tokens)

    def matches(self, tokens: Sequence[int], near: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (n, end) of earlier occurrences of the text's last n tokens, longest n first.

        Among those of one length the most recent come first; with `near`, the first that ends at
        `near` or after it comes before all others.
        """
        size = len(tokens)
        for n in self._lengths:
            ends = self._ends.get(tuple(tokens[-n:]), ()) if n <= size else ()
            nearest = None
            if near is not None and (index := bisect.bisect_left(ends, near)) < len(ends):
                nearest = ends[index] if ends[index] < self._num_indexed else None
            if nearest is not None:
                yield n, nearest
            for end in reversed(ends[-_RECENT - 1 :]):
                # The match that ends where the text ends has no continuation.
                if end not in (nearest, self._num_indexed):
                    yield n, end


def continue_text(tokens: Sequence[int], end: int, depth: int) -> list[int]:
    """Return the `depth` tokens that follow index `end` of the text.

    Where the text ends before, the tokens repeat with period `len(tokens) - end`, so that a
    repeating text is continued with its period.
    """
    found = list(tokens[end : end + depth])
    period = len(tokens) - end
    while len(found) < depth:
        found.append(found[-period])
    return found


@dataclass(slots=True)
class _Copy:
    """The passage that a request's text seems to copy.

    The next token should equal the one at index `end`. `length`: tokens of the passage accepted one
    after the other. `depth`: tokens to draft ahead. `broken`: the latest token ended a copy.
    """

    end: int
    length: int
    depth: int
    broken: bool = False


class NgramDrafter(Drafter):
    """Drafter of a tree of continuations, from one index per request."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `ngram`."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        depth: int = option(
            8, "most proposed tokens on a path, doubled while all are accepted", minimum=1
        )
        min_n: int = option(1, "shortest n-gram to look up", minimum=1, maximum=16)
        max_n: int = option(4, "longest n-gram to look up", minimum=1, maximum=16)

        def validate(self) -> None:
            if self.min_n > self.max_n:
                raise UsageError(f"min_n={self.min_n}: must be at most max_n={self.max_n}")

    name = "ngram"
    takes_sources = True
    needs = Needs()

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._indexes: dict[Request, NgramIndex] = {}
        self._copies: dict[Request, _Copy] = {}

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        for prompt in prompts:
            self._indexes[prompt.request] = NgramIndex(self.config.min_n, self.config.max_n)

    def remove(self, request: Request) -> None:
        self._indexes.pop(request, None)
        self._copies.pop(request, None)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [
            self._draft(request, limit) for request, limit in zip(requests, budget, strict=True)
        ]

    def _draft(self, request: Request, limit: int) -> Draft:
        tokens, index = request.text_tokens, self._indexes[request]
        index.extend(tokens)
        trie = Trie(tokens[-1], self.config.nodes)
        copy = self._copies.get(request)
        first: int | None = None
        for order, (n, end) in enumerate(self._matches(tokens, index, copy)):
            depth, copied = self.config.depth, 0
            if copy is not None and end == copy.end:
                depth, copied = copy.depth, min(copy.length, 8)
            first = end if first is None else first
            trie.extend(continue_text(tokens, end, min(depth, limit)), (n, min(order, 3), copied))
            if trie.full:
                break
        if first is None:
            self._copies.pop(request, None)
        elif copy is None or first != copy.end:
            self._copies[request] = _Copy(first, 0, self.config.depth)
        return trie.draft()

    def _matches(
        self, tokens: Sequence[int], index: NgramIndex, copy: _Copy | None
    ) -> Iterator[tuple[int, int]]:
        """Yield (length of the match, index to continue from), best first."""
        # After an edited token only short matches are found; the copy is more likely to go on.
        resumed = copy is not None and copy.broken
        for n, end in index.matches(tokens, copy.end if copy else None):
            if copy is not None and resumed and n < _TRUSTED:
                yield 0, copy.end
                resumed = False
            yield n, end
        if copy is not None and resumed:
            yield 0, copy.end

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            copy = self._copies.get(outcome.request)
            if copy is None:
                continue
            tokens, draft = outcome.request.text_tokens, outcome.draft
            # New since the proposal: the accepted path and the verifier's token.
            start = len(tokens) - len(outcome.path)
            new = tokens[start:]
            same = 0
            while same < len(new) and tokens[copy.end + same] == new[same]:
                same += 1
            whole = same >= min(copy.depth, max(draft.depths)) > 0
            copied = copy.length + same
            copy.broken = same < len(new) and copied >= _COPYING
            copy.length = copied if same == len(new) else 0
            copy.depth = min(2 * copy.depth, self.config.nodes) if whole else self.config.depth
            copy.end += len(new)
