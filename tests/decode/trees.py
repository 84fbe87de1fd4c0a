"""Trees made of paths, and the paths of trees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spectool.decode.tree import Draft, Trie


def trie(root_token: int, paths: Iterable[Sequence[int]], *, nodes: int) -> Draft:
    """Make the tree of these paths, the first ones first, of at most `nodes` proposals."""
    made = Trie(root_token, nodes)
    for path in paths:
        made.extend(path)
        if made.full:
            break
    return made.draft()


def path_to(draft: Draft, node: int) -> list[int]:
    """Return the nodes from the root to `node`, both included."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = draft.parents[node]
    return nodes[::-1]
