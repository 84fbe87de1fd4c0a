"""Prompt lookup: continue as the longest recent n-gram did in prompt and output.

Saxena 2023; here with several distinct continuations merged into one tree, longest match first, and
with an index that grows by the committed tokens only. While the output copies a stretch of the text
the drafter follows it as Aggressive Decoding does (Sun et al. 2021): of equal matches the nearest
ahead of where the copy has come to goes first, the draft doubles as long as all of it stands, and
after an edit that matches nothing the copy is resumed one token further.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectool import options
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind, Trie
from spectool.errors import UsageError
from spectool.options import option

# Matches of one length that are looked at: a frequent n-gram's older continuations add little.
_RECENT = 16
# Accepted in a row from one place, so many tokens count as a copy.
_COPYING = 3
# Shorter matches say less than the place of a copy that was broken off.
_TRUSTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig(options.Config):
    """Options of `ngram`."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(8, "proposed tokens in a row, doubled while all stand", minimum=1)
    min_n: int = option(1, "shortest n-gram to look up", minimum=1, maximum=16)
    max_n: int = option(4, "longest n-gram to look up", minimum=1, maximum=16)

    def validate(self) -> None:
        if self.min_n > self.max_n:
            raise UsageError(f"min_n={self.min_n}: must be at most max_n={self.max_n}")


class NgramIndex:
    """Where each n-gram of a growing text ended, most recent last."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._lengths = range(max_n, min_n - 1, -1)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._num_indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index the text up to `tokens`, which begin with what was indexed before."""
        for end in range(self._num_indexed + 1, len(tokens) + 1):
            for n in self._lengths:
                if n <= end:
                    self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._num_indexed = len(tokens)

    def matches(self, tokens: Sequence[int], near: int | None = None) -> Iterator[tuple[int, int]]:
        """(n, end) of earlier occurrences of the text's ending: longest and most recent first.

        `near`: of the matches of a length, the first that ends there or after comes before all.
        """
        size = len(tokens)
        for n in self._lengths:
            ends = self._ends.get(tuple(tokens[-n:]), ()) if n <= size else ()
            nearest = None
            if near is not None and (place := bisect.bisect_left(ends, near)) < len(ends):
                nearest = ends[place] if ends[place] < self._num_indexed else None
            if nearest is not None:
                yield n, nearest
            for end in reversed(ends[-_RECENT - 1 :]):
                # Nothing follows the text's own end.
                if end not in (nearest, self._num_indexed):
                    yield n, end


def continuation(tokens: Sequence[int], end: int, depth: int) -> list[int]:
    """The `depth` tokens after place `end` of the text.

    What runs into the end of the text goes on with its own continuation, so a text that repeats
    itself is continued with its period.
    """
    found = list(tokens[end : end + depth])
    period = len(tokens) - end
    while len(found) < depth:
        found.append(found[-period])
    return found


@dataclass(slots=True)
class _Copy:
    """Where a row's text seems to be copied from: `end` is what the next token should equal.

    `length` tokens of it were accepted in a row; `depth` is how far ahead to draft. `broken`: a
    copy was followed until the last token.
    """

    end: int
    length: int
    depth: int
    broken: bool = False


class NgramDrafter(Drafter):
    """An index per row; a tree of its continuations per step, empty where nothing matches."""

    name = "ngram"
    Config = NgramConfig
    needs = Needs()

    def __init__(self, config: NgramConfig | None = None) -> None:
        self.config = config or NgramConfig()
        self._indexes: dict[int, NgramIndex] = {}
        self._copies: dict[int, _Copy] = {}

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        config = self.config
        self._indexes = {
            prompt.row.index: NgramIndex(config.min_n, config.max_n) for prompt in prompts
        }
        self._copies = {}

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, row: Request, limit: int) -> Draft:
        tokens, index = row.tokens, self._indexes[row.index]
        index.extend(tokens)
        made = Trie(tokens[-1], self.config.nodes)
        copy = self._copies.get(row.index)
        first: int | None = None
        for order, (n, end) in enumerate(self._places(tokens, index, copy)):
            depth, copied = self.config.depth, 0
            if copy is not None and end == copy.end:
                depth, copied = copy.depth, min(copy.length, 8)
            first = end if first is None else first
            made.extend(continuation(tokens, end, min(depth, limit)), (n, min(order, 3), copied))
            if made.full:
                break
        if first is None:
            self._copies.pop(row.index, None)
        elif copy is None or first != copy.end:
            self._copies[row.index] = _Copy(first, 0, self.config.depth)
        return made.draft()

    def _places(
        self, tokens: Sequence[int], index: NgramIndex, copy: _Copy | None
    ) -> Iterator[tuple[int, int]]:
        """What to continue from, best first, with the length of the match."""
        # The token in the place of an edit matches nothing much; the copy may go on after it.
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
            copy = self._copies.get(outcome.row.index)
            if copy is None:
                continue
            tokens, draft = outcome.row.tokens, outcome.draft
            # New since the proposal: the accepted path and the rule's token.
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
