"""Medusa: heads on the target's last state, each guessing the token one place further ahead.

Cai et al. 2024 (arXiv:2401.10774), Medusa-1: the target stays frozen. Head k (from 0) reads h_t,
the state that the target's output matrix reads at t, and guesses x_{t+2+k}: residual blocks
x + SiLU(W x + b), then an output matrix U_k. W begins at zero and U_k as the target's own, so that
before training every head says what the target says of x_{t+1}. Loss: the sum over k of 0.8^k times
head k's mean cross entropy. A step drafts one static tree of the heads' top guesses.

Shapes: K heads, R rows (places in texts), D width, V tokens that heads can guess, G guesses of a
head, B rows of a batch, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Lesson, Needs, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control
from spectool.decode.tree import Draft, Kind, RankTree
from spectool.options import option

from .heads import MOST_NODES, TOP, HeadLoss, cross_entropy, ranks_of, vocabulary_of

# A head further ahead is less often right, and less often reached (the paper's lambda_k).
_DECAY = 0.8


class MedusaHead(nn.Module):
    """One head: residual blocks, and its own output matrix unless the target's serves."""

    lm_head: nn.Linear | None

    def __init__(self, width: int, output: nn.Linear | None, num_layers: int) -> None:
        super().__init__()
        blocks = [nn.Linear(width, width) for _ in range(num_layers)]
        for block in blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = output

    def forward(self, state_RD: Tensor) -> Tensor:
        for block in self.blocks:
            state_RD = state_RD + F.silu(block(state_RD))
        return state_RD


class MedusaHeads(nn.Module):
    """All heads, for a target. `token_map` [V] holds the target's ids of what they can guess."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(4, "tokens guessed ahead", minimum=1, maximum=16)
        num_layers: int = option(1, "residual blocks of a head", minimum=1, maximum=8)
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: all", minimum=0
        )
        shared_head: bool = option(
            False, "guess with the target's output matrix, not with one for each head"
        )

    needs: ClassVar[Needs] = Needs(final=True)
    token_map: Tensor | None

    def __init__(self, config: Config, output: nn.Linear, token_map: Tensor | None) -> None:
        """Fresh heads; `output` is the target's output layer, which none of them changes."""
        super().__init__()
        self.config = config
        self.register_buffer("token_map", token_map)
        # Not part of the module's state: they belong to the target.
        self._shared = weight_VD, bias_V = vocabulary_of(output, token_map)
        vocab, width = weight_VD.shape
        self._each: list[MedusaHead] = []
        for _ in range(config.num_heads):
            own = None
            if not config.shared_head:
                # Made on the meta device: the random numbers of a fresh layer would be thrown away.
                own = nn.Linear(width, vocab, bias=bias_V is not None, device="meta")
                own.weight = nn.Parameter(weight_VD.clone())
                if bias_V is not None:
                    own.bias = nn.Parameter(bias_V.clone())
            self._each.append(MedusaHead(width, own, config.num_layers).to(weight_VD))
        self.heads = nn.ModuleList(self._each)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def output(self, head: MedusaHead) -> tuple[Tensor, Tensor | None]:
        """The output matrix of a head and its bias."""
        if head.lm_head is not None:
            return head.lm_head.weight, head.lm_head.bias
        weight_VD, bias_V = self._shared
        if weight_VD.dtype != self.dtype:
            # Once, not at every use: it is the largest matrix there is.
            self._shared = weight_VD, bias_V = (
                weight_VD.to(self.dtype),
                None if bias_V is None else bias_V.to(self.dtype),
            )
        return weight_VD, bias_V

    def guess(self, state_BD: Tensor, depth: int) -> Tensor:
        """The target's ids of the best guesses of the first `depth` heads, [B, depth, G]."""
        guesses = []
        for head in self._each[:depth]:
            logits_BV = F.linear(head(state_BD), *self.output(head))
            guesses.append(logits_BV.topk(min(TOP, logits_BV.shape[-1])).indices)
        tokens_BKG = torch.stack(guesses, 1)
        return tokens_BKG if self.token_map is None else self.token_map[tokens_BKG]

    def teach(self, lesson: Lesson) -> HeadLoss:
        """Add a lesson's gradients; the sums of each head's losses and right guesses."""
        done = HeadLoss(len(self._each))
        for k, head in enumerate(self._each):
            states_RD, labels_R = self._pairs(lesson, k)
            with torch.enable_grad():
                out_RD = head(states_RD)
            slope_RD, loss, right = cross_entropy(
                out_RD, *self.output(head), labels_R, scale=_DECAY**k / max(1, len(labels_R))
            )
            out_RD.backward(slope_RD)
            done.add(k, loss, right, len(labels_R))
        return done

    @torch.no_grad()
    def ranks(self, lesson: Lesson) -> Tensor:
        """Ranks [R, K] of the true tokens among each head's guesses, where all K are taught."""
        num_heads = len(self._each)
        taught_BL = lesson.taught_BL
        # Place t drafts x_{t+2} ... x_{t+1+K} after the target's own x_{t+1}.
        places_BL = taught_BL[:, 1 : taught_BL.shape[1] - num_heads].clone()
        for ahead in range(2, num_heads + 2):
            places_BL &= taught_BL[:, ahead : ahead + places_BL.shape[1]]
        batch_R, place_R = places_BL.nonzero(as_tuple=True)
        states_RD = lesson.features["final"][batch_R, place_R].to(self.dtype)
        columns = []
        for k, head in enumerate(self._each):
            labels_R = self._labels(lesson.tokens_BL[batch_R, place_R + 2 + k])
            columns.append(ranks_of(head(states_RD), *self.output(head), labels_R))
        return torch.stack(columns, 1)

    def _pairs(self, lesson: Lesson, k: int) -> tuple[Tensor, Tensor]:
        """States h_t [R, D] and labels x_{t+2+k} [R] of the places whose label is taught."""
        ahead = 2 + k
        labels_BL = self._labels(lesson.tokens_BL[:, ahead:])
        taught_BL = lesson.taught_BL[:, ahead:] & (labels_BL >= 0)
        states_BLD = lesson.features["final"][:, : taught_BL.shape[1]]
        return states_BLD[taught_BL].to(self.dtype), labels_BL[taught_BL]

    def _labels(self, tokens: Tensor) -> Tensor:
        """Places of tokens among those that can be guessed; -1 for the others."""
        if self.token_map is None:
            return tokens
        places = torch.searchsorted(self.token_map, tokens.contiguous()).clamp_(
            max=len(self.token_map) - 1
        )
        return torch.where(self.token_map[places] == tokens, places, -1)


