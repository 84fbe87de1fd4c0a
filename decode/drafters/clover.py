"""Clover-2: two layers over the text, then a recurrent state along the drafted tokens.

Xiao et al. 2024 (arXiv:2408.00264). A token x_u is read as e_u, its row of the target's frozen
lm_head, and enters a state x by attention with a single key:

    ResAttn(x, e) = x + c * v(e),   c per attention head = cosine of q(RMSNorm x) and k(e).

With f_t the target's state at position t before its last norm, all heads share

    h_t = norm(two decoder layers over ResAttn(f_1, e_2) ... ResAttn(f_t, e_{t+1})).

Head i (from 0) guesses x_{t+2+i}, with the target's lm_head, from

    head 0:    norm(M_1 h_t)
    head i:    s_i = ResAttn(s_{i-1}, e_{t+1+i}),   s_0 = h_t,   norm(M_2 [s_i ; e_{t+1+i}]).

Loss: the sum over i of 0.7^i times the mean of: cross entropy against the target's probabilities,
plus 10 times the smooth L1 distance from the target's final state that gives these.

Untrained heads come close to applying two more layers to the target's state: v is near zero, M_1
and M_2 near the identity, the last norms are the target's, and the two layers are copies of its
last layer if that is Llama's. A step drafts a static tree; each node's state is computed once, from
its parent's.

Shapes: B texts or requests of a batch, L tokens, R positions in texts, D width, N nodes or tokens,
P nodes of a depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spectool import options
from spectool.decode.heads.base import Heads, Paths, TreeDrafter
from spectool.decode.heads.layer import (
    DecoderLayer,
    DraftCache,
    NewText,
    Rotary,
    Sight,
    make_layer_config,
    read_final_scale,
)
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch

# The size of the random numbers that are added to initial weights.
_NOISE = 0.01


def init_near_identity(matrix: nn.Linear) -> nn.Linear:
    """Initialise a linear layer to return its first inputs, plus a little noise."""
    nn.init.eye_(matrix.weight)
    with torch.no_grad():
        matrix.weight += _NOISE * torch.rand_like(matrix.weight)
    nn.init.zeros_(matrix.bias)
    return matrix


class ResAttn(nn.Module):
    """Residual attention of a state to a single token (the module's ResAttn)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # The published matrices are square, so attention heads divide the width evenly.
        self.num_heads = math.gcd(width, config.num_attention_heads)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.q_proj = init_near_identity(nn.Linear(width, width))
        self.k_proj = init_near_identity(nn.Linear(width, width))
        self.v_proj = nn.Linear(width, width)
        nn.init.uniform_(self.v_proj.weight, -_NOISE, _NOISE)
        nn.init.zeros_(self.v_proj.bias)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        """Return the new state; all of them are [..., D]."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in (self.q_proj(self.norm(state)), self.k_proj(token), self.v_proj(token))
        )
        # With a single key a softmax would be 1 whatever the token; the cosine is the weight.
        gate = F.cosine_similarity(q, k, dim=-1)[..., None]
        out: Tensor = state + (gate * v).flatten(-2)
        return out


class Augment(nn.Module):
    """The two decoder layers, named as in the published checkpoint (`aug`)."""

    def __init__(self, config: LlamaConfig, model: PreTrainedModel) -> None:
        super().__init__()
        self._each = [DecoderLayer(config, index) for index in range(2)]
        for layer in self._each:
            layer.begin_as_last(model)
        self.layers = nn.ModuleList(self._each)

    def forward(self, x_BND: Tensor, sight: Sight) -> Tensor:
        for layer in self._each:
            x_BND = layer(x_BND, sight)
        return x_BND


class Regress(nn.Module):
    """The recurrent step and the matrix M_2, shared by all heads but the first."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn = ResAttn(config)
        self.mix = init_near_identity(nn.Linear(2 * config.hidden_size, config.hidden_size))


class CloverHeads(Heads):
    """Clover-2 heads; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(5, "tokens guessed ahead", minimum=1, maximum=16)
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: all", minimum=0
        )

    needs = Needs(layers=(-1,), final=True)
    supports_packing = True
    begins_as_layers = True
    optimizer_defaults = OptimizerDefaults(rate=1e-3, betas=(0.9, 0.95))
    loss = LossSpec(target="probs", decay=0.7, state_weight=10.0)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        shape = make_layer_config(model)
        width, epsilon = shape.hidden_size, shape.rms_norm_eps
        self.rotary = Rotary(shape)
        self.attn_dec = ResAttn(shape)
        self.aug = Augment(shape, model)
        self.norm = LlamaRMSNorm(width, epsilon)
        self.head0 = init_near_identity(nn.Linear(width, width))
        self.norm_head0 = LlamaRMSNorm(width, epsilon)
        self.regr = Regress(shape)
        self.norm_regr = LlamaRMSNorm(width, epsilon)
        scale_D = read_final_scale(model)
        if scale_D is not None:
            for norm in (self.norm_head0, self.norm_regr):
                norm.weight = nn.Parameter(scale_D.float().clone())
        self.to(self.frozen.weight_VD)

    def read(self, tokens: Tensor) -> Tensor:
        """Return e [..., D] of tokens, also of those outside the heads' vocabulary."""
        return self.frozen.vectors(tokens).to(self.dtype)

    def augment(self, state_BND: Tensor, token_BND: Tensor, sight: Sight) -> Tensor:
        """Compute h from the target's states f and the e of the tokens after them."""
        normed: Tensor = self.norm(self.aug(self.attn_dec(state_BND, token_BND), sight))
        return normed

    def first(self, state: Tensor) -> Tensor:
        """Compute the state that head 0 guesses from: norm(M_1 h)."""
        normed: Tensor = self.norm_head0(self.head0(state))
        return normed

    def carry(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the next s, and the state its head guesses from, given a drafted token's e."""
        state = self.regr.attn(state, token)
        return state, self.norm_regr(self.regr.mix(torch.cat([state, token], -1)))

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        # Clamped: positions past the end have no label, so their values are unused.
        last = batch.tokens_BL.shape[1] - 1
        before_BLD = batch.features["layer -1"].to(self.dtype)
        positions_L = torch.arange(last + 1, device=before_BLD.device)
        after_BLD = self.read(batch.tokens_BL[:, (positions_L + 1).clamp(max=last)])
        h_BLD = self.augment(before_BLD, after_BLD, self.rotary.text(before_BLD, batch.segments_BL))
        state_RD = h_BLD[batch_R, position_R]
        yield self.first(state_RD)
        for i in range(1, self.num_heads):
            token_R = batch.tokens_BL[batch_R, (position_R + 1 + i).clamp(max=last)]
            state_RD, out_RD = self.carry(state_RD, self.read(token_R))
            yield out_RD


class CloverDrafter(TreeDrafter):
    """Drafter of the heads' static tree; the two layers run once over committed tokens."""

    name = "clover"
    Heads = CloverHeads
    _heads: CloverHeads
    _draft_cache: DraftCache

    def __init__(
        self, heads: CloverHeads, paths: Paths, config: TreeDrafter.Config | None = None
    ) -> None:
        # Column t is computed from the target's state at t and the token after it.
        draft_cache = DraftCache(heads.rotary, len(heads.aug.layers), ahead=True)
        super().__init__(heads, paths, config, draft_cache)
        self._carried_BPD: Tensor | None = None

    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        heads, device = self._heads, self._heads.frozen.weight_VD.device
        inputs = [
            [text.features["layer -1"].to(heads.dtype) for text in new],
            [heads.read(torch.tensor(text.tokens[1:], device=device)) for text in new],
        ]
        return self._draft_cache.feed(new, inputs, heads.augment)

    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        if k == 0:
            # s_0 = h_t; head 0 has no recurrent step.
            self._carried_BPD = state_BD[:, None]
            return self._heads.first(self._carried_BPD)
        assert self._carried_BPD is not None
        level = self._tree.levels[k]
        # s of each node from s of its parent and the node's own token.
        token_BPD = self._heads.read(tokens_BN[:, level.paths_PA[:, -1]])
        self._carried_BPD, out_BPD = self._heads.carry(
            self._carried_BPD[:, level.above_P], token_BPD
        )
        return out_BPD
