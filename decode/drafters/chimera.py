"""Chimera: heads over trigrams of drafted tokens that attend to the target's states.

Zeng et al. 2024 (arXiv:2402.15758). A token x_u and the two tokens before it (the text's first
token stands in for missing ones) give the trigram state

    z = [E x_{u-2} ; E x_{u-1} ; E x_u],   g_u = P (z + SiLU(W z + b)),

with E the target's frozen embeddings. One decoder layer reads the target's final states up to
position t, followed by the trigrams g_{t+1} ... g_{t+1+j}, each at its token's position:

    y_j = the layer's output at the last row of [h_1 ... h_t ; g_{t+1} ... g_{t+1+j}],

and head j (from 0) guesses x_{t+2+j} by U_j [h_t ; y_j]. Loss: the sum over j of the mean cross
entropy against the text's tokens and, `probs_weight` times, against the target's probabilities.

Each U_j starts as two copies of the target's lm_head, side by side. A step drafts a static tree
with one pass of the layer per depth, over the nodes that have children.

Differences: the authors train each head on the tokens that the chain itself guessed; here it reads
the text's own tokens, since a tree holds more than first guesses and a head only matters where all
earlier drafts were right. Their released code also trains the target and does not use the second
loss; here the target is frozen.

Shapes: B texts or requests of a batch, L tokens, R positions in texts, D width, N nodes or tokens,
P nodes of a depth, A ancestors, T nodes in the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from spectool import options
from spectool.decode.drafters.medusa import make_residual_blocks
from spectool.decode.heads.base import Heads, Paths, TreeDrafter
from spectool.decode.heads.layer import (
    DecoderLayer,
    DraftCache,
    NewText,
    Rotary,
    Sight,
    attend_chains,
    make_layer_config,
)
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch


class Trigram(nn.Module):
    """Map from three tokens' embeddings to one state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = make_residual_blocks(3 * width, 1)[0]
        self.proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, embedded_3D: Tensor) -> Tensor:
        """Compute g [..., D] from embeddings [..., 3, D]."""
        z = embedded_3D.flatten(-2)
        state: Tensor = self.proj(z + F.silu(self.block(z)))
        return state


class Context(nn.Module):
    """Decoder layer over the target's states and the trigrams that follow them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.layer = DecoderLayer(config)

    def keep(self, final_BND: Tensor, sight: Sight) -> Tensor:
        """Append the target's states to the cache as keys and values; return them unchanged."""
        # The layer's outputs at these states are used nowhere, so they are not computed.
        assert sight.cache is not None
        attention = self.layer.self_attn
        _, k, v = attention.project(self.layer.input_layernorm(final_BND), sight.rotary)
        sight.cache.update(k, v, attention.index)
        return final_BND

    def forward(self, trigram_BND: Tensor, sight: Sight) -> Tensor:
        """Compute y of trigrams that follow what the cache holds."""
        out: Tensor = self.layer(trigram_BND, sight)
        return out


class ChimeraHeads(Heads):
    """Chimera heads with the trigram map and the layer that they share."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(4, "tokens guessed ahead", minimum=1, maximum=16)
        probs_weight: float = option(
            1.0, "weight of the loss against the target's probabilities", minimum=0
        )
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: all", minimum=0
        )

    needs = Needs(final=True)
    optimizer_defaults = OptimizerDefaults(rate=2e-4)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        self.loss = LossSpec(
            target="both" if config.probs_weight else "labels", probs_weight=config.probs_weight
        )
        shape = make_layer_config(model)
        self.rotary = Rotary(shape)
        self.trigram = Trigram(shape.hidden_size)
        self.ctx = Context(shape)
        has_bias = self.frozen.bias_V is not None
        self._each = [self.new_lm_head(bias=has_bias, inputs=2) for _ in range(self.num_heads)]
        self.heads = nn.ModuleList(self._each)
        self.to(self.frozen.weight_VD)

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        final_BLD = batch.features["final"].to(self.dtype)
        last = batch.tokens_BL.shape[1] - 1
        positions_L = torch.arange(last + 1, device=final_BLD.device)
        rotary = self.rotary.at(positions_L[None], final_BLD)
        layer, attention = self.ctx.layer, self.ctx.layer.self_attn
        _, key, value = attention.project(layer.input_layernorm(final_BLD), rotary)
        keys, values = [key], [value]
        # A trigram depends on its last token's position alone: g of chain step j at position t is
        # g of step 0 at position t + j, so each is computed once.
        window_L3 = (positions_L[:, None] - torch.tensor([2, 1, 0]).to(positions_L)).clamp(min=0)
        trigram_BLD = self.trigram(self.embed(batch.tokens_BL[:, window_L3]))
        q, k, v = attention.project(layer.input_layernorm(trigram_BLD), rotary)
        for j in range(self.num_heads):
            # Clamped: positions past the end have no label, so their values are unused.
            at_L = (positions_L + 1 + j).clamp(max=last)
            keys.append(k[:, :, at_L])
            values.append(v[:, :, at_L])
            attended_BLD = attention.merge(attend_chains(q[:, :, at_L], keys, values))
            y_RD = layer.finish(
                trigram_BLD[batch_R, at_L[position_R]], attended_BLD[batch_R, position_R]
            )
            yield torch.cat([final_BLD[batch_R, position_R], y_RD], -1)

    def own_lm_head(self, k: int) -> nn.Linear | None:
        return self._each[k]


class ChimeraDrafter(TreeDrafter):
    """Drafter of the heads' static tree; its nodes are the tail of the layer's cache."""

    name = "chimera"
    Heads = ChimeraHeads
    _heads: ChimeraHeads
    _draft_cache: DraftCache

    def __init__(
        self, heads: ChimeraHeads, paths: Paths, config: TreeDrafter.Config | None = None
    ) -> None:
        super().__init__(heads, paths, config, DraftCache(heads.rotary, 1))
        # By depth: the depths of all nodes with children so far, and which of these nodes each of
        # the newest may attend to.
        self._tails: list[tuple[Tensor, Tensor]] = []
        nodes_T = torch.zeros(0, dtype=torch.long, device=heads.frozen.weight_VD.device)
        depths: list[int] = []
        for depth, level in enumerate(self._tree.levels):
            nodes_T = torch.cat([nodes_T, level.paths_PA[:, -1]])
            depths += [depth] * len(level.paths_PA)
            visible_PT = (level.paths_PA[:, :, None] == nodes_T).any(1)
            self._tails.append((torch.tensor(depths), visible_PT))

    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        finals = [text.features["final"].to(self._heads.dtype) for text in new]
        return self._draft_cache.feed(new, [finals], self._heads.ctx.keep)

    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        paths_PA = self._tree.levels[k].paths_PA
        # The trigrams of the root and its children begin with the committed tokens x_{t-1}, x_t.
        texts = [request.tokens for request in requests]
        before = [[tokens[max(0, len(tokens) - 3)], tokens[-2]] for tokens in texts]
        before_BP2 = torch.tensor(before).to(tokens_BN)[:, None].expand(-1, len(paths_PA), -1)
        tokens_BP3 = torch.cat([before_BP2, tokens_BN[:, paths_PA]], -1)[..., -3:]
        trigram_BPD = self._heads.trigram(self._heads.embed(tokens_BP3))
        depths_T, visible_PT = self._tails[k]
        batch = len(requests)
        y_BPD = self._draft_cache.grow(
            [trigram_BPD],
            depths_T.expand(batch, -1),
            visible_PT.expand(batch, -1, -1),
            self._heads.ctx,
        )
        return torch.cat([state_BD[:, None].expand_as(y_BPD), y_BPD], -1)
