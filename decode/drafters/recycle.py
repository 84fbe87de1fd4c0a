"""Token Recycling: draft after each token what the target last found likely after it.

Luo et al. 2024 (arXiv:2408.08696). A table holds for each token the ids that the target found
likeliest after its latest occurrence, accepted or rejected; a tree of ranks is filled from the
table level by level. Unlike the authors' release, the table is seeded from the prompt's logits,
tokens that never occurred are left out, and the tree may have any size (theirs has 80 nodes).
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
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import CheckpointError
from spectool.options import option

# How often the next token is the table's first, second, ... entry, from which the best tree of a
# given size follows. Measured on greedy text of codestory-10M (stories, code, arithmetic, prose;
# 700 tokens, cut where it loops).
_SHARES = (0.63, 0.13, 0.06, 0.036, 0.016, 0.008, 0.006, 0.005)
RANKS = len(_SHARES)
_DEEPEST = 8


def make_rank_tree(nodes: int, depth: int) -> list[tuple[int, ...]]:
    """Return the `nodes` likeliest paths of ranks, best first, parents before their children."""
    heap: list[tuple[float, tuple[int, ...]]] = [(-_SHARES[0], (0,))]
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < nodes:
        share, path = heapq.heappop(heap)
        paths.append(path)
        if path[-1] + 1 < RANKS:
            sibling = share / _SHARES[path[-1]] * _SHARES[path[-1] + 1]
            heapq.heappush(heap, (sibling, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (share * _SHARES[0], (*path, 0)))
    return paths


class RecycleDrafter(Drafter):
    """Drafter from a table [V, 8] of ids on the host; -1 where a token never occurred.

    The table is kept across requests and, with `state`, across runs.

    Raises:
        CheckpointError: the `state` file is no such table, or (at the first prompt) one of another
            vocabulary.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `recycle`."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        depth: int = option(6, "most proposed tokens on a path", minimum=1, maximum=_DEEPEST)
        state: str | None = option(None, "file to keep the table in between runs")

    name = "recycle"
    takes_sources = True
    needs = Needs(top=RANKS)

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._paths = make_rank_tree(self.config.nodes, self.config.depth)
        nodes = {(): 0} | {path: node for node, path in enumerate(self._paths, start=1)}
        # Depth, parent and rank of each node.
        self._shape = [(len(path), nodes[path[:-1]], path[-1]) for path in self._paths]
        self.table = array("i")
        if self.config.state:
            self._load(Path(self.config.state))

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        vocabulary = prompts[0].logits_V.shape[-1]
        if not self.table:
            self.table = array("i", [-1]) * (vocabulary * RANKS)
        elif len(self.table) != vocabulary * RANKS:
            raise CheckpointError(
                f"{self.config.state}: a table of {len(self.table) // RANKS} tokens; the model has "
                f"{vocabulary}"
            )
        for prompt in prompts:
            # The request's last token is already the one that follows the prompt.
            tops = prompt.top()
            tokens = prompt.request.tokens[-1 - len(tops) : -1]
            for token, top in zip(tokens, tops, strict=True):
                self._learn(token, top)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        pairs = zip(requests, budget, strict=True)
        return [self._draft(request.tokens[-1], limit) for request, limit in pairs]

    def _draft(self, root: int, limit: int) -> Draft:
        """Fill the tree of ranks, without unknown tokens and nodes deeper than `limit`."""
        table, tokens, parents = self.table, [root], [-1]
        sources: list[Hashable] = [()]
        # From each node of the full tree to its node in the draft; -1: left out.
        kept = [0]
        for path, (depth, above, rank) in zip(self._paths, self._shape, strict=True):
            parent = kept[above]
            token = -1
            if parent >= 0 and depth <= limit:
                token = table[tokens[parent] * RANKS + rank]
            if token < 0:
                kept.append(-1)
                continue
            kept.append(len(tokens))
            tokens.append(token)
            parents.append(parent)
            sources.append(path)
        return Draft(tokens, parents, sources=sources)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            tokens = outcome.draft.tokens
            for token, top in zip(tokens, outcome.top, strict=True):
                self._learn(token, top)
            # Where a token is at several nodes the deepest accepted one counts, so it comes last.
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
                raise CheckpointError(f"{path}: not a table of {RANKS} ids per token")
            self.table = array("i", table_VK.flatten().tolist())
