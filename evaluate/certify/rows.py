"""Rows: whether a node has the same logits, bit for bit, alone and in passes with other nodes.

Each text is a prompt with a chain and a tree behind it. Alone, every node passes by itself after
its committed ancestors, as in plain decoding. Together, nodes pass as verification feeds them.
Suffixes: N nodes of one text, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectool.decode.cache import BatchCache
from spectool.decode.target import row_attention
from spectool.decode.target.base import Target
from spectool.decode.tree import Draft, chain, root
from spectool.model.experts import are_chosen
from spectool.model.kernels import has_products

# A node's parent is among so many nodes before it, which makes trees both deep and wide.
REACH = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of the passes of one shape: `width` nodes of each of `batch` texts.

    `kind`: `chain`, `tree`, or `mixed` (texts take turns with a chain and a tree of half the width,
    which is padded). `differ` counts the rows with other bits than alone, `largest` is the largest
    difference of a logit. `forward`: what computed the layers.
    """

    forward: str
    kind: str
    width: int
    batch: int
    rows: int
    differ: int
    largest: float


@dataclass(frozen=True, slots=True)
class Alone:
    """A draft, and the logits [N, V] after each of its nodes when it passes alone."""

    draft: Draft
    logits_NV: Tensor

    def cut(self, width: int) -> Draft:
        """Return the tree of the first `width` nodes."""
        return self.draft.keep(range(min(width, len(self.draft))))


def promises_rows(target: Target[Any]) -> bool:
    """Whether no sum of a row's depends on the other rows, in products and in attention."""
    if target.rows_are_independent:
        return True
    model = target.model
    attends_by_row = model.config._attn_implementation == row_attention.NAME
    # By modules routers multiply by torch.
    return has_products(model) and attends_by_row and are_chosen(model)


@torch.inference_mode()
def compare_rows(
    target: Target[Any],
    prompts: Sequence[Sequence[int]],
    *,
    widths: Sequence[int],
    batches: Sequence[int],
    forward: str,
    seed: int = 0,
) -> Iterator[Rows]:
    """Compare each shape of pass with passes of one node; yields shapes by batch, then width.

    Text i of a batch continues prompt i, modulo their number. Targets that take chains only have no
    trees.
    """
    most = min(len(prompts), max(batches))
    texts = [
        _continue(target, prompts[index], max(widths), random.Random(f"{seed} {index}"))
        for index in range(most)
    ]
    for batch in batches:
        picked = [index % most for index in range(batch)]
        cache = _join(target, [prompts[index] for index in picked])
        for width in widths:
            kinds = ["chain", "tree", "mixed"] if target.takes_trees else ["chain"]
            for kind in kinds[:2] if batch == 1 else kinds:
                rows = [_pick(texts[index], kind, at, width) for at, index in enumerate(picked)]
                yield _compare(target, cache, rows, forward, kind, width)


def _pick(text: dict[str, Alone], kind: str, at: int, width: int) -> tuple[Alone, int]:
    """Return the draft of text number `at` in a pass, and how many nodes it has there."""
    if kind != "mixed":
        return text[kind], width
    return (text["tree"], max(1, width // 2)) if at % 2 else (text["chain"], width)


def _compare(
    target: Target[Any],
    cache: BatchCache,
    texts: Sequence[tuple[Alone, int]],
    forward: str,
    kind: str,
    width: int,
) -> Rows:
    """Feed the drafts in one pass, and compare each node's logits with those alone."""
    found_BNV = target.verify(cache, [alone.cut(nodes) for alone, nodes in texts]).logits_BNV
    count, differ, largest = 0, 0, 0.0
    for (alone, nodes), found_NV in zip(texts, found_BNV, strict=True):
        expected_NV = alone.logits_NV[:nodes]
        gaps_N = (found_NV[: len(expected_NV)].float() - expected_NV.float()).abs().amax(-1)
        count += len(gaps_N)
        # NaN equals nothing, so a row of NaN counts as another one.
        differ += int((gaps_N != 0).sum())
        largest = max(largest, float(gaps_N.max()))
    return Rows(
        forward=forward,
        kind=kind,
        width=width,
        batch=len(texts),
        rows=count,
        differ=differ,
        largest=largest,
    )


def _continue(
    target: Target[Any], prompt: Sequence[int], nodes: int, rng: random.Random
) -> dict[str, Alone]:
    """Make the chain of the greedy continuation, and a tree of tokens that the text has."""
    cache, last_V = read_prompt(target, prompt)
    written, logits = [int(last_V.argmax())], list[Tensor]()
    for _ in range(nodes):
        logits.append(feed(target, cache, written[-1]))
        written.append(int(logits[-1].argmax()))
    found = {"chain": Alone(chain(written[:-1], kind="deterministic"), torch.stack(logits))}
    if target.takes_trees:
        parents = [-1, *(rng.randrange(max(0, node - REACH), node) for node in range(1, nodes))]
        known = [*prompt, *written]
        tokens = [written[0], *(rng.choice(known) for _ in parents[1:])]
        tree = Draft(tokens, parents)
        cache, _ = read_prompt(target, prompt)
        found["tree"] = Alone(tree, _feed_tree(target, cache, tree))
    return found


def _feed_tree(target: Target[Any], cache: BatchCache, tree: Draft) -> Tensor:
    """Return the logits [N, V] after each node of a tree, each fed after its ancestors, alone."""
    begin = cache.lengths[0]
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    logits: dict[int, Tensor] = {}
    # Depth first, so that the committed tokens are the node's ancestors.
    waiting = [0]
    while waiting:
        node = waiting.pop()
        cache.truncate(0, begin + tree.depths[node])
        logits[node] = feed(target, cache, tree.tokens[node])
        waiting += children.get(node, [])
    return torch.stack([logits[node] for node in range(len(tree))])


def read_prompt(target: Target[Any], prompt: Sequence[int]) -> tuple[BatchCache, Tensor]:
    """Return a cache of one text that holds a prompt, and the logits [V] after it.

    An encoder-decoder reads the prompt as its source.
    """
    cache: BatchCache = target.cache(1, target.context)
    if target.start_ids:
        target.begin(cache, [prompt])
    return cache, target.prefill(cache, [list(target.start_ids or prompt)]).logits_BV[0]


def feed(target: Target[Any], cache: BatchCache, token: int) -> Tensor:
    """Feed and commit one token of one text, as plain decoding does; returns the logits [V]."""
    logits_V: Tensor = target.verify(cache, [root(token)]).logits_BNV[0, 0]
    cache.commit([[token]], [[0]])
    return logits_V.clone()


def _join(target: Target[Any], prompts: Sequence[Sequence[int]]) -> BatchCache:
    """Return the cache of a batch whose prompts were read one by one."""
    first, *others = (read_prompt(target, prompt)[0] for prompt in prompts)
    for other in others:
        first.join(other)
    return first
