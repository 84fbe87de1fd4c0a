"""Draft trees: tries, chains, ancestor masks."""

from __future__ import annotations

import random

import pytest
import torch

from spectool.decode import tree

from .trees import path_to, trie


def test_trie_shares_beginnings_and_keeps_order() -> None:
    draft = trie(9, [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3]], nodes=10)
    assert draft.tokens == [9, 1, 2, 3, 4, 5]
    assert draft.parents == [-1, 0, 1, 2, 2, 0]
    assert draft.depths == [0, 1, 2, 3, 3, 1]
    assert path_to(draft, 4) == [0, 1, 2, 4]
    assert not draft.is_chain


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_trie_stops_at_its_size_and_reads_no_further(nodes: int) -> None:
    read = []

    def paths():
        for token in range(100):
            read.append(token)
            yield [token, token]

    draft = trie(9, paths(), nodes=nodes)
    assert len(draft) == nodes + 1
    assert len(read) <= nodes


def test_root_and_chain() -> None:
    assert tree.root(3).depths == [0]
    assert tree.root(3).is_chain
    draft = tree.chain([3, 4, 5], kind="sampled")
    assert draft.parents == [-1, 0, 1]
    assert draft.is_chain


def test_parents_must_come_first() -> None:
    with pytest.raises(AssertionError, match="before their children"):
        tree.Draft([1, 2, 3], [-1, 2, 0], ["deterministic"] * 3)


def test_ancestor_mask_is_ancestry() -> None:
    noise = random.Random(0)
    drafts = [
        tree.Draft(
            [0] * size,
            [-1, *(noise.randrange(node) for node in range(1, size))],
            ["deterministic"] * size,
        )
        for size in (1, 7, 12)
    ]
    parents = [[0, *d.parents[1:], *range(len(d), 12)] for d in drafts]
    deepest = max(max(d.depths) for d in drafts)
    visible = tree.ancestor_mask(torch.tensor(parents), deepest)
    for row, draft in enumerate(drafts):
        for node in range(12):
            seen = set(path_to(draft, node)) if node < len(draft) else {node}
            assert set(visible[row, node].nonzero()[:, 0].tolist()) == seen
