"""Token Recycling: what the target found likely after a token last time is drafted after it again.

Luo et al. 2024 (arXiv:2408.08696). A table holds, for each token, the ids that were likeliest after
its latest verified occurrence, rejected ones included; a tree of ranks is filled from it level by
level. Unlike the authors' release it is seeded from the prompt's own logits, knows which tokens it
has never seen, and takes a tree of any size: theirs has 80 nodes whatever the device.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectool import options
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Needs, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control
from spectool.decode.tree import Draft, Kind
from spectool.errors import CheckpointError
from spectool.options import option

from . import state

# How often the token that follows is the table's first, second, ...: decides which ranks a tree of
# a given size holds. Measured on greedy text of codestory-10M (stories, code, arithmetic).
_SHARES = (0.42, 0.13, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02)
RANKS = len(_SHARES)
_DEEPEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RecycleConfig(options.Config):
    """Options of `recycle`."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(6, "most proposed tokens in a row", minimum=1, maximum=_DEEPEST)
    state: str | None = option(None, "file to keep the table in between runs")


def rank_tree(nodes: int, depth: int) -> list[tuple[int, ...]]:
    """The `nodes` likeliest paths of ranks, best first, parents before their children."""
    heap: list[tuple[float, tuple[int, ...]]] = [(-_SHARES[0], (0,))]
    found: list[tuple[int, ...]] = []
    while heap and len(found) < nodes:
        share, path = heapq.heappop(heap)
        found.append(path)
        if path[-1] + 1 < RANKS:
            sibling = share / _SHARES[path[-1]] * _SHARES[path[-1] + 1]
            heapq.heappush(heap, (sibling, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (share * _SHARES[0], (*path, 0)))
    return found


class RecycleDrafter(Drafter):
    """The table [V, 8] int32, on the host, -1 where a token was never seen.

    It outlives batches and, with `state`, runs.

    Raises:
        CheckpointError: `state` is no table, or (at the first prompt) one of another vocabulary.
    """

    name = "recycle"
    Config = RecycleConfig
    needs = Needs(top=RANKS)

    def __init__(self, config: RecycleConfig | None = None) -> None:
        self.config = config or RecycleConfig()
        self._paths = rank_tree(self.config.nodes, self.config.depth)
        places = {(): 0} | {path: node for node, path in enumerate(self._paths, start=1)}
        self._above = [places[path[:-1]] for path in self._paths]
        self._sources = [(), *self._paths]
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for level in range(1, max(map(len, self._paths)) + 1):
            nodes = [places[path] for path in self._paths if len(path) == level]
            above = [self._above[node - 1] for node in nodes]
            ranks = [self._paths[node - 1][-1] for node in nodes]
            self._levels.append((torch.tensor(nodes), torch.tensor(above), torch.tensor(ranks)))
        self.table_VK: Tensor | None = None
        if self.config.state:
            self.table_VK = state.load(Path(self.config.state), self.name).get("table")

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[Prompt], cache: TreeCache) -> None:
        vocabulary = prompts[0].logits_V.shape[-1]
        if self.table_VK is None:
            self.table_VK = torch.full((vocabulary, RANKS), -1, dtype=torch.int32)
        elif len(self.table_VK) != vocabulary:
            raise CheckpointError(
                f"{self.config.state}: a table of {len(self.table_VK)} tokens; the model has "
                f"{vocabulary}"
            )
        seen: dict[int, list[int]] = {}
        for prompt in prompts:
            # The last of the row's tokens is already the answer to the prompt's last one.
            own = prompt.row.tokens[-1 - len(prompt.top) : -1]
            seen |= zip(own, prompt.top, strict=True)
        self._learn(seen)

    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        assert self.table_VK is not None, "begin comes first"
        tokens_BN = torch.full((len(rows), 1 + len(self._paths)), -1)
        tokens_BN[:, 0] = torch.tensor([row.tokens[-1] for row in rows])
        for nodes_M, above_M, ranks_M in self._levels:
            above_BM = tokens_BN[:, above_M]
            next_BM = self.table_VK[above_BM.clamp(min=0), ranks_M].long()
            tokens_BN[:, nodes_M] = torch.where(above_BM < 0, -1, next_BM)
        pairs = zip(tokens_BN.tolist(), budget, strict=True)
        return [self._draft(tokens, limit) for tokens, limit in pairs]

    def _draft(self, tokens: list[int], limit: int) -> Draft:
        """The tree without what the table does not know and what is too deep."""
        kept, parents, places = [0], [-1], {0: 0}
        for node, above in enumerate(self._above, start=1):
            if tokens[node] >= 0 and len(self._paths[node - 1]) <= limit:
                places[node] = len(kept)
                kept.append(node)
                parents.append(places[above])
        return Draft(
            [tokens[node] for node in kept],
            parents,
            ["deterministic"] * len(kept),
            sources=[self._sources[node] for node in kept],
        )

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        seen: dict[int, list[int]] = {}
        for outcome in outcomes:
            tokens = outcome.draft.tokens
            seen |= zip(tokens, outcome.top, strict=True)
            # Of a token that stands in several places, the accepted one counts, the deepest last.
            seen |= ((tokens[node], outcome.top[node]) for node in outcome.path)
        self._learn(seen)

    def close(self) -> None:
        if self.config.state and self.table_VK is not None:
            state.save(Path(self.config.state), self.name, {"table": self.table_VK})

    def _learn(self, seen: dict[int, list[int]]) -> None:
        if seen:
            assert self.table_VK is not None
            ranks_MK = torch.tensor(list(seen.values()), dtype=torch.int32)
            self.table_VK[torch.tensor(list(seen)), : ranks_MK.shape[1]] = ranks_MK
