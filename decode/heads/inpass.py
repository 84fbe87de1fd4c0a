"""Base classes of drafters that guess inside the target's own pass, by extra rows.

Next to a tree's nodes the pass carries extra rows, chains of up to K below each node: the j-th row
after a node at position t guesses x_{t+j+1}, a token that the next step may draft at depth j. Extra
rows attend to their node, its ancestors and earlier rows of their chain; nothing else attends to
them, and they are never committed. So one pass verifies a tree and guesses the next one.

Chain lengths are chosen as in PPD (Chen et al. 2024, arXiv:2405.18628, "dynamic sparse tree"): if
the accepted path ends at a node whose chain goes s tokens ahead, the next tree is T_s, at most s
deep (`_assign_rows`, `choose_trees`).

Shapes: B texts or requests of a batch, A positions of a text, K rows ahead of a node, R positions
in texts, X extra rows of a node, S trees, D width, N rows of a pass, V vocabulary.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectool import options
from spectool.decode.heads.base import TOP, Heads, Paths
from spectool.decode.protocol import Drafter, Inject, Outcome
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError
from spectool.options import option
from spectool.training import LossSpec, TrainingBatch

# Sizes that are tried for each tree, in candidate nodes.
_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Positions of a text whose extra rows share one pass; bounds the mask while guesses are ranked.
_POSITIONS_PER_PASS = 64

# A node of a tree: the ranks of its ancestors' guesses from the root down, its own the last.
RankPath = tuple[int, ...]


class InPassHeads(Heads):
    """Heads whose states are outputs of the target's pass."""

    loss = LossSpec(target="probs")
    config: Any

    @classmethod
    def draft_vocab_size(cls, config: Any, vocab_size: int) -> int:
        # They guess with the target's own lm_head, so its whole vocabulary.
        return 0

    @property
    @abstractmethod
    def extra_rows(self) -> list[tuple[int, int]]:
        """All extra rows of a node (as in `Draft`, with the node as 0): K groups, in order."""

    @abstractmethod
    def make_injections(self, batch: TrainingBatch) -> dict[int, Inject]:
        """Return the `Needs.inject` functions for extra rows of a training batch's texts."""

    def choose(self, batch_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """Select at most `anchors` random positions of each text: each costs K rows of a pass."""
        score_R = torch.rand(len(batch_R), device=batch_R.device)
        kept = []
        for b in range(int(batch_R.max()) + 1 if len(batch_R) else 0):
            at_S = (batch_R == b).nonzero()[:, 0]
            kept.append(at_S[score_R[at_S].argsort()[: self.config.anchors]].sort().values)
        index_S = torch.cat(kept) if kept else batch_R
        return batch_R[index_S], position_R[index_S]

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        assert batch.extra_rows is not None
        inject, rows = self.make_injections(batch), self.extra_rows
        # One row of positions per text; shorter rows are padded with position 0.
        num_texts = len(batch.tokens_BL)
        count_B = torch.bincount(batch_R, minlength=num_texts)
        column_R = torch.arange(len(batch_R), device=batch_R.device)
        column_R = column_R - (count_B.cumsum(0) - count_B)[batch_R]
        most = int(count_B.max()) if len(batch_R) else 0
        positions_BA = torch.zeros(num_texts, max(1, most), dtype=torch.long, device=batch_R.device)
        positions_BA[batch_R, column_R] = position_R
        found = [
            batch.extra_rows(part_BA, rows, inject)
            for part_BA in torch.split(positions_BA, _POSITIONS_PER_PASS, dim=1)
        ]
        states_RXD = torch.cat(found, 1)[batch_R, column_R].to(self.dtype)
        # lm_head is linear: the mean of several rows' logits is the logits of their mean state.
        num_positions, num_rows, width = states_RXD.shape
        by_head = (num_positions, self.num_heads, num_rows // self.num_heads, width)
        yield from states_RXD.view(by_head).mean(2).unbind(1)

    def expected(self, paths: Paths, nodes: int) -> float:
        width = len(self.extra_rows) // self.num_heads
        return tokens_per_step(
            choose_trees(paths, num_heads=self.num_heads, rows=nodes, width=width)
        )


@dataclass(frozen=True, slots=True)
class SparseTree:
    """A tree with the lengths of its nodes' chains of extra rows.

    `paths` are the nodes but the root, parents first. `ahead` (chain lengths) and `ends` (the
    probability that the accepted path ends at the node) start with the root. `expected`: tokens per
    step with this tree.
    """

    paths: list[RankPath]
    ahead: list[int]
    ends: list[float]
    expected: float


def choose_trees(paths: Paths, *, num_heads: int, rows: int, width: int = 1) -> list[SparseTree]:
    """Choose the trees T_0 ... T_K that bring the most tokens per step in the long run.

    Each has at most `rows` rows besides the root, nodes and extra rows together; a chain that goes
    j tokens ahead takes j times `width` extra rows. `paths`: candidate nodes, best first, with the
    share of texts that follows each.
    """
    counts = [0] * (num_heads + 1)
    best = _make_trees(paths, counts, rows, width)
    most = tokens_per_step(best)
    # Coordinate ascent over the trees' sizes, the deepest tree first.
    for _ in range(2):
        for state in range(num_heads, 0, -1):
            for count in _SIZES:
                tried = [*counts[:state], count, *counts[state + 1 :]]
                trees = _make_trees(paths, tried, rows, width)
                tokens = tokens_per_step(trees)
                if tokens > most:
                    best, most, counts = trees, tokens, tried
    return best


def tokens_per_step(trees: Sequence[SparseTree]) -> float:
    """Return the mean number of tokens per step in the long run."""
    shares = zip(find_stationary(trees).tolist(), trees, strict=True)
    return float(sum(share * tree.expected for share, tree in shares))


def find_stationary(trees: Sequence[SparseTree]) -> Tensor:
    """Return the stationary distribution [S] over trees: how often each is drafted."""
    moves_SS = torch.zeros(len(trees), len(trees), dtype=torch.float64)
    for state, tree in enumerate(trees):
        for end, ahead in zip(tree.ends, tree.ahead, strict=True):
            moves_SS[state, ahead] += end
    # Lazy chain: the same stationary distribution, and its powers converge even with cycles.
    moves_SS = (moves_SS + torch.eye(len(trees), dtype=torch.float64)) / 2
    for _ in range(12):
        moves_SS = moves_SS @ moves_SS
    return moves_SS[0]


def _make_trees(paths: Paths, counts: Sequence[int], rows: int, width: int) -> list[SparseTree]:
    """Build each T_s from its `counts[s]` best candidates that are at most s deep."""
    kept = [
        [pair for pair in paths if len(pair[0]) <= state][: min(count, rows)]
        for state, count in enumerate(counts)
    ]
    expected = [1 + sum(share for _, share in pairs) for pairs in kept]
    trees = []
    for pairs, tokens in zip(kept, expected, strict=True):
        ends = _end_probs(pairs)
        ahead = _assign_rows(ends, expected, (rows - len(pairs)) // width)
        trees.append(SparseTree([path for path, _ in pairs], ahead, ends, tokens))
    return trees


def _assign_rows(ends: Sequence[float], expected: Sequence[float], room: int) -> list[int]:
    """Choose the length of each node's chain; the lengths sum to at most `room`.

    Starts with full chains and shortens one at a time, the one whose loss is smallest: the
    probability that the path ends at the node times the tokens that a shallower next tree loses.
    """
    ahead = [len(expected) - 1] * len(ends)

    def cost(node: int) -> tuple[float, int]:
        length = ahead[node]
        return ends[node] * (expected[length] - expected[length - 1]), node

    heap = [cost(node) for node in range(len(ends))]
    heapq.heapify(heap)
    for _ in range(sum(ahead) - room):
        _, node = heapq.heappop(heap)
        ahead[node] -= 1
        if ahead[node]:
            heapq.heappush(heap, cost(node))
    return ahead


def _end_probs(pairs: Paths) -> list[float]:
    """Return the probability that the accepted path ends at the root and at each node."""
    ends: dict[RankPath, float] = {(): 1.0}
    for path, share in pairs:
        ends[path] = share
        ends[path[:-1]] -= share
    return [max(0.0, end) for end in ends.values()]


class InPassDrafter(Drafter):
    """Drafter of T_s after a path whose last node's chain went s tokens ahead; T_0 at first."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of drafters that guess inside the target's pass."""

        nodes: int = option(
            32, "most rows of a pass, the root apart: proposed tokens and extra rows", minimum=1
        )
        depth: int = option(16, "most proposed tokens on a path", minimum=1, maximum=16)

    # Extra rows belong to the tree's nodes, so no drafter may add nodes or leave some out.
    combines = can_be_cut = False

    def __init__(
        self,
        heads: InPassHeads,
        paths: Paths,
        config: Config | None = None,
    ) -> None:
        self.config = config or self.Config()
        self.needs = heads.needs
        self._heads = heads.eval()
        self._extra_rows = heads.extra_rows
        self._width = len(self._extra_rows) // heads.num_heads
        self.trees = choose_trees(
            [(path, share) for path, share in paths if len(path) <= self.config.depth],
            num_heads=heads.num_heads,
            rows=self.config.nodes,
            width=self._width,
        )
        self._guesses: dict[Request, list[list[int]]] = {}

    def check_chains(self, target: str) -> None:
        raise UnsupportedError(
            f"{self.name} cannot draft for {target}: a recurrent state takes no extra rows"
        )

    def remove(self, request: Request) -> None:
        self._guesses.pop(request, None)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [
            self._draft(request.tokens[-1], self._guesses.get(request, []), most)
            for request, most in zip(requests, budget, strict=True)
        ]

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self._guesses[outcome.request] = self._guess(outcome)

    def _draft(self, root: int, guesses: Sequence[Sequence[int]], most: int) -> Draft:
        """Make the tree for these guesses, at most `most` deep, with its nodes' extra rows."""
        tree = self.trees[len(guesses)]
        nodes: dict[RankPath, int] = {(): 0}
        tokens, parents, ahead = [root], [-1], [tree.ahead[0]]
        for path, length in zip(tree.paths, tree.ahead[1:], strict=True):
            if len(path) <= most:
                nodes[path] = len(tokens)
                tokens.append(guesses[len(path) - 1][path[-1]])
                parents.append(nodes[path[:-1]])
                ahead.append(length)
        extra_rows: list[tuple[int, int]] = []
        # With no budget left this step's token is the last, and no next step needs guesses.
        if most > 0:
            for node, length in enumerate(ahead):
                first = len(tokens) + len(extra_rows) - 1
                extra_rows += [
                    (node if parent == 0 else first + parent, slot)
                    for parent, slot in self._extra_rows[: length * self._width]
                ]
        return Draft(tokens, parents, sources=list(nodes), extra_rows=extra_rows)

    def _guess(self, outcome: Outcome) -> list[list[int]]:
        """Return the best tokens at each depth, from the extra rows of the path's last node."""
        assert outcome.extra_logits_NV is not None
        draft, last = outcome.draft, outcome.path[-1]
        owners = draft.owners()[len(draft) :]
        kept = [row for row, owner in enumerate(owners) if owner == last]
        if not kept:
            return []
        rows_NV = outcome.extra_logits_NV[kept]
        logits_KV = rows_NV.view(-1, self._width, rows_NV.shape[-1]).mean(1)
        guesses: list[list[int]] = logits_KV.topk(min(TOP, logits_KV.shape[-1])).indices.tolist()
        return guesses
