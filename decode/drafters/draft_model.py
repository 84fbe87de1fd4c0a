"""A smaller checkpoint with the same tokenizer proposes a chain or a tree.

`chain`: Leviathan et al. 2023, Chen et al. 2023. `iid`: several chains drawn independently, SpecTr
(Sun et al. 2023). `rsd-c` and `rsd-s`: trees of distinct siblings drawn by Gumbel noise, with a
constant number of branches or as a stochastic beam (Jeon et al. 2024, Kool et al. 2019). Above
temperature 0 tokens are drawn from the draft's warped law q, and the q they were really drawn from
goes along. At 0 the trees hold the likeliest tokens instead: of each node (`rsd-c`) or of a beam.

The draft's cache holds committed tokens up to the root; what it proposes grows in the cache's tail,
level by level. Suffixes: B rows, F nodes that are expanded, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import options
from spectool.decode.cache import TreeCache
from spectool.decode.control.base import ControlStates
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams, is_finite, not_finite_logits, pick
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.errors import UnsupportedError
from spectool.options import option

# Heads of one family are padded to different multiples; without tokenizers to compare, a larger
# difference than this means another vocabulary (the bound that llama.cpp uses).
_PADDING = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelConfig(options.Config):
    """Options of a draft checkpoint."""

    depth: int = option(4, "tokens proposed in a row", minimum=1, maximum=64)
    tree: Literal["chain", "iid", "rsd-c", "rsd-s"] = option(
        "chain", "one chain, several, or a tree of a constant branching or of a beam"
    )
    width: int = option(3, "chains, branches of a node or beams of a tree", minimum=1, maximum=64)
    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)


@dataclass(slots=True, eq=False)
class _Growth:
    """What is proposed for a row so far. Node -1 is the root, whose law comes first.

    `live` tells nodes from padding; `frontier` are the nodes to expand next. `chains` are where
    each of the `iid` chains has come to; `scores` are the beams' log q and perturbed log q.
    """

    row: Request
    depth: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)
    frontier: list[int] = field(default_factory=lambda: [-1])
    probs: list[Tensor] = field(default_factory=list)
    draws: dict[int, list[int]] = field(default_factory=dict)
    chains: list[int] = field(default_factory=list)
    scores: tuple[Tensor, Tensor] | None = None
    states: dict[int, ControlStates] = field(default_factory=dict)

    def add(self, token: int, parent: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.live.append(True)
        self.draws.setdefault(parent, []).append(len(self.tokens) - 1)
        return len(self.tokens) - 1

    def pad(self, size: int) -> None:
        while len(self.tokens) < size:
            self.parents.append(len(self.tokens))
            self.tokens.append(0)
            self.live.append(False)

    def control_states(self, node: int) -> ControlStates:
        """Return the states of the request's controls at a node."""
        if node < 0:
            return self.row.control_states()
        if node not in self.states:
            above = self.control_states(self.parents[node])
            self.states[node] = above.advance(self.tokens[node])
        return self.states[node]

    def places(self) -> dict[int, int]:
        """The node of the finished draft for each node of the growth."""
        live = [node for node, is_live in enumerate(self.live) if is_live]
        return {-1: 0} | {node: place for place, node in enumerate(live, start=1)}

    def draft(self, kind: Kind) -> Draft:
        places = self.places()
        live = [node for node in places if node >= 0]
        probs_NV = torch.stack(self.probs) if kind != "deterministic" and self.probs else None
        return Draft(
            [self.row.tokens[-1], *(self.tokens[node] for node in live)],
            [-1, *(places[self.parents[node]] for node in live)],
            [kind] * (len(live) + 1),
            probs_NV,
            {places[at]: [places[node] for node in drawn] for at, drawn in self.draws.items()},
        )


