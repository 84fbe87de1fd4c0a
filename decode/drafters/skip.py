"""Self-speculation: the target drafts with some attention and MLP blocks skipped.

SWIFT (Xia et al. 2024, arXiv:2410.06916). A set of skipped blocks is scored by how many of the last
generated tokens the thinned model predicts; random sets are tried, one per step, and the best is
kept. The draft is a chain that ends after a token of low probability, with other likely tokens as
siblings at each depth. Keys and values of draft tokens go into the tail of the target's cache,
which the next pass overwrites.

Differences from the release: the best set so far is scored again on each text, the cache is shared
instead of copied, and the search is random only (theirs takes a Bayesian step at every 25th set). A
skipped block returns zeros, to which the layer adds its residual, so the model is not rewritten.
Suffixes: B requests, N nodes, K likeliest tokens, W scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectool import families, options
from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.target.base import Target
from spectool.decode.tree import Draft, Trie
from spectool.errors import UnsupportedError
from spectool.options import option

# The authors' values: share of blocks that is skipped, tokens that a set is scored on, score that
# ends the search, and probability below which a token ends the chain.
_SHARE, _SCORED, _ENOUGH, _SURE = 0.45, 32, 0.95, 0.8
# (least probability of the likeliest token, number of its siblings); the authors' numbers include
# the token itself.
_SIBLINGS = ((0.95, 2), (0.8, 4), (0.5, 7), (0.0, 9))


class SkipDrafter(Drafter):
    """Drafter by the thinned target; the set of skipped blocks is kept across requests."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `skip`."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        depth: int = option(8, "most proposed tokens on a path", minimum=1, maximum=64)
        search: int = option(64, "sets of skipped blocks to try, one per step", minimum=0)

    name = "skip"
    needs = Needs()
    uses_target = True

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.score = -1.0
        self.tried = 0
        self._scored: Request | None = None
        self.skipped: frozenset[int] = frozenset()
        self._blocks: list[dict[nn.Module, Any]] = []
        self._generator = torch.Generator().manual_seed(0)

    def check_chains(self, target: str) -> None:
        raise UnsupportedError(
            f"skip cannot draft for {target}: its recurrent state cannot go back"
        )

    def attach(self, target: Target[Any]) -> None:
        """Find the target's blocks; skip every second layer at first.

        Raises:
            UnsupportedError: a layer has no attention or MLP block of a known name.
        """
        self._target = target
        layers = list(target.layers())[1:-1]
        self._blocks = [block for layer in layers for block in _find_blocks(target.name, layer)]
        # Blocks 2 i and 2 i + 1 are attention and MLP of layer i.
        self.skipped = frozenset(at for at in range(len(self._blocks)) if at // 2 % 2 == 0)
        note = f"skip: a model of {target.num_layers} layers has none to skip; decoding plainly"
        if not self._blocks and note not in target.notes:
            target.notes.append(note)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        self._cache = cache

    def remove(self, request: Request) -> None:
        if request is self._scored:
            self._scored = None

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        if not self._blocks:
            return [tree.root(request.tokens[-1]) for request in requests]
        self._search(requests)
        deepest = min(self.config.depth, self.config.nodes)
        return self._draft(requests, [min(deepest, limit) for limit in budget])

    def _search(self, requests: Sequence[Request]) -> None:
        """Score the best set once on the first request's text, then one random set per step."""
        if requests[0] is not self._scored:
            self._scored, self.score = requests[0], -1.0
        new = len(requests[0].tokens) - requests[0].num_prompt
        if self.tried >= self.config.search or self.score > _ENOUGH or new <= _SCORED:
            return
        if self.score < 0:
            self.score = self._score(requests, self.skipped)
            return
        self.tried += 1
        size = int(len(self._blocks) * _SHARE)
        order = torch.randperm(len(self._blocks), generator=self._generator)
        candidate = frozenset(order[:size].tolist())
        score = self._score(requests, candidate)
        if score > self.score:
            self.score, self.skipped = score, candidate

    def _score(self, requests: Sequence[Request], skipped: frozenset[int]) -> float:
        """Return the share of the first request's last tokens that the thinned model predicts."""
        # The tokens are fed once more in the tail, where they attend to the cache before them;
        # other requests get padding.
        tokens = [request.tokens[-1 - _SCORED : -1] for request in requests[:1]]
        tokens += [[0] * _SCORED for _ in requests[1:]]
        seen = list(self._cache.lengths)
        seen[0] -= _SCORED
        chains = [[0, *range(_SCORED - 1)] for _ in requests]
        with self._thinned(skipped):
            logits_BWV = self._target.grow(self._cache, tokens, chains, seen=seen)
        expected_W = torch.tensor(requests[0].tokens[-_SCORED:], device=logits_BWV.device)
        return float((logits_BWV[0].argmax(-1) == expected_W).float().mean())

    def _draft(self, requests: Sequence[Request], depths: Sequence[int]) -> list[Draft]:
        """Draft a chain per request with the thinned model, then add siblings."""
        chains = [[request.tokens[-1]] for request in requests]
        guesses: list[list[tuple[list[int], float]]] = [[] for _ in requests]
        growing = {b for b, depth in enumerate(depths) if depth > 0}
        while growing:
            fed = len(chains[0]) - 1
            parents = [[0, *range(fed)] for _ in requests]
            with self._thinned(self.skipped):
                logits_BNV = self._target.grow(self._cache, chains, parents, fed=fed)
            top_BK, prob_B = _take_likeliest(logits_BNV[:, -1])
            for b, chain in enumerate(chains):
                chain.append(top_BK[b][0])
                if b in growing:
                    guesses[b].append((top_BK[b], prob_B[b]))
                    if prob_B[b] < _SURE or len(guesses[b]) >= depths[b]:
                        growing.discard(b)
        pairs = zip(requests, guesses, strict=True)
        return [self._make_tree(request.tokens[-1], found) for request, found in pairs]

    def _make_tree(self, root: int, guesses: Sequence[tuple[list[int], float]]) -> Draft:
        """Make a tree of the chain first, then of siblings, the shallowest first."""
        trie = Trie(root, self.config.nodes)
        chain = [0]
        for top, prob in guesses:
            node = trie.add(top[0], chain[-1], _source(prob, 0))
            if node is None:
                break
            chain.append(node)
        for at, (top, prob) in enumerate(guesses[: len(chain) - 1]):
            count = next(count for least, count in _SIBLINGS if prob >= least)
            for rank, token in enumerate(top[1 : 1 + count], start=1):
                trie.add(token, chain[at], _source(prob, rank))
        return trie.draft()

    @contextmanager
    def _thinned(self, skipped: frozenset[int]) -> Iterator[None]:
        """Let these blocks be skipped within the context."""
        changed = [pair for at in skipped for pair in self._blocks[at].items()]
        try:
            for module, instead in changed:
                module.forward = instead
            yield
        finally:
            for module, _ in changed:
                # The instance attribute hid the class's method; without it that is back.
                module.__dict__.pop("forward", None)


def _source(prob: float, rank: int) -> Hashable:
    """Return a node's source: its rank, and the first token's probability in tenths."""
    return min(rank, 4), int(10 * prob)


def _take_likeliest(logits_BV: Tensor) -> tuple[list[list[int]], list[float]]:
    """Return each request's ten likeliest ids, and the probability of the first."""
    best = logits_BV.float().softmax(-1).topk(min(10, logits_BV.shape[-1]))
    return best.indices.tolist(), best.values[:, 0].tolist()


def _find_blocks(name: str, layer: nn.Module) -> list[dict[nn.Module, Any]]:
    """Return a layer's attention and MLP, each as modules with their forward when skipped."""
    children = dict(layer.named_children())
    attention = next((children[key] for key in families.ATTENTION if key in children), None)
    mlp = next((children[key] for key in families.MLP if key in children), None)
    if attention is None:
        raise UnsupportedError(f"skip: found no attention block in a layer of {name}")
    if mlp is not None:
        return [{attention: _ZeroForward(attention)}, {mlp: _ZeroForward(mlp)}]
    if {"fc1", "fc2"} <= children.keys():
        # OPT has no MLP module: its two linear layers belong to the decoder layer.
        last = children["fc2"]
        return [{attention: _ZeroForward(attention)}, {children["fc1"]: _same, last: _zeros}]
    raise UnsupportedError(f"skip: found no MLP block in a layer of {name}")


class _ZeroForward:
    """Replacement for a block's forward that returns zeros, and None for further values.

    The number of further values (attention weights, router scores) is taken from the first call,
    which runs the block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.num_values: int | None = None

    def __call__(self, *args: Any, **options: Any) -> Tensor | tuple[Tensor | None, ...]:
        if self.num_values is None:
            found = type(self.block).forward(self.block, *args, **options)
            self.num_values = len(found) if isinstance(found, tuple) else 0
        zeros = _zeros(args[0] if args else options["hidden_states"])
        return (zeros, *[None] * (self.num_values - 1)) if self.num_values else zeros


def _zeros(hidden: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def _same(hidden: Tensor) -> Tensor:
    return hidden
