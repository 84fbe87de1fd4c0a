"""A drafter that merges several: later ones fill what the earlier ones leave of the tree."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.target.base import Target
from spectool.decode.tree import Draft, Trie
from spectool.errors import UsageError


class Combined(Drafter):
    """Drafter that merges other drafters' trees of deterministic nodes, in the given order.

    Sampled nodes cannot be merged: verifying them counts draws, and a node that two drafters
    propose is a single node here. A node's source names all the drafters that proposed it.

    Raises:
        UsageError: one of the drafters does not combine.
    """

    def __init__(self, drafters: Sequence[Drafter], nodes: int) -> None:
        self.name = "+".join(drafter.name for drafter in drafters)
        for drafter in drafters:
            if not drafter.combines:
                raise UsageError(
                    f"--draft {self.name}: {drafter.name} does not share a tree with others"
                )
        self.drafters = list(drafters)
        self.uses_target = any(drafter.uses_target for drafter in drafters)
        self.nodes = nodes
        self.needs = Needs(
            layers=tuple(sorted({n for drafter in drafters for n in drafter.needs.layers})),
            final=any(drafter.needs.final for drafter in drafters),
            top=max(drafter.needs.top for drafter in drafters),
            probs=any(drafter.needs.probs for drafter in drafters),
        )

    @property
    def parts(self) -> Sequence[Drafter]:
        return self.drafters

    def check_chains(self, target: str) -> None:
        for drafter in self.drafters:
            drafter.check_chains(target)

    def attach(self, target: Target[Any]) -> None:
        for drafter in self.drafters:
            drafter.attach(target)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        for drafter in self.drafters:
            drafter.add(prompts, cache)

    def remove(self, request: Request) -> None:
        for drafter in self.drafters:
            drafter.remove(request)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        drafted = [drafter.propose(requests, budget) for drafter in self.drafters]
        return [self._merge(drafts) for drafts in zip(*drafted, strict=True)]

    def _merge(self, drafts: Sequence[Draft]) -> Draft:
        """Merge one request's drafts, earlier drafters' nodes first, up to `nodes` nodes."""
        trie = Trie(drafts[0].tokens[0], self.nodes)
        sources: dict[int, tuple[tuple[int, Hashable], ...]] = {}
        for which, draft in enumerate(drafts):
            # Nodes of this draft to nodes of the merged tree.
            merged_nodes: dict[int, int] = {0: 0}
            draft_sources = draft.sources or [()] * len(draft)
            for node in range(1, len(draft)):
                above = merged_nodes.get(draft.parents[node])
                added = None if above is None else trie.add(draft.tokens[node], above)
                if added is not None:
                    merged_nodes[node] = added
                    sources[added] = (*sources.get(added, ()), (which, draft_sources[node]))
        merged = trie.draft()
        merged.sources = [(), *(sources[node] for node in range(1, len(merged)))]
        return merged

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for drafter in self.drafters:
            drafter.observe(outcomes)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for drafter in self.drafters:
                stack.callback(drafter.close)
