"""Draft trees as flat arrays. Knows neither models nor vocabularies.

Node 0 is the pending root: the last committed token, which is not in the cache yet. Parents come
before their children, siblings stand in the order in which they are to be tried. Tensor suffixes: B
rows of the batch, N nodes of a tree (root included), V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

# How a node was proposed: looked up or ranked; drawn from the distribution after its parent,
# independently of its siblings; drawn from that distribution without the siblings before it. Two
# kinds change the text: a node that is accepted without a test, and an `iid` one (greedy: the
# likeliest) that the drafter may accept where the verifier does not (`Drafter.judge`).
Kind = Literal["deterministic", "iid", "distinct", "forced", "judged"]


@dataclass(slots=True)
class Draft:
    """The tree of one request. `kinds` are deterministic by default; the root's means nothing.

    `probs_NV[i]` are the probabilities that the children of node i were drawn from (fp32, after
    warping, over the target's vocabulary); needed where children are sampled. Trailing leaves have
    no row. `draws[i]` are the children of node i in the order of the draws, with repetitions; None
    where each was drawn once, in the order of the nodes. `sources[i]` says how node i was found:
    nodes of one source are about equally likely to be accepted, and no source may depend on the
    token of a sampled node. `extra_rows` pass with the tree and are never committed: each
    is its parent (numbers continue after the nodes) and its slot (`protocol.Inject`).
    """

    tokens: list[int]
    parents: list[int]
    kinds: list[Kind] = field(default_factory=list)
    probs_NV: Tensor | None = None
    draws: dict[int, list[int]] | None = None
    sources: Sequence[Hashable] | None = None
    extra_rows: Sequence[tuple[int, int]] = ()
    depths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = self.kinds or ["deterministic"] * len(self.tokens)
        assert len(self.tokens) == len(self.parents) == len(self.kinds) >= 1
        assert self.parents[0] == -1
        self.depths = [0]
        for node in range(1, len(self.parents)):
            assert 0 <= self.parents[node] < node, "parents come before their children"
            self.depths.append(self.depths[self.parents[node]] + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Return whether every node has at most one child."""
        return self.depths[-1] == len(self.tokens) - 1

    @property
    def num_rows(self) -> int:
        """Return how many rows pass through the target: nodes and extra rows."""
        return len(self.tokens) + len(self.extra_rows)

    def keep(self, nodes: Sequence[int]) -> Draft:
        """Return the tree of these nodes in ascending order, the root among them.

        Not for drawn nodes: their probabilities are left out.
        """
        index_of = {node: index for index, node in enumerate(nodes)}
        return Draft(
            [self.tokens[node] for node in nodes],
            [-1, *(index_of[self.parents[node]] for node in nodes[1:])],
            [self.kinds[node] for node in nodes],
            sources=None if self.sources is None else [self.sources[node] for node in nodes],
        )

    def owners(self) -> list[int]:
        """Return the node of each row: itself, or the one that an extra row's chain begins at."""
        owners = list(range(len(self.tokens)))
        for parent, _ in self.extra_rows:
            owners.append(owners[parent])
        return owners

    def drawn(self) -> dict[int, list[int]]:
        """Return the children of each node in the order of the draws, also where `draws` is None.

        Nodes without children are left out.
        """
        if self.draws is not None:
            return self.draws
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents[1:], start=1):
            children.setdefault(parent, []).append(node)
        return children


def root(token: int) -> Draft:
    """Make the draft that proposes nothing."""
    return Draft([token], [-1])


def chain(tokens: Sequence[int], *, kind: Kind, probs_NV: Tensor | None = None) -> Draft:
    """Make the draft of a single path: the root's token, then the proposals."""
    return Draft(list(tokens), list(range(-1, len(tokens) - 1)), [kind] * len(tokens), probs_NV)


def first_path(draft: Draft, most: int | None = None) -> Draft:
    """Cut a draft to its path of first children, at most `most` proposals, as `Draft.keep` does."""
    nodes = [0]
    for node in range(1, len(draft)):
        if draft.parents[node] == nodes[-1] and len(nodes) - 1 != most:
            nodes.append(node)
    return draft.keep(nodes)


