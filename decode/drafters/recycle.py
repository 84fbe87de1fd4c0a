"""Token Recycling: what the target found likely after a token last time is drafted after it again.

Luo et al. 2024 (arXiv:2408.08696). A table holds, for each token, the ids that were likeliest after
its latest verified occurrence, rejected ones included; a tree of ranks is filled from it level by
level. Unlike the authors' release it is seeded from the prompt's own logits, knows which tokens it
has never seen, and takes a tree of any size: theirs has 80 nodes whatever the device.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectool import options
from spectool.decode import draft_state
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind
from spectool.errors import CheckpointError
from spectool.options import option

# How often the token that follows is the table's first, second, ...: decides which ranks a tree of
# a given size holds. Measured on greedy text of codestory-10M (stories, code, arithmetic, prose;
# 700 tokens, cut where it loops).
_SHARES = (0.63, 0.13, 0.06, 0.036, 0.016, 0.008, 0.006, 0.005)
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
    """The table of V x 8 ids of 4 bytes, on the host, -1 where a token was never seen.

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
        # Depth, parent and rank of each node.
        self._shape = [(len(path), places[path[:-1]], path[-1]) for path in self._paths]
        self.table = array("i")
        if self.config.state:
            self._load(Path(self.config.state))

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        vocabulary = prompts[0].logits_V.shape[-1]
        if not self.table:
            self.table = array("i", [-1]) * (vocabulary * RANKS)
        elif len(self.table) != vocabulary * RANKS:
            raise CheckpointError(
                f"{self.config.state}: a table of {len(self.table) // RANKS} tokens; the model has "
                f"{vocabulary}"
            )
        for prompt in prompts:
            # The last of the row's tokens is already the answer to the prompt's last one.
            tops = prompt.top()
            own = prompt.row.tokens[-1 - len(tops) : -1]
            for token, top in zip(own, tops, strict=True):
                self._learn(token, top)

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row.tokens[-1], limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, root: int, limit: int) -> Draft:
        """The tree of ranks, without what the table does not know and what is too deep."""
        table, tokens, parents = self.table, [root], [-1]
        sources: list[Hashable] = [()]
        # Of each node of the full tree, its place in the draft; -1 where it has none.
        places = [0]
        for path, (depth, above, rank) in zip(self._paths, self._shape, strict=True):
            parent = places[above]
            token = -1
            if parent >= 0 and depth <= limit:
                token = table[tokens[parent] * RANKS + rank]
            if token < 0:
                places.append(-1)
                continue
            places.append(len(tokens))
            tokens.append(token)
            parents.append(parent)
            sources.append(path)
        return Draft(tokens, parents, ["deterministic"] * len(tokens), sources=sources)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            tokens = outcome.draft.tokens
            for token, top in zip(tokens, outcome.top, strict=True):
                self._learn(token, top)
            # Of a token that stands in several places, the accepted one counts, the deepest last.
            for node in outcome.path:
                self._learn(tokens[node], outcome.top[node])

    def close(self) -> None:
        if self.config.state and self.table:
            table_VK = torch.tensor(self.table, dtype=torch.int32).view(-1, RANKS)
            draft_state.save(Path(self.config.state), self.name, {"table": table_VK})

    def _learn(self, token: int, top: list[int]) -> None:
        # A tiny vocabulary has fewer than RANKS likeliest tokens.
        start = token * RANKS
        self.table[start : start + len(top)] = array("i", top)

    def _load(self, path: Path) -> None:
        table_VK = draft_state.load(path, self.name).get("table")
        if table_VK is not None:
            if table_VK.shape != (len(table_VK), RANKS) or table_VK.dtype != torch.int32:
                raise CheckpointError(f"{path}: not a table of {RANKS} ids a token")
            self.table = array("i", table_VK.flatten().tolist())
