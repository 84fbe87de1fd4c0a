"""Prompt lookup: continue as the longest recent n-gram did in prompt and output.

Saxena 2023; here with several distinct continuations merged into one tree, longest and most recent
match first, and with an index that grows by the committed tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spectool import options
from spectool.decode import tree
from spectool.decode.protocol import Needs, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError
from spectool.options import option

# Matches of one length that are looked at: a frequent n-gram's older continuations add little.
_RECENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig(options.Config):
    """Options of `ngram`."""

    nodes: int = option(8, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(8, "most proposed tokens in a row", minimum=1, maximum=1024)
    min_n: int = option(2, "shortest n-gram to look up", minimum=1, maximum=16)
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

    def continuations(self, tokens: Sequence[int], depth: int) -> Iterator[list[int]]:
        """What followed earlier occurrences of the text's ending, best first, `depth` tokens each.

        A match that runs into the end of the text goes on with its own continuation, so a text
        that repeats itself is continued with its period.
        """
        size = len(tokens)
        for n in self._lengths:
            ends = self._ends.get(tuple(tokens[-n:]), ()) if n <= size else ()
            for end in reversed(ends[-_RECENT - 1 : -1]):
                period = size - end
                found = list(tokens[end : end + depth])
                while len(found) < depth:
                    found.append(found[-period])
                yield found


class NgramDrafter:
    """An index per row; a tree of its continuations per step, empty where nothing matches."""

    name = "ngram"
    Config = NgramConfig
    needs = Needs()

    def __init__(self, config: NgramConfig | None = None) -> None:
        self.config = config or NgramConfig()
        self.branches = self.config.nodes > 1
        self._indexes: dict[int, NgramIndex] = {}

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[Prompt]) -> None:
        config = self.config
        self._indexes = {
            prompt.row.index: NgramIndex(config.min_n, config.max_n) for prompt in prompts
        }

    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, row: Row, limit: int) -> Draft:
        index = self._indexes[row.index]
        index.extend(row.tokens)
        depth = min(self.config.depth, limit)
        if depth == 0:
            return tree.root(row.tokens[-1])
        paths = index.continuations(row.tokens, depth)
        return tree.trie(row.tokens[-1], paths, nodes=self.config.nodes)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        pass
