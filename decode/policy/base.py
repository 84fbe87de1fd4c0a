"""The interface of a policy, which sizes the drafts that a drafter proposes.

The engine asks a drafter's policies in turn, before and after each proposal. They decide by past
steps and by the sources of nodes, never by the tokens of drawn nodes, so neither greedy text nor
the distribution of sampled text depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Outcome
from spectool.decode.request import Request
from spectool.decode.tree import Draft


class Policy:
    """A rule about the size and the shape of drafts; by default it changes nothing.

    `tunes`: it sizes drafts by what passes cost on this machine.
    """

    tunes = False

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        """Return how deep each request may be drafted; if it is 0 for all, nothing is proposed."""
        return budgets

    def shape(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        """Return the drafts to feed, made of these; also asked where nothing was proposed."""
        return drafts

    def learn(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Take the outcomes of a step, and its seconds from the drafts to the commit."""

    def close(self) -> None:
        """Write to disk what was learnt; no request follows."""