class MedusaDrafter(Drafter):
    """Drafts the heads' static tree; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=MOST_NODES)
        depth: int = option(16, "most proposed tokens in a row", minimum=1, maximum=16)

    name = "medusa"
    Heads = MedusaHeads
    needs = MedusaHeads.needs

    def __init__(
        self, heads: MedusaHeads, paths: Sequence[Sequence[int]], config: Config | None = None
    ) -> None:
        """`paths`: the tree's nodes as ranks, best first, so that any beginning is a tree."""
        self.config = config or self.Config()
        self._heads = heads.eval()
        depth = min(self.config.depth, len(heads.heads))
        kept = [path for path in paths if len(path) <= depth][: self.config.nodes]
        # Near the end of a row a tree may not be as deep: one for each depth.
        self._trees = [
            RankTree([path for path in kept if len(path) <= most]) for most in range(depth + 1)
        ]
        self._states: dict[int, Tensor] = {}

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[Prompt], cache: TreeCache) -> None:
        self._states = {
            prompt.row.index: prompt.features["final"][-1].clone() for prompt in prompts
        }

    @torch.inference_mode()
    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        depths = [min(limit, len(self._trees) - 1) for limit in budget]
        deepest = max((max(self._trees[most].depths, default=0) for most in depths), default=0)
        if deepest == 0:
            return [tree.root(row.tokens[-1]) for row in rows]
        states_BD = torch.stack([self._states[row.index] for row in rows])
        guesses = self._heads.guess(states_BD, deepest).tolist()
        return [
            self._trees[most].fill(row.tokens[-1], guess)
            for row, most, guess in zip(rows, depths, guesses, strict=True)
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            final_ND = outcome.features["final"]
            self._states[outcome.row.index] = final_ND[outcome.path[-1]]
