"""Draft model: a smaller checkpoint with the same tokenizer proposes a chain or a tree.

`chain`: Leviathan et al. 2023, Chen et al. 2023. `iid`: several chains drawn independently, SpecTr
(Sun et al. 2023). `rsd-c` and `rsd-s`: trees of distinct siblings drawn by Gumbel noise, with a
constant number of branches or as a stochastic beam (Jeon et al. 2024, Kool et al. 2019). Above
temperature 0 tokens are drawn from q, the draft's distribution after warping, and the drafts carry
this q. At 0 the trees hold the likeliest tokens instead: of each node (`rsd-c`) or of a beam.

With an acceptance head a chain ends where a rejection is likely (`decode/heads/acceptance.py` says
why the distribution stays). With a judge head tokens of a chain are accepted that the verifier
rejects (`decode/heads/judge.py`): lossy.

The draft's cache holds committed tokens up to the root; the proposed tree grows in the cache's
tail, level by level. Suffixes: B requests, F nodes that are expanded, V target vocabulary, C chains
(or children of a node).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import options
from spectool.decode.cache import BatchCache
from spectool.decode.control.base import ControlStates
from spectool.decode.drafters.vocabulary import check_vocabulary
from spectool.decode.heads.acceptance import AcceptanceHead
from spectool.decode.heads.judge import JudgeHead
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Features, Needs, Outcome
from spectool.decode.request import Request, apply_controls
from spectool.decode.sampling import is_finite, not_finite_logits, pick, probs_by_row, take_top
from spectool.decode.target.base import Target
from spectool.decode.target.exits import open_draft
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError
from spectool.options import option


@dataclass(slots=True, eq=False)
class _Growth:
    """A request's draft while it grows. Node -1 is the root; `probs` begin with the root's q.

    `live` is false for padding; `frontier` are the nodes to expand next. `chains`: the last node of
    each `iid` chain. `scores`: the beams' log q and perturbed log q. `accepted`: the predicted
    probability that the target accepts all tokens of the chain.
    """

    request: Request
    depth: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)
    frontier: list[int] = field(default_factory=lambda: [-1])
    probs: list[Tensor] = field(default_factory=list)
    draws: dict[int, list[int]] = field(default_factory=dict)
    chains: list[int] = field(default_factory=list)
    scores: tuple[Tensor, Tensor] | None = None
    accepted: float = 1.0
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
            return self.request.control_states()
        if node not in self.states:
            above = self.control_states(self.parents[node])
            self.states[node] = above.advance(self.tokens[node])
        return self.states[node]

    def number_nodes(self) -> dict[int, int]:
        """Map each live node to its number in the finished draft, which has no padding."""
        live = [node for node, is_live in enumerate(self.live) if is_live]
        return {-1: 0} | {node: number for number, node in enumerate(live, start=1)}

    def draft(self, kind: Kind) -> Draft:
        numbers = self.number_nodes()
        live = [node for node in numbers if node >= 0]
        probs_NV = torch.stack(self.probs) if kind != "deterministic" and self.probs else None
        return Draft(
            [self.request.tokens[-1], *(self.tokens[node] for node in live)],
            [-1, *(numbers[self.parents[node]] for node in live)],
            [kind] * (len(live) + 1),
            probs_NV,
            {numbers[at]: [numbers[node] for node in drawn] for at, drawn in self.draws.items()},
        )


class DraftModelDrafter(Drafter):
    """Drafter by a smaller model, whose KV cache follows the committed tokens.

    `acceptance_head`, if one is set, ends chains by the threshold; `set_judge` sets a judge head.

    Raises:
        UnsupportedError: the draft model's vocabulary is not the target's.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `draft_model`."""

        depth: int = option(4, "most proposed tokens on a path", minimum=1, maximum=64)
        tree: Literal["chain", "iid", "rsd-c", "rsd-s"] = option(
            "chain", "one chain, several, or a tree of a constant branching or of a beam"
        )
        width: int = option(
            3, "chains, branches of a node or beams of a tree", minimum=1, maximum=64
        )
        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        acceptance: Path | None = option(
            None, "directory of an acceptance head, which ends chains where rejection is likely"
        )
        threshold: float = option(
            0.3, "probability of a rejection above which it ends a chain", minimum=0, maximum=1
        )
        judge: Path | None = option(
            None, "directory of a judge head, which accepts tokens that change no answer; lossy"
        )
        judge_threshold: float | None = option(
            None,
            "probability to change the answer below which it accepts; default: the head's",
            minimum=0,
            maximum=1,
        )
        exits: str | None = option(
            None, "thresholds of its exits (.5/.5/0), or auto, those of `distill sorted`"
        )

        def validate(self) -> None:
            """Check that a head on the draft model, or exits, get chains."""
            heads = [name for name in ("acceptance", "judge") if getattr(self, name) is not None]
            if heads and self.exits is not None:
                raise UsageError(f"{heads[0]}: the head takes a draft model without exits")
            if self.tree != "chain" and (heads or self.exits is not None):
                what = f"{heads[0]}: the head takes" if heads else "exits: a draft with exits takes"
                raise UsageError(f"{what} chains, not tree={self.tree}")
            if self.judge is None and self.judge_threshold is not None:
                raise UsageError("judge_threshold is the threshold of a head: judge=DIR")

    name = "draft_model"
    needs = Needs()
    combines = can_be_cut = False
    draft_model: Target[Any]
    acceptance_head: AcceptanceHead | None = None
    judge_head: JudgeHead | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config | None = None,
        *,
        target: Target[Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config or self.Config()
        self.draft_model = open_draft(model, self.config.exits, target.forward)
        self._vocab_size = target.vocab_size
        check_vocabulary(self.draft_model, target, tokenizer, target_tokenizer)
        self._device = target.device
        # The requests whose rows the cache has.
        self._requests: list[Request] = []
        self._cache = self.draft_model.cache(0)
        self._grown: list[_Growth] = []
        self._num_fed = 0
        # The states of a chain's tokens, for the judge.
        self._states_B1D: list[Tensor] = []

    def set_judge(self, head: JudgeHead) -> None:
        """Let a judge head accept tokens below its threshold, or below that of the options."""
        self.judge_head, self.needs = head, Needs(final=True)
        given = self.config.judge_threshold
        self._judge_below = head.threshold if given is None else given

    def check_chains(self, target: str) -> None:
        if self.config.tree != "chain":
            raise UsageError(
                f"{target}, whose state is recurrent, takes chains only, not tree="
                f"{self.config.tree}",
                hint="draft with tree=chain",
            )

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        if self.judge_head is not None:
            return ("judged",)
        if sampling.greedy:
            return ("deterministic",)
        return ("distinct",) if self.config.tree.startswith("rsd") else ("iid",)

    def remove(self, request: Request) -> None:
        if request in self._requests:
            left = [b for b, other in enumerate(self._requests) if other is not request]
            # In this order: after Ctrl-C in between, `remove` works for the others.
            self._requests = [self._requests[b] for b in left]
            self._cache.select(left)
            self._grown = [growth for growth in self._grown if growth.request is not request]

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        """Feed newly committed tokens, then grow the trees level by level."""
        new = requests[len(self._requests) :]
        fresh = self.draft_model.cache(len(new), self.draft_model.span(requests[0].context))
        lengths = self._cache.lengths if self._requests else []
        self._grown = [
            _Growth(request, self._limit_depth(request, held, limit, fresh.context))
            for request, held, limit in zip(
                requests, [*lengths, *fresh.lengths], budget, strict=True
            )
        ]
        self._num_fed = 0
        self._states_B1D = []
        deepest = max(growth.depth for growth in self._grown)
        logits_BFV = self._feed_committed(fresh)[:, None] if deepest else None
        if not self._requests:
            self._cache = fresh
        elif new:
            self._cache.join(fresh)
        self._requests = list(requests)
        for level in range(deepest):
            if not any(level < growth.depth and growth.frontier for growth in self._grown):
                break
            if level > 0:
                logits_BFV = self._feed_level()
            assert logits_BFV is not None
            self._expand(level, logits_BFV)
        if self.judge_head is not None and self._num_fed < max(len(g.tokens) for g in self._grown):
            # The judge reads the last tokens' states too.
            self._feed_level()
        return [growth.draft(*self.kinds(growth.request.sampling)) for growth in self._grown]

    @torch.inference_mode()
    def judge(self, drafts: Sequence[Draft], features: Features) -> list[Tensor] | None:
        """Return the nodes [N] that the judge head accepts; the root is one."""
        if self.judge_head is None or not (self._grown and self._states_B1D):
            return None
        # Node n + 1 is the token whose state in the draft model is the n-th.
        target_BND = features["final"][:, 1:]
        draft_BND = torch.cat(self._states_B1D, 1)[:, : target_BND.shape[1]]
        prob_BN = self.judge_head.probs(draft_BND, target_BND)
        accept_BN = torch.nn.functional.pad(prob_BN < self._judge_below, (1, 0), value=True)
        return [accept_N[: len(draft)] for draft, accept_N in zip(drafts, accept_BN, strict=True)]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Commit the accepted nodes to the draft's cache."""
        # Empty where no draft was asked for in this step.
        if not self._grown:
            return
        paths = []
        for outcome, growth in zip(outcomes, self._grown, strict=True):
            nodes = {number: node for node, number in growth.number_nodes().items()}
            path = [nodes[number] for number in outcome.path[1:]]
            # The deepest level was proposed but fed for a judge head only.
            paths.append([node for node in path if node < self._num_fed])
        self._cache.commit([growth.tokens for growth in self._grown], paths)
        self._grown = []

    def _feed_committed(self, fresh: BatchCache) -> Tensor:
        """Feed committed tokens that the cache lacks, and the texts of new requests into `fresh`.

        Returns the logits [B, V] after each text. New texts pass apart from the others, which would
        be padded to their lengths.
        """
        known = len(self._requests)
        found: list[Tensor | None] = []
        for cache, grown in ((self._cache, self._grown[:known]), (fresh, self._grown[known:])):
            pairs = zip(grown, cache.lengths, strict=True)
            pending = [each.request.tokens[held:] if each.depth else [] for each, held in pairs]
            fed = self.draft_model.prefill(cache, pending).logits_BV if any(pending) else None
            found += [None] * len(grown) if fed is None else list(fed)
        like_V = next(logits_V for logits_V in found if logits_V is not None)
        zeros_V = torch.zeros_like(like_V)
        return torch.stack([zeros_V if logits_V is None else logits_V for logits_V in found])

    def _feed_level(self) -> Tensor:
        """Feed the newest nodes of all trees; return the logits [B, F, V] after them.

        The acceptance head then ends chains with their next tokens, which are not drawn yet.
        """
        size = max(len(growth.tokens) for growth in self._grown)
        for growth in self._grown:
            growth.pad(size)
        # `Target.grow` takes a node without a parent in the tail as its own parent.
        parents = [
            [node if parent < 0 else parent for node, parent in enumerate(growth.parents)]
            for growth in self._grown
        ]
        tokens = [growth.tokens for growth in self._grown]
        wanted = Needs(final=self.acceptance_head is not None or self.judge_head is not None)
        with self.draft_model.capture_features(wanted) as features:
            logits_BFV = self.draft_model.grow(self._cache, tokens, parents, fed=self._num_fed)
        self._num_fed = size
        if self.judge_head is not None:
            self._states_B1D.append(features["final"])
        if self.acceptance_head is not None:
            accepted_B = self.acceptance_head.probs(features["final"][:, 0]).tolist()
            for growth, accepted in zip(self._grown, accepted_B, strict=True):
                growth.accepted *= accepted
                if 1 - growth.accepted > self.config.threshold:
                    growth.depth = min(growth.depth, sum(growth.live) + 1)
        return logits_BFV

    def _expand(self, level: int, logits_BFV: Tensor) -> None:
        """Add a level to every tree, from the logits after its newest nodes.

        A request gets an error where the draft model's logits are NaN or infinite.
        """
        # Ids beyond the target's vocabulary are cut off; ids that the draft lacks get q = 0.
        logits_BFV = logits_BFV[:, :, : self._vocab_size]
        grown = self._grown
        controlled_BFV = apply_controls(
            [growth.request for growth in grown],
            logits_BFV,
            lambda b: map(grown[b].control_states, grown[b].frontier),
        )
        probs = probs_by_row([growth.request.sampling for growth in grown], controlled_BFV)
        found: list[tuple[_Growth, int]] = []
        flat: list[Tensor] = []
        for b, growth in enumerate(grown):
            num_nodes = len(growth.frontier)
            if level >= growth.depth or not num_nodes:
                continue
            probs_FV = probs[b][:num_nodes]
            if not growth.request.sampling.greedy:
                missing = self._vocab_size - probs_FV.shape[1]
                padded_FV = torch.nn.functional.pad(probs_FV, (0, missing)).to(self._device)
                growth.probs += list(padded_FV)
            tokens, parents = self._choose(growth, level, probs_FV)
            found.append((growth, len(tokens)))
            # Its controls may exclude every token that the draft model has.
            has_tokens = (controlled_BFV[b, :num_nodes].amax(-1) > -torch.inf).all()
            flags = torch.stack([is_finite(logits_BFV[b, :num_nodes]), has_tokens])
            flat += [flags.long(), tokens, parents]
        values = torch.cat(flat).tolist()
        for growth, size in found:
            (finite, allowed, *chosen), values = values[: 2 + 2 * size], values[2 + 2 * size :]
            if finite and allowed:
                self._add(growth, chosen[:size], chosen[size:])
                continue
            growth.frontier = []
            if not finite:
                config = self.draft_model.model.config
                whose = f"the draft model {config._name_or_path or config.model_type}"
                growth.request.error = not_finite_logits(whose)

    def _choose(self, growth: _Growth, level: int, probs_FV: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the next level's tokens and, for each, its parent's index in the frontier."""
        request, config = growth.request, self.config
        position = len(request.tokens) + level
        if request.sampling.greedy:
            return self._choose_greedily(growth, probs_FV)
        if config.tree in ("chain", "iid"):
            chains = growth.chains or [-1] * (config.width if config.tree == "iid" else 1)
            # Chains are dropped before their next token is drawn: dropping them by their token
            # would change the distribution that the tokens follow.
            chains = chains[: config.nodes - sum(growth.live)]
            at = torch.tensor([growth.frontier.index(node) for node in chains], dtype=torch.long)
            numbers = [request.draws.uniform(position, "draft", c) for c in range(len(chains))]
            uniform_C = torch.tensor(numbers, dtype=torch.float64, device=probs_FV.device)
            at = at.to(probs_FV.device)
            return pick(probs_FV[at], uniform_C), at
        noise_FV = torch.stack(
            [request.draws.gumbel(position, f, probs_FV.shape[1]) for f in range(len(probs_FV))]
        ).to(probs_FV.device)
        logq_FV = probs_FV.double().log()
        if config.tree == "rsd-c":
            return take_top(logq_FV + noise_FV, self._num_branches(growth))
        return self._beam(growth, logq_FV, noise_FV)

    def _choose_greedily(self, growth: _Growth, scores_FV: Tensor) -> tuple[Tensor, Tensor]:
        """Choose like `_choose`, but the likeliest tokens."""
        if self.config.tree == "rsd-c":
            return take_top(scores_FV, self._num_branches(growth))
        if self.config.tree == "rsd-s":
            return self._beam(growth, scores_FV.double().log_softmax(-1), None)
        token_F = scores_FV.argmax(-1)
        return token_F, torch.zeros_like(token_F)

    def _num_branches(self, growth: _Growth) -> int:
        """Return how many children each frontier node may have, whatever the tokens are."""
        room = self.config.nodes - sum(growth.live)
        return min(self.config.width, room // len(growth.frontier))

    def _beam(
        self, growth: _Growth, logq_FV: Tensor, noise_FV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose the next beams: the paths of largest log q, perturbed by Gumbel noise if given.

        Kool et al. 2019, algorithm 1: siblings' perturbed values are drawn on condition that their
        maximum is their parent's.
        """
        width = min(self.config.width, self.config.nodes - sum(growth.live))
        zero_1 = logq_FV.new_zeros(1)
        log_F, perturbed_F = growth.scores or (zero_1, zero_1)
        log_FV = log_F[:, None] + logq_FV
        score_FV = log_FV
        if noise_FV is not None:
            free_FV = log_FV + noise_FV
            highest_F1 = free_FV.amax(-1, keepdim=True)
            # The numerically stable form from the paper's appendix.
            v_FV = perturbed_F[:, None] - free_FV + torch.log1p(-(free_FV - highest_F1).exp())
            score_FV = perturbed_F[:, None] - v_FV.clamp(min=0) - torch.log1p((-v_FV.abs()).exp())
            score_FV = score_FV.masked_fill(log_FV == -torch.inf, -torch.inf)
        flat = score_FV.flatten()
        # Tokens of probability 0 were not drawn.
        best = flat.topk(min(width, len(flat)))
        kept = best.indices[best.values > -torch.inf]
        growth.scores = (log_FV.flatten()[kept], flat[kept])
        return kept % logq_FV.shape[1], kept // logq_FV.shape[1]

    def _add(self, growth: _Growth, tokens: list[int], parents: list[int]) -> None:
        """Add chosen tokens below their parents (frontier indices); equal siblings become one."""
        frontier, known = growth.frontier, dict[tuple[int, int], int]()
        growth.frontier, chains = [], []
        for token, index in zip(tokens, parents, strict=True):
            parent = frontier[index]
            node = known.get((parent, token))
            if node is None:
                node = known[parent, token] = growth.add(token, parent)
                growth.frontier.append(node)
            else:
                growth.draws[parent].append(node)
            chains.append(node)
        growth.chains = chains

    def _limit_depth(self, request: Request, held: int, limit: int, context: int) -> int:
        """Return how deep the draft can propose; its context and vocabulary may be smaller."""
        if any(token >= self.draft_model.vocab_size for token in request.tokens[held:]):
            return 0
        return max(0, min(self.config.depth, limit, context - len(request.tokens)))