class Trie:
    """A tree merged from deterministic continuations of the root, of at most `nodes` proposals."""

    def __init__(self, root_token: int, nodes: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
        self.sources: list[Hashable] = [()]
        self.nodes = nodes
        self._known: dict[tuple[int, int], int] = {}

    @property
    def full(self) -> bool:
        """Return whether no node can be added."""
        return len(self.tokens) > self.nodes

    def add(self, token: int, parent: int, source: Hashable = ()) -> int | None:
        """Return the node of this token below `parent`, adding it if there is room, else None."""
        node = self._known.get((parent, token))
        if node is None:
            if self.full:
                return None
            node = self._known[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.sources.append(source)
        return node

    def extend(self, path: Iterable[int], source: Hashable = ()) -> None:
        """Add a path from the root on, as far as there is room."""
        parent = 0
        for token in path:
            node = self.add(token, parent, source)
            if node is None:
                return
            parent = node

    def draft(self) -> Draft:
        """Return the tree as a draft."""
        return Draft(self.tokens, self.parents, sources=self.sources)


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth of a `RankTree`, and how to find them.

    `paths_PA` [parents, depth]: the nodes from the root to each node of the depth above that has
    children; `above_P`: the index of each such node's own parent in the level above, 0 for the
    root. For the C nodes of this depth: `parent_C` is the index among those parents, `rank_C` the
    rank among the parent's guesses.
    """

    paths_PA: Tensor
    above_P: Tensor
    nodes_C: Tensor
    parent_C: Tensor
    rank_C: Tensor


class RankTree:
    """A static tree: each node is the rank of a guess after its parent, whatever the token.

    `paths` are the nodes, each as the ranks from the root down, parents before their children.
    """

    def __init__(
        self, paths: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
    ) -> None:
        node_of = {(): 0} | {tuple(path): node for node, path in enumerate(paths, start=1)}
        self.depths = [0, *map(len, paths)]
        self.parents = [-1, *(node_of[tuple(path[:-1])] for path in paths)]
        self.sources = [(), *map(tuple, paths)]
        self.levels: list[Level] = []
        before = [-1]
        assert all(parent < node for node, parent in enumerate(self.parents))
        for depth in range(1, 1 + max(self.depths)):
            nodes = [node for node, at in enumerate(self.depths) if at == depth]
            above = sorted({self.parents[node] for node in nodes})
            above_at = [before.index(self.parents[node]) for node in above]
            to_parents = [[node_of[self.sources[node][:i]] for i in range(depth)] for node in above]
            parents = [above.index(self.parents[node]) for node in nodes]
            ranks = [self.sources[node][-1] for node in nodes]
            columns = (to_parents, above_at, nodes, parents, ranks)
            self.levels.append(Level(*(torch.tensor(part, device=device) for part in columns)))
            before = above
        self._cuts = [self._cut(depth) for depth in range(1 + len(self.levels))]

    def draft(self, tokens: Sequence[int], depth: int) -> Draft:
        """Return the draft of these tokens, the root's first, cut to `depth`."""
        kept, parents, sources = self._cuts[min(depth, len(self.levels))]
        return Draft([tokens[node] for node in kept], parents, sources=sources)

    def _cut(self, depth: int) -> tuple[list[int], list[int], list[Hashable]]:
        """Return the nodes no deeper than `depth`, their parents among these and their sources."""
        kept = [node for node, at in enumerate(self.depths) if at <= depth]
        index_of = {node: index for index, node in enumerate(kept)}
        parents = [-1, *(index_of[self.parents[node]] for node in kept[1:])]
        return kept, parents, [self.sources[node] for node in kept]


def best_paths(ranks_RK: Tensor, *, nodes: int, top: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the `nodes` paths of ranks that most texts follow, best first, with each one's share.

    `ranks_RK[r, k]` is the rank of the true token among the guesses at depth k + 1 of text r; only
    ranks below `top` can be drafted. Shares fall along a path, so parents come first, and the first
    n paths are the best tree of n nodes; it brings 1 + the sum of its shares tokens per forward.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for ranks in ranks_RK.tolist():
        path: tuple[int, ...] = ()
        for rank in ranks:
            if rank >= top:
                break
            path = (*path, rank)
            counts[path] += 1
    order = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return [(path, counts[path] / len(ranks_RK)) for path in order[:nodes]]


def ancestor_mask(parents_BN: Tensor, depth: int) -> Tensor:
    """Return visibility inside trees [B, N, N]: node i sees node j if j is i or an ancestor of i.

    Roots and padding nodes are their own parents; `depth` is that of the deepest node.
    """
    num_nodes = parents_BN.shape[1]
    self_NN = torch.eye(num_nodes, dtype=torch.bool, device=parents_BN.device)
    visible_BNN = self_NN.expand(len(parents_BN), -1, -1)
    above_BN = parents_BN
    # Each step doubles how far up a node sees: the window of an evaluation is one deep chain.
    for _ in range(depth.bit_length()):
        index_BNN = above_BN[:, :, None].expand(-1, -1, num_nodes)
        visible_BNN = visible_BNN | visible_BNN.gather(1, index_BNN)
        above_BN = above_BN.gather(1, above_BN)
    return visible_BNN