class DraftModelDrafter(Drafter):
    """Keeps a cache of its own, which follows the committed tokens row by row.

    Raises:
        UnsupportedError: the draft's vocabulary is not the target's.
    """

    name = "draft_model"
    Config = DraftModelConfig
    needs = Needs()
    combines = False

    def __init__(
        self,
        model: PreTrainedModel,
        config: DraftModelConfig | None = None,
        *,
        target: Target,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config or DraftModelConfig()
        self._draft = Target(model)
        self._vocab_size = target.vocab_size
        _compare(self._draft, target, tokenizer, target_tokenizer)
        self._device = target.device
        self._order: list[int] = []
        self._cache = self._draft.cache(0)
        self._grown: list[_Growth] = []
        self._num_fed = 0

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        if control.greedy:
            return ("deterministic",)
        return ("distinct",) if self.config.tree.startswith("rsd") else ("iid",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._order = [prompt.row.index for prompt in prompts]
        longest = max(prompt.row.most for prompt in prompts)
        self._cache = self._draft.cache(len(prompts), self._draft.span(longest))
        self._grown = []

    @torch.inference_mode()
    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        """Feed what was committed since, then grow the trees level by level."""
        self._drop_finished(rows)
        self._grown = [
            _Growth(row, self._depth(row, held, limit))
            for row, held, limit in zip(rows, self._cache.lengths, budget, strict=True)
        ]
        self._num_fed = 0
        control = rows[0].control
        deepest = max(growth.depth for growth in self._grown)
        for level in range(deepest):
            if level == 0:
                logits_BFV = self._feed_committed()[:, None]
            else:
                logits_BFV = self._feed_level()
            self._expand(control, level, logits_BFV)
        (kind,) = self.kinds(control)
        return [growth.draft(kind) for growth in self._grown]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Keep of the tail what was accepted; the deepest proposals were never fed.

        Nothing is there to keep of a step that it was not asked to draft for.
        """
        if not self._grown:
            return
        paths = []
        for outcome, growth in zip(outcomes, self._grown, strict=True):
            nodes = {place: node for node, place in growth.places().items()}
            path = [nodes[place] for place in outcome.path[1:]]
            paths.append([node for node in path if node < self._num_fed])
        self._cache.commit([growth.tokens for growth in self._grown], paths)
        self._grown = []

    def _feed_committed(self) -> Tensor:
        pairs = zip(self._grown, self._cache.lengths, strict=True)
        pending = [growth.row.tokens[held:] if growth.depth else [] for growth, held in pairs]
        return self._draft.prefill(self._cache, pending).logits_BV

    def _feed_level(self) -> Tensor:
        """Feed the newest nodes of all rows; logits [B, F, V] of them."""
        size = max(len(growth.tokens) for growth in self._grown)
        for growth in self._grown:
            growth.pad(size)
        # Tops of the forest are their own parents there.
        parents = [
            [node if parent < 0 else parent for node, parent in enumerate(growth.parents)]
            for growth in self._grown
        ]
        tokens = [growth.tokens for growth in self._grown]
        logits_BFV = self._draft.grow(self._cache, tokens, parents, fed=self._num_fed).logits_BNV
        self._num_fed = size
        return logits_BFV

    def _expand(self, control: SamplingParams, level: int, logits_BFV: Tensor) -> None:
        """Add a level to every row's tree, from the logits after its newest nodes.

        Raises:
            SpectoolError: the draft's logits are NaN or infinite.
        """
        # Ids that the target does not have cannot be drawn; those the draft lacks have q = 0.
        logits_BFV = logits_BFV[:, :, : self._vocab_size]
        growing = [growth for growth in self._grown if level < growth.depth and growth.frontier]
        probs_BFV = control.probs(self._controlled(logits_BFV))
        found: list[tuple[Tensor, Tensor]] = []
        for growth, probs_FV in zip(self._grown, probs_BFV, strict=True):
            if growth not in growing:
                continue
            probs_FV = probs_FV[: len(growth.frontier)]
            if not control.greedy:
                missing = self._vocab_size - probs_FV.shape[1]
                padded_FV = torch.nn.functional.pad(probs_FV, (0, missing)).to(self._device)
                growth.probs += list(padded_FV)
            found.append(self._choose(growth, level, probs_FV))
        flat = torch.cat([part for pair in found for part in pair])
        *values, all_finite = torch.cat([flat, is_finite(logits_BFV).long()[None]]).tolist()
        if not all_finite:
            raise not_finite_logits("the draft model")
        start = 0
        for growth, (tokens, _) in zip(growing, found, strict=True):
            size = len(tokens)
            parents = values[start + size : start + 2 * size]
            self._add(growth, values[start : start + size], parents)
            start += 2 * size

    def _controlled(self, logits_BFV: Tensor) -> Tensor:
        """Return the logits as each request's controls change them, in fp32 where there are any."""
        if not any(growth.row.controls for growth in self._grown):
            return logits_BFV
        logits_BFV = logits_BFV.to(torch.float32, copy=True)
        for growth, logits_FV in zip(self._grown, logits_BFV, strict=True):
            if growth.row.controls:
                for at, node in enumerate(growth.frontier):
                    logits_FV[at] = growth.control_states(node).process(logits_FV[at])
        return logits_BFV

    def _choose(self, growth: _Growth, level: int, probs_FV: Tensor) -> tuple[Tensor, Tensor]:
        """The next level's tokens and, for each, which node of the frontier it follows."""
        row, config, position = growth.row, self.config, len(growth.row.tokens) + level
        if row.control.greedy:
            return self._likeliest(growth, probs_FV)
        if config.tree in ("chain", "iid"):
            chains = growth.chains or [-1] * (config.width if config.tree == "iid" else 1)
            # Chains end before they are drawn on: to drop one for its token would bend the law.
            chains = chains[: config.nodes - sum(growth.live)]
            at = torch.tensor([growth.frontier.index(node) for node in chains], dtype=torch.long)
            numbers = [row.draws.uniform(position, "draft", c) for c in range(len(chains))]
            uniform_C = torch.tensor(numbers, dtype=torch.float64, device=probs_FV.device)
            at = at.to(probs_FV.device)
            return pick(probs_FV[at], uniform_C), at
        noise_FV = torch.stack(
            [row.draws.gumbel(position, f, probs_FV.shape[1]) for f in range(len(probs_FV))]
        ).to(probs_FV.device)
        logq_FV = probs_FV.double().log()
        if config.tree == "rsd-c":
            return _top(logq_FV + noise_FV, self._branches(growth))
        return self._beam(growth, logq_FV, noise_FV)

    def _likeliest(self, growth: _Growth, scores_FV: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.tree == "rsd-c":
            return _top(scores_FV, self._branches(growth))
        if self.config.tree == "rsd-s":
            return self._beam(growth, scores_FV.double().log_softmax(-1), None)
        token_F = scores_FV.argmax(-1)
        return token_F, torch.zeros_like(token_F)

    def _branches(self, growth: _Growth) -> int:
        """Children that each node of the frontier may have; looks at no token."""
        room = self.config.nodes - sum(growth.live)
        return min(self.config.width, room // len(growth.frontier))

    def _beam(
        self, growth: _Growth, logq_FV: Tensor, noise_FV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next beams: the largest log q of their paths, each perturbed by Gumbel noise.

        Kool et al. 2019, algorithm 1: a child's noise is drawn on the condition that the largest
        among siblings is its parent's.
        """
        width = min(self.config.width, self.config.nodes - sum(growth.live))
        zero_1 = logq_FV.new_zeros(1)
        log_F, perturbed_F = growth.scores or (zero_1, zero_1)
        log_FV = log_F[:, None] + logq_FV
        score_FV = log_FV
        if noise_FV is not None:
            free_FV = log_FV + noise_FV
            highest_F1 = free_FV.amax(-1, keepdim=True)
            v_FV = perturbed_F[:, None] - free_FV + torch.log1p(-(free_FV - highest_F1).exp())
            score_FV = perturbed_F[:, None] - v_FV.clamp(min=0) - torch.log1p((-v_FV.abs()).exp())
            score_FV = score_FV.masked_fill(log_FV == -torch.inf, -torch.inf)
        flat = score_FV.flatten()
        # Tokens of probability 0 were not drawn.
        best = flat.topk(min(width, len(flat)))
        kept = best.indices[best.values > -torch.inf]
        growth.scores = (log_FV.flatten()[kept], flat[kept])
        return kept % logq_FV.shape[1], kept // logq_FV.shape[1]

    def _add(self, growth: _Growth, tokens: list[int], places: list[int]) -> None:
        frontier, known = growth.frontier, dict[tuple[int, int], int]()
        growth.frontier, chains = [], []
        for token, place in zip(tokens, places, strict=True):
            parent = frontier[place]
            node = known.get((parent, token))
            if node is None:
                node = known[parent, token] = growth.add(token, parent)
                growth.frontier.append(node)
            else:
                growth.draws[parent].append(node)
            chains.append(node)
        growth.chains = chains

    def _drop_finished(self, rows: Sequence[Request]) -> None:
        order = [row.index for row in rows]
        if order != self._order:
            self._cache.select([self._order.index(index) for index in order])
            self._order = order

    def _depth(self, row: Request, held: int, limit: int) -> int:
        """Proposals that the draft can make: its context and its vocabulary may be smaller."""
        if any(token >= self._draft.vocab_size for token in row.tokens[held:]):
            return 0
        return max(0, min(self.config.depth, limit, self._cache.context - len(row.tokens)))


def _top(scores_FV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best tokens of each node, best first; those of probability 0 are left out."""
    best = scores_FV.topk(min(count, scores_FV.shape[1]))
    real_FC = best.values > -torch.inf
    return best.indices[real_FC], real_FC.nonzero()[:, 0]


def _compare(
    draft: Target,
    target: Target,
    tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Ids must mean the same in both models; sizes of the heads may differ by padding."""
    if tokenizer is None or target_tokenizer is None:
        if abs(draft.vocab_size - target.vocab_size) > _PADDING:
            raise UnsupportedError(
                f"the draft model has {draft.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model must share the target's tokenizer"
            )
        return
    own, wanted = tokenizer.get_vocab(), target_tokenizer.get_vocab()
    if own != wanted:
        differing = sorted(t for t in own.keys() | wanted.keys() if own.get(t) != wanted.get(t))
        token = differing[0]
        raise UnsupportedError(
            f"the draft model's tokenizer is not the target's: {len(differing)} tokens differ, "
            f"{token!r} has id {own.get(token)} there and {wanted.get(token)} here"
        )
    # Of tokens that were added to both tokenizers, but to one embedding only.
    highest = min(max(own.values()) + 1, target.num_tokens)
    if draft.num_tokens < highest:
        raise UnsupportedError(
            f"the draft model has {draft.num_tokens} tokens, the target's texts have ids up to "
            f"{highest - 1}"
        )
