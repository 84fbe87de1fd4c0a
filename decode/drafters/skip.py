"""The model drafts for itself without some of its attention and MLP blocks, chosen while it runs.

SWIFT (Xia et al. 2024, arXiv:2410.06916). A set of skipped blocks is scored by how many of the last
generated tokens the thinned model predicts; random sets are tried, one before a step, and the best
is kept. Drafting is a chain that ends after a token the thinned model is not sure of, with its
other likely tokens as siblings at each depth. Keys and values of draft tokens go into the tail of
the target's own cache, which the next pass overwrites.

Differs from the release: the incumbent is scored anew on each text, the caches are shared instead
of copied, and the search is random only (their Bayesian step is every 25th candidate). A block is
skipped by letting it return zeros, which its residual connection passes by: nothing of the model is
rewritten. Suffixes: B rows, W scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Needs, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind, Trie
from spectool.errors import UnsupportedError
from spectool.options import option

# As the authors have them: the share of blocks that is skipped, the tokens that a set is scored by,
# the score that ends the search, and how sure a token must be for the chain to go on after it.
_SHARE, _SCORED, _ENOUGH, _SURE = 0.45, 32, 0.95, 0.8
# Siblings beside the likeliest token, by its probability; theirs counts it in.
_SIBLINGS = ((0.95, 2), (0.8, 4), (0.5, 7), (0.0, 9))

# Names of a layer's blocks in transformers. Each returns what its residual connection adds.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "feedforward")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipConfig(options.Config):
    """Options of `skip`."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(8, "most proposed tokens in a row", minimum=1, maximum=64)
    search: int = option(64, "sets of blocks to try, one a step", minimum=0)


