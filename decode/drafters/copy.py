"""Copy the source: draft all that is left of it from where the output stands (Aggressive Decoding).

For texts that mostly repeat their source, as corrections do: Sun et al. 2021, arXiv:2106.04970, in
the release's form with n-grams (IAD). The source is what an encoder reads, or the prompt of a
causal model.

While the output is the beginning of the source, it stands right after that. Else it stands after
the place of the source that the longest end of the output equals; of several such places, after
the one nearest to where it would stand had it copied token for token since. Where an n-gram of the
release's rule (the shortest that ends the output and occurs once, n up to 3) is found, this is its
place, since a longer match ends there too. An output whose last token is not in the source gets no
draft. The release drafts from any place to the source's end; here the policies cut that to what
pays.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.options import option

# Longer matches of places are not told apart.
_LONGEST = 32

# Places of a token that are looked at on each side of the one where a steady copy would be.
_NEAREST = 128


@dataclass(slots=True)
class _Source:
    """A request's source, the places `ends` right after each of its tokens, and the output's place.

    `place` is the index of the token to copy next, as it was last known, after `length` tokens of
    the output, of which the last `matched` equal those before it. `read` tokens of the output are
    the source's first ones; None once it differs.
    """

    tokens: list[int]
    ends: dict[int, list[int]] = field(default_factory=dict)
    place: int = 0
    length: int = 0
    matched: int = 0
    read: int | None = 0

    def __post_init__(self) -> None:
        for index, token in enumerate(self.tokens):
            self.ends.setdefault(token, []).append(index + 1)

    def find(self, output: list[int]) -> int | None:
        """Find where the output stands in the source; None if its last token is not there."""
        if self.read is not None and self.tokens[self.read : len(output)] == output[self.read :]:
            self.place = self.length = self.matched = self.read = len(output)
            return self.place
        self.read = None
        expected = self.place + len(output) - self.length
        best: tuple[int, int] | None = None
        ends = self.ends.get(output[-1], [])
        middle = bisect.bisect(ends, expected)
        for end in ends[max(0, middle - _NEAREST) : middle + _NEAREST]:
            length = self._match(output, end)
            distance = abs(end - expected)
            if best is None or (length, -distance) > best:
                best, place = (length, -distance), end
        if best is None:
            return None
        self.place, self.length, self.matched = place, len(output), best[0]
        return place

    def _match(self, output: list[int], end: int) -> int:
        """Count the tokens before a place that equal the end of the output."""
        most = min(end, len(output), _LONGEST)
        return next((n for n in range(most) if self.tokens[end - 1 - n] != output[-1 - n]), most)


class CopyDrafter(Drafter):
    """Drafter of one chain per request: the rest of its source."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `copy`."""

        nodes: int = option(1024, "most proposed tokens", minimum=1, maximum=1024)

    name = "copy"
    takes_sources = True
    needs = Needs()

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._sources: dict[Request, _Source] = {}

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        for prompt in prompts:
            request = prompt.request
            tokens = request.source or request.tokens[: request.num_prompt]
            self._sources[request] = _Source(list(tokens))

    def remove(self, request: Request) -> None:
        self._sources.pop(request, None)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [
            self._draft(request, limit) for request, limit in zip(requests, budget, strict=True)
        ]

    def _draft(self, request: Request, limit: int) -> Draft:
        source = self._sources[request]
        # A forced first token is output too: encoders read it as the first of the source.
        output = request.tokens[1:] if request.source else request.new_tokens
        place = source.find(output)
        if place is None:
            return tree.root(request.tokens[-1])
        most = min(limit, self.config.nodes)
        draft = tree.chain(
            [request.tokens[-1], *source.tokens[place : place + most]], kind="deterministic"
        )
        draft.sources = [min(source.matched, 8)] * len(draft)
        return draft
