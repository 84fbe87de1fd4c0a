"""Drafters inside the target's own pass: what they share.

Beside the nodes of a tree pass rows of another kind, chains of K below a node: the row j places
ahead of a node at t guesses x_{t+j+1}, which is what the step after may draft at depth j. They see
the node and what is above it, nothing sees them but later rows of their chain, and they are never
committed. A step so verifies one tree and makes the guesses for the next, and pays for both in rows
of one pass.

Which nodes carry how many such rows is chosen as in PPD (Chen et al. 2024, arXiv:2405.18628, its
"dynamic sparse tree"): after a node with s rows the next tree, T_s, is at most s deep. With n
candidates each T_s holds the n likeliest paths; rows beside are taken from the nodes where drafts
rarely end and a shorter next tree costs little, until the budget holds; and of all numbers n those
are taken whose stationary law of s brings the most tokens a step.

Shapes: B rows of a batch, A places of a text, K rows ahead, R places, D width, N rows of a pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectool import options
from spectool.decode.cache import TreeCache
from spectool.decode.heads.base import TOP, Heads
from spectool.decode.protocol import Drafter, Inject, Outcome, PrefilledPrompt, TrainingBatch
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind
from spectool.options import option

# Numbers of candidates that are tried for each tree.
_TRIED = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Places of a text that pass together while its guesses are ranked.
_TOGETHER = 64

Path = tuple[int, ...]


class InPassHeads(Heads):
    """Heads whose states come out of the target's pass; it implements `rows` and `put`."""

    loss_target = "probs"
    config: Any

    @classmethod
    def num_guessed(cls, config: Any, vocab_size: int) -> int:
        # They guess with the target's own output layer.
        return 0

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The whole set below a node, as `Draft.beside` with the node as 0; K groups, in order."""
        raise NotImplementedError

    def put(self, batch: TrainingBatch) -> dict[int, Inject]:
        """What to inject beside the texts of a lesson."""
        raise NotImplementedError

    def choose(self, batch_R: Tensor, place_R: Tensor) -> tuple[Tensor, Tensor]:
        """At most `anchors` random places of each text: every one costs K rows of a pass."""
        score_R = torch.rand(len(batch_R), device=batch_R.device)
        kept = []
        for row in range(int(batch_R.max()) + 1 if len(batch_R) else 0):
            at_S = (batch_R == row).nonzero()[:, 0]
            kept.append(at_S[score_R[at_S].argsort()[: self.config.anchors]].sort().values)
        index_S = torch.cat(kept) if kept else batch_R
        return batch_R[index_S], place_R[index_S]

    def states(self, batch: TrainingBatch, batch_R: Tensor, place_R: Tensor) -> Iterator[Tensor]:
        assert batch.beside is not None
        inject, rows = self.put(batch), self.rows
        # Each text's places side by side, padded with the first.
        num_texts = len(batch.tokens_BL)
        count_B = torch.bincount(batch_R, minlength=num_texts)
        column_R = torch.arange(len(batch_R), device=batch_R.device)
        column_R = column_R - (count_B.cumsum(0) - count_B)[batch_R]
        most = int(count_B.max()) if len(batch_R) else 0
        places_BA = torch.zeros(num_texts, max(1, most), dtype=torch.long, device=batch_R.device)
        places_BA[batch_R, column_R] = place_R
        found = [
            batch.beside(part_BA, rows, inject)
            for part_BA in torch.split(places_BA, _TOGETHER, dim=1)
        ]
        states_RXD = torch.cat(found, 1)[batch_R, column_R].to(self.dtype)
        # The mean of rows' logits is that of the mean of their states.
        num_places, num_rows, width = states_RXD.shape
        by_head = (num_places, self.num_heads, num_rows // self.num_heads, width)
        yield from states_RXD.view(by_head).mean(2).unbind(1)

    def own_output(self, k: int) -> nn.Linear | None:
        return None

    def expected(self, paths: Sequence[tuple[Path, float]], nodes: int) -> float:
        width = len(self.rows) // self.num_heads
        return tokens_a_step(sparse_trees(paths, num_heads=self.num_heads, rows=nodes, width=width))


@dataclass(frozen=True, slots=True)
class SparseTree:
    """A tree and what passes beside it: paths of ranks, parents first, and rows ahead of each node.

    `ahead` begins with the root's, as do `ends`: how often the accepted path ends at each node.
    `expected` are the tokens that a step with it brings.
    """

    paths: list[Path]
    ahead: list[int]
    ends: list[float]
    expected: float


def sparse_trees(
    paths: Sequence[tuple[Path, float]], *, num_heads: int, rows: int, width: int = 1
) -> list[SparseTree]:
    """The trees T_0 ... T_K of at most `rows` rows beside the root, `width` of them a place ahead.

    `paths` are likely ones, best first, with the share of texts that follows each.
    """
    counts = [0] * (num_heads + 1)
    best = _trees(paths, counts, rows, width)
    most = tokens_a_step(best)
    for _ in range(2):
        for state in range(num_heads, 0, -1):
            for count in _TRIED:
                tried = [*counts[:state], count, *counts[state + 1 :]]
                trees = _trees(paths, tried, rows, width)
                tokens = tokens_a_step(trees)
                if tokens > most:
                    best, most, counts = trees, tokens, tried
    return best


def tokens_a_step(trees: Sequence[SparseTree]) -> float:
    """Tokens that a step brings in the long run."""
    shares = zip(stationary(trees).tolist(), trees, strict=True)
    return float(sum(share * tree.expected for share, tree in shares))


def stationary(trees: Sequence[SparseTree]) -> Tensor:
    """How often each tree is drafted in the long run, beginning with T_0."""
    moves_SS = torch.zeros(len(trees), len(trees), dtype=torch.float64)
    for state, tree in enumerate(trees):
        for end, left in zip(tree.ends, tree.ahead, strict=True):
            moves_SS[state, left] += end
    # Half of the time nothing moves: the long run is the same, and there are no cycles.
    moves_SS = (moves_SS + torch.eye(len(trees), dtype=torch.float64)) / 2
    for _ in range(12):
        moves_SS = moves_SS @ moves_SS
    return moves_SS[0]


def _trees(
    paths: Sequence[tuple[Path, float]], counts: Sequence[int], rows: int, width: int
) -> list[SparseTree]:
    """The trees of so many candidates each."""
    kept = [
        [pair for pair in paths if len(pair[0]) <= state][: min(count, rows)]
        for state, count in enumerate(counts)
    ]
    expected = [1 + sum(share for _, share in pairs) for pairs in kept]
    trees = []
    for pairs, tokens in zip(kept, expected, strict=True):
        ends = _ends(pairs)
        ahead = _ahead(ends, expected, (rows - len(pairs)) // width)
        trees.append(SparseTree([path for path, _ in pairs], ahead, ends, tokens))
    return trees


def _ahead(ends: Sequence[float], expected: Sequence[float], room: int) -> list[int]:
    """How far ahead each node's chain goes, with `room` for their sum.

    All as far as can be, then the row is taken away that costs the least of what comes after.
    """
    ahead = [len(expected) - 1] * len(ends)

    def cost(node: int) -> tuple[float, int]:
        left = ahead[node]
        return ends[node] * (expected[left] - expected[left - 1]), node

    heap = [cost(node) for node in range(len(ends))]
    heapq.heapify(heap)
    for _ in range(sum(ahead) - room):
        _, node = heapq.heappop(heap)
        ahead[node] -= 1
        if ahead[node]:
            heapq.heappush(heap, cost(node))
    return ahead


def _ends(pairs: Sequence[tuple[Path, float]]) -> list[float]:
    ends: dict[Path, float] = {(): 1.0}
    for path, share in pairs:
        ends[path] = share
        ends[path[:-1]] -= share
    return [max(0.0, end) for end in ends.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class InPassConfig(options.Config):
    """Options of drafters inside the pass."""

    nodes: int = option(32, "most rows of a pass beside the root: proposed and guessing", minimum=1)
    depth: int = option(16, "most proposed tokens in a row", minimum=1, maximum=16)


class InPassDrafter(Drafter):
    """Drafts T_s after a node with s rows ahead, beginning with T_0, which drafts nothing."""

    Config = InPassConfig
    # What passes beside a tree belongs to its nodes: none may be added or left out.
    combines = False

    def __init__(
        self,
        heads: InPassHeads,
        paths: Sequence[tuple[Path, float]],
        config: InPassConfig | None = None,
    ) -> None:
        self.config = config or InPassConfig()
        self.needs = heads.needs
        self._heads = heads.eval()
        self._set = heads.rows
        self._width = len(self._set) // heads.num_heads
        self.trees = sparse_trees(
            [(path, share) for path, share in paths if len(path) <= self.config.depth],
            num_heads=heads.num_heads,
            rows=self.config.nodes,
            width=self._width,
        )
        self._guesses: dict[int, list[list[int]]] = {}

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._guesses.clear()

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [
            self._draft(row.tokens[-1], self._guesses.get(row.index, []), most)
            for row, most in zip(rows, budget, strict=True)
        ]

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self._guesses[outcome.row.index] = self._guess(outcome)

    def _draft(self, root: int, guesses: Sequence[Sequence[int]], most: int) -> Draft:
        """The tree for so many guesses, no deeper than `most`, with the rows beside its nodes."""
        tree = self.trees[len(guesses)]
        places: dict[Path, int] = {(): 0}
        tokens, parents, ahead = [root], [-1], [tree.ahead[0]]
        for path, left in zip(tree.paths, tree.ahead[1:], strict=True):
            if len(path) <= most:
                places[path] = len(tokens)
                tokens.append(guesses[len(path) - 1][path[-1]])
                parents.append(places[path[:-1]])
                ahead.append(left)
        beside: list[tuple[int, int]] = []
        for node, left in enumerate(ahead):
            # Where a path ends with the last token there may be, nothing is drafted any more.
            first = len(tokens) + len(beside) - 1
            if most > 0:
                beside += [
                    (node if parent == 0 else first + parent, slot)
                    for parent, slot in self._set[: left * self._width]
                ]
        kinds: list[Kind] = ["deterministic"] * len(tokens)
        return Draft(tokens, parents, kinds, sources=list(places), beside=beside)

    def _guess(self, outcome: Outcome) -> list[list[int]]:
        """The best tokens of each row ahead of the node where the path ended."""
        assert outcome.extra_logits_NV is not None
        draft, last = outcome.draft, outcome.path[-1]
        own, owner = [], list(range(draft.num_rows))
        for row, (parent, _) in enumerate(draft.beside, start=len(draft)):
            owner[row] = owner[parent]
            if owner[row] == last:
                own.append(row - len(draft))
        if not own:
            return []
        rows_NV = outcome.extra_logits_NV[own]
        logits_KV = rows_NV.view(-1, self._width, rows_NV.shape[-1]).mean(1)
        found: list[list[int]] = logits_KV.topk(min(TOP, logits_KV.shape[-1])).indices.tolist()
        return found