class SkipDrafter(Drafter):
    """Knowledge of which blocks to skip outlives batches."""

    name = "skip"
    Config = SkipConfig
    needs = Needs()

    def __init__(self, config: SkipConfig | None = None) -> None:
        self.config = config or SkipConfig()
        self.score = -1.0
        self.tried = 0
        self.skipped: frozenset[int] = frozenset()
        self._blocks: list[dict[nn.Module, Any]] = []
        self._generator = torch.Generator().manual_seed(0)

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def attach(self, target: Target) -> None:
        """Find the blocks; every second layer is skipped at first.

        Raises:
            UnsupportedError: a layer without such blocks.
        """
        self._target = target
        layers = list(target.layers())[1:-1]
        self._blocks = [block for layer in layers for block in _blocks(target.name, layer)]
        # 2 i and 2 i + 1 are attention and MLP of a layer.
        self.skipped = frozenset(at for at in range(len(self._blocks)) if at // 2 % 2 == 0)
        note = f"skip: a model of {target.num_layers} layers has none to skip; decoding plainly"
        if not self._blocks and note not in target.notes:
            target.notes.append(note)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._cache = cache
        self.score = -1.0

    @torch.inference_mode()
    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        if not self._blocks:
            return [tree.root(row.tokens[-1]) for row in rows]
        self._search(rows)
        deepest = min(self.config.depth, self.config.nodes)
        return self._draft(rows, [min(deepest, limit) for limit in budget])

    def _search(self, rows: Sequence[Request]) -> None:
        """Score the incumbent once on this text, then a new set a step."""
        new = len(rows[0].tokens) - rows[0].num_prompt
        if self.tried >= self.config.search or self.score > _ENOUGH or new <= _SCORED:
            return
        if self.score < 0:
            self.score = self._score(rows, self.skipped)
            return
        self.tried += 1
        size = int(len(self._blocks) * _SHARE)
        order = torch.randperm(len(self._blocks), generator=self._generator)
        candidate = frozenset(order[:size].tolist())
        score = self._score(rows, candidate)
        if score > self.score:
            self.score, self.skipped = score, candidate

    def _score(self, rows: Sequence[Request], skipped: frozenset[int]) -> float:
        """Share of the first row's last tokens that the thinned model predicts.

        They pass once more, in the tail, and see of the cache what came before them.
        """
        tokens = [row.tokens[-1 - _SCORED : -1] for row in rows[:1]]
        tokens += [[0] * _SCORED for _ in rows[1:]]
        seen = list(self._cache.lengths)
        seen[0] -= _SCORED
        chains = [[0, *range(_SCORED - 1)] for _ in rows]
        with self._thinned(skipped):
            logits_BWV = self._target.grow(self._cache, tokens, chains, seen=seen).logits_BNV
        expected_W = torch.tensor(rows[0].tokens[-_SCORED:], device=logits_BWV.device)
        return float((logits_BWV[0].argmax(-1) == expected_W).float().mean())

    def _draft(self, rows: Sequence[Request], depths: Sequence[int]) -> list[Draft]:
        chains = [[row.tokens[-1]] for row in rows]
        guesses: list[list[tuple[list[int], float]]] = [[] for _ in rows]
        open_rows = {b for b, depth in enumerate(depths) if depth > 0}
        while open_rows:
            fed = len(chains[0]) - 1
            parents = [[0, *range(fed)] for _ in rows]
            with self._thinned(self.skipped):
                logits_BNV = self._target.grow(self._cache, chains, parents, fed=fed).logits_BNV
            top_BK, share_B = _likeliest(logits_BNV[:, -1])
            for b, chain in enumerate(chains):
                chain.append(top_BK[b][0])
                if b in open_rows:
                    guesses[b].append((top_BK[b], share_B[b]))
                    if share_B[b] < _SURE or len(guesses[b]) >= depths[b]:
                        open_rows.discard(b)
        return [self._tree(row.tokens[-1], found) for row, found in zip(rows, guesses, strict=True)]

    def _tree(self, root: int, guesses: Sequence[tuple[list[int], float]]) -> Draft:
        """The chain first, then siblings, those of the shallowest depth first."""
        made = Trie(root, self.config.nodes)
        spine = [0]
        for top, share in guesses:
            node = made.add(top[0], spine[-1], _how_sure(share, 0))
            if node is None:
                break
            spine.append(node)
        for at, (top, share) in enumerate(guesses[: len(spine) - 1]):
            count = next(count for least, count in _SIBLINGS if share >= least)
            for rank, token in enumerate(top[1 : 1 + count], start=1):
                made.add(token, spine[at], _how_sure(share, rank))
        return made.draft()

    @contextmanager
    def _thinned(self, skipped: frozenset[int]) -> Iterator[None]:
        """The model without these blocks."""
        changed = [pair for at in skipped for pair in self._blocks[at].items()]
        try:
            for module, instead in changed:
                module.forward = instead
            yield
        finally:
            for module, _ in changed:
                # What was set hides the class's own method; without it that is back.
                module.__dict__.pop("forward", None)


def _how_sure(share: float, rank: int) -> Hashable:
    return min(rank, 4), int(10 * share)


def _likeliest(logits_BV: Tensor) -> tuple[list[list[int]], list[float]]:
    """Ids of each row's ten likeliest tokens, and the probability of the first."""
    best = logits_BV.float().softmax(-1).topk(min(10, logits_BV.shape[-1]))
    return best.indices.tolist(), best.values[:, 0].tolist()


def _blocks(name: str, layer: nn.Module) -> list[dict[nn.Module, Any]]:
    """A layer's attention and MLP, each as modules and what their forward becomes when skipped."""
    children = dict(layer.named_children())
    attention = next((children[key] for key in _ATTENTION if key in children), None)
    mlp = next((children[key] for key in _MLP if key in children), None)
    if attention is None:
        raise UnsupportedError(f"skip: found no attention block in a layer of {name}")
    if mlp is not None:
        return [{attention: _Nothing(attention)}, {mlp: _Nothing(mlp)}]
    if {"fc1", "fc2"} <= children.keys():
        # OPT: the MLP is written out in the layer.
        last = children["fc2"]
        return [{attention: _Nothing(attention)}, {children["fc1"]: _same, last: _zeros}]
    raise UnsupportedError(f"skip: found no MLP block in a layer of {name}")


class _Nothing:
    """In place of a block's forward: zeros, and None for what else it returns.

    How many values that are (weights, a router's scores) is seen at the first call, which runs the
    block as well.
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
