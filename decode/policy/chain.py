"""Policies of chains: for targets that verify nothing else, and as servers verify."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.policy.base import Policy
from spectool.decode.request import Request
from spectool.decode.tree import Draft

# A request with this many tokens to replay drafts nothing for one step, which clears them.
_MOST_REPLAYED = 16


class Chains(Policy):
    """First paths only, and nothing while there is much to replay: for recurrent targets.

    Without `cuts`, the drafts are left as they are. Without `takes_drafts`, there are none.
    """

    def __init__(self, *, cuts: bool, takes_drafts: bool) -> None:
        self._cuts, self._takes_drafts = cuts, takes_drafts

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        return [
            limit if self._takes_drafts and cache.num_to_replay(row) < _MOST_REPLAYED else 0
            for row, limit in enumerate(budgets)
        ]

    def shape(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        return [tree.first_path(draft) for draft in drafts] if self._cuts else drafts


class FirstPath(Policy):
    """First paths, cut to a depth, as in servers that verify chains only."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        return [min(limit, self._depth) for limit in budgets]

    def shape(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        return [tree.first_path(draft, self._depth) for draft in drafts]
