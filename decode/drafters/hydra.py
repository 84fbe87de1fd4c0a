"""Hydra: Medusa's heads that also read the tokens drafted before theirs.

Ankner et al. 2024 (arXiv:2402.05109). Head i (from 0) guesses x_{t+2+i} from

    z = [h_t ; E x_{t+1} ; ... ; E x_{t+1+i}],   R z + SiLU(W z + b),

then residual blocks x + SiLU(W x + b), then an lm_head U_i with a bias; E are the target's frozen
embeddings. `plain` has one block and is trained on the text's tokens. `plus` (Hydra++) has four
blocks, dropout before each and before U_i, is trained on the target's probabilities, and replaces
h_t by the output of a decoder layer over h_1 ... h_t ("prefix attention") with its own KV cache.
Loss: the sum over heads of the mean cross entropy.

R starts by selecting h_t from z, W at zero and U_i as the target's lm_head, so that untrained heads
predict what the target predicts for x_{t+1}; the authors start with a random R. A step drafts a
static tree, with one call of a head per depth for all its nodes.

Shapes: B texts or requests of a batch, L tokens, R positions in texts, D width, P nodes of a depth,
A ancestors, Z = (i + 2) D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.drafters.medusa import make_residual_blocks
from spectool.decode.heads.base import Heads, Paths, TreeDrafter
from spectool.decode.heads.layer import (
    DecoderLayer,
    DraftCache,
    NewText,
    Rotary,
    make_layer_config,
)
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch

_DROPOUT = 0.2
_BLOCKS = {"plain": 1, "plus": 4}


class HydraHead(nn.Module):
    """Draft head i: maps z to a state; has its own lm_head unless it shares the target's."""

    def __init__(
        self, width: int, i: int, output: nn.Linear | None, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.W = nn.Linear((i + 2) * width, width)
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)
        # R picks h_t out of z, so an untrained head returns the target's own state.
        self.R = nn.Linear((i + 2) * width, width, bias=False)
        nn.init.zeros_(self.R.weight)
        nn.init.eye_(self.R.weight[:, :width])
        self.blocks = make_residual_blocks(width, num_layers - 1)
        self.lm_head = output
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor) -> Tensor:
        # R z + SiLU(W z + b), then x + SiLU(W x + b) per further block.
        z = self.dropout(z)
        state = self.R(z) + F.silu(self.W(z))
        for block in self.blocks:
            state = self.dropout(state)
            state = state + F.silu(block(state))
        dropped: Tensor = self.dropout(state)
        return dropped


class HydraHeads(Heads):
    """Hydra heads; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        variant: Literal["plain", "plus"] = option(
            "plus", "plus: attention over the text, deeper heads, the target's probabilities"
        )
        num_heads: int = option(4, "tokens guessed ahead", minimum=1, maximum=16)
        num_layers: int = option(
            0, "residual blocks of a head; 0: 1 if plain, 4 if plus", minimum=0, maximum=8
        )
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: all", minimum=0
        )
        shared_head: bool = option(
            False, "guess with the target's lm_head, not with one for each head"
        )

    needs = Needs(final=True)
    supports_packing = True
    optimizer_defaults = OptimizerDefaults(rate=5e-4, weight_decay=0.1, final=0.33)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        plus = config.variant == "plus"
        self.loss = LossSpec(target="probs" if plus else "labels")
        weight_VD = self.frozen.weight_VD
        self._each = [
            HydraHead(
                weight_VD.shape[1],
                i,
                None if config.shared_head else self.new_lm_head(bias=True),
                config.num_layers or _BLOCKS[config.variant],
                _DROPOUT if plus else 0.0,
            ).to(weight_VD)
            for i in range(config.num_heads)
        ]
        self.heads = nn.ModuleList(self._each)
        shape = make_layer_config(model)
        self.rotary = Rotary(shape)
        self.prefix = DecoderLayer(shape).to(weight_VD) if plus else None

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        state_BLD = batch.features["final"].to(self.dtype)
        if self.prefix is not None:
            state_BLD = self.prefix(state_BLD, self.rotary.text(state_BLD, batch.segments_BL))
        parts = [state_BLD[batch_R, position_R]]
        last = batch.tokens_BL.shape[1] - 1
        for i, head in enumerate(self._each):
            # Clamped: positions past the end have no label, so their values are unused.
            token_R = batch.tokens_BL[batch_R, (position_R + 1 + i).clamp(max=last)]
            parts.append(self.embed(token_R))
            yield head(torch.cat(parts, -1))

    def step(self, state_BD: Tensor, path_BPA: Tensor, k: int) -> Tensor:
        """Compute the states [B, P, D] that head k guesses from while drafting.

        Each path is the root x_{t+1} and k drafted tokens below it.
        """
        state_BPD = state_BD[:, None].expand(-1, path_BPA.shape[1], -1)
        z_BPZ = torch.cat([state_BPD, self.embed(path_BPA).flatten(2)], -1)
        out_BPD: Tensor = self._each[k](z_BPZ)
        return out_BPD

    def own_lm_head(self, k: int) -> nn.Linear | None:
        return self._each[k].lm_head


class HydraDrafter(TreeDrafter):
    """Drafter of the heads' static tree; prefix attention runs once over committed tokens."""

    name = "hydra"
    Heads = HydraHeads
    _heads: HydraHeads

    def __init__(
        self, heads: HydraHeads, paths: Paths, config: TreeDrafter.Config | None = None
    ) -> None:
        draft_cache = DraftCache(heads.rotary, 1) if heads.prefix is not None else None
        super().__init__(heads, paths, config, draft_cache)

    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        return self._heads.step(state_BD, tokens_BN[:, self._tree.levels[k].paths_PA], k)

    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        if self._draft_cache is None or self._heads.prefix is None:
            return super()._read(new)
        finals = [text.features["final"].to(self._heads.dtype) for text in new]
        return self._draft_cache.feed(new, [finals], self._heads.prefix)
