"""Medusa: heads on the target's final state, each guessing one token further ahead.

Cai et al. 2024 (arXiv:2401.10774), Medusa-1: the target is frozen. Head k (from 0) guesses
x_{t+2+k} from h_t, the state that the target's lm_head reads at position t: residual blocks
x + SiLU(W x + b), then an lm_head U_k. W starts at zero and U_k as the target's lm_head, so that
untrained heads predict what the target predicts for x_{t+1}. Loss: the sum over k of 0.8^k times
head k's mean cross entropy. A step drafts one static tree of the heads' top guesses, which do not
depend on the tokens drafted before them.

Shapes: B requests of a batch, R positions in texts, D width, N nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.heads.base import Heads, TreeDrafter
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.options import option
from spectool.training import LossSpec, TrainingBatch


class MedusaHead(nn.Module):
    """One draft head: residual blocks, and its own lm_head unless it shares the target's."""

    def __init__(self, width: int, output: nn.Linear | None, num_layers: int) -> None:
        super().__init__()
        self.blocks = make_residual_blocks(width, num_layers)
        self.lm_head = output

    def forward(self, state: Tensor) -> Tensor:
        for block in self.blocks:
            state = state + F.silu(block(state))
        return state


class MedusaHeads(Heads):
    """Medusa heads; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(4, "tokens guessed ahead", minimum=1, maximum=16)
        num_layers: int = option(1, "residual blocks of a head", minimum=1, maximum=8)
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: all", minimum=0
        )
        shared_head: bool = option(
            False, "guess with the target's lm_head, not with one for each head"
        )

    needs = Needs(final=True)
    supports_packing = True
    # A head further ahead is less often right, and less often reached (the paper's lambda_k).
    loss = LossSpec(decay=0.8)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        weight_VD, has_bias = self.frozen.weight_VD, self.frozen.bias_V is not None
        self._each = [
            MedusaHead(
                weight_VD.shape[1],
                None if config.shared_head else self.new_lm_head(bias=has_bias),
                config.num_layers,
            ).to(weight_VD)
            for _ in range(config.num_heads)
        ]
        self.heads = nn.ModuleList(self._each)

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        state_RD = batch.features["final"][batch_R, position_R].to(self.dtype)
        for head in self._each:
            yield head(state_RD)

    def step(self, state_BD: Tensor, k: int) -> Tensor:
        """Compute the states [B, 1, D] that head k guesses from while drafting."""
        state_B1D: Tensor = self._each[k](state_BD[:, None])
        return state_B1D

    def own_lm_head(self, k: int) -> nn.Linear | None:
        return self._each[k].lm_head


def make_residual_blocks(width: int, num_layers: int) -> nn.ModuleList:
    """Make W and b of `num_layers` blocks x + SiLU(W x + b); zero, so each starts as identity."""
    blocks = [nn.Linear(width, width) for _ in range(num_layers)]
    for block in blocks:
        nn.init.zeros_(block.weight)
        nn.init.zeros_(block.bias)
    return nn.ModuleList(blocks)


class MedusaDrafter(TreeDrafter):
    """Drafter of the heads' static tree."""

    name = "medusa"
    Heads = MedusaHeads
    _heads: MedusaHeads

    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        return self._heads.step(state_BD, k)
