"""Clover-2: layers over the text, then a state that is carried from drafted token to drafted token.

Xiao et al. 2024 (arXiv:2408.00264). Tokens are read as e = the rows of the target's output matrix,
frozen, and into a state x by attention with one key,

    ResAttn(x, e) = x + c * v(e),   c of each head = cosine of q(RMSNorm x) and k(e).

At place t, with f_t the target's state before its last norm, once for all heads:

    h_t = norm(two decoder layers over ResAttn(f_1, e_2) ... ResAttn(f_t, e_{t+1})),

e_u being that of x_u. Head i (from 0) guesses x_{t+2+i}, with the target's output matrix, from

    head 0:    norm(M_1 h_t)
    head i:    s_i = ResAttn(s_{i-1}, e_{t+1+i}),   s_0 = h_t,   norm(M_2 [s_i ; e_{t+1+i}]).

Loss: the sum over i of 0.7^i times the mean of cross entropy against the target's laws and 10 times
the smooth L1 distance from the target's state of that law.

Before training c * v(e) is almost nothing, M_1 and M_2 nearly hand the state on and the last norms
are the target's, so heads say about what two more layers make of the target's state. These begin as
its own last layer where that is Llama's. A step drafts a static tree; a node's state is made once,
from its parent's.

Shapes: B rows of a batch, L tokens, R places in texts, D width, N nodes or tokens, P nodes of a
depth.
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
from spectool.decode.cache import TreeCache
from spectool.decode.heads.base import Heads, OptimizerDefaults, TreeConfig, TreeDrafter
from spectool.decode.heads.layer import (
    DecoderLayer,
    DraftCache,
    Rotary,
    Sight,
    final_scale,
    layer_config,
)
from spectool.decode.protocol import Features, Needs, PrefilledPrompt, TrainingBatch
from spectool.decode.request import Request
from spectool.options import option

# The size of the random numbers around what matrices begin as.
_NOISE = 0.01


def near_identity(matrix: nn.Linear) -> nn.Linear:
    """One that hands on the first of what it reads, almost."""
    nn.init.eye_(matrix.weight)
    with torch.no_grad():
        matrix.weight += _NOISE * torch.rand_like(matrix.weight)
    nn.init.zeros_(matrix.bias)
    return matrix


class ResAttn(nn.Module):
    """A token read into a state; see the module docstring."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # The published matrices are square: a head is a share of the width.
        self.num_heads = math.gcd(width, config.num_attention_heads)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.q_proj = near_identity(nn.Linear(width, width))
        self.k_proj = near_identity(nn.Linear(width, width))
        self.v_proj = nn.Linear(width, width)
        nn.init.uniform_(self.v_proj.weight, -_NOISE, _NOISE)
        nn.init.zeros_(self.v_proj.bias)

    def forward(self, state: Tensor, token: Tensor) -> Tensor:
        """Both [..., D]."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in (self.q_proj(self.norm(state)), self.k_proj(token), self.v_proj(token))
        )
        gate = F.cosine_similarity(q, k, dim=-1)[..., None]
        out: Tensor = state + (gate * v).flatten(-2)
        return out


class Augment(nn.Module):
    """Two decoder layers; the published artifact's `aug`."""

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
    """What all heads but the first share."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn = ResAttn(config)
        self.mix = near_identity(nn.Linear(2 * config.hidden_size, config.hidden_size))


class CloverHeads(Heads):
    """All heads; see the module docstring."""

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
    loss_target = "probs"
    decay = 0.7
    state_weight = 10.0

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        shape = layer_config(model)
        width, epsilon = shape.hidden_size, shape.rms_norm_eps
        self.rotary = Rotary(shape)
        self.attn_dec = ResAttn(shape)
        self.aug = Augment(shape, model)
        self.norm = LlamaRMSNorm(width, epsilon)
        self.head0 = near_identity(nn.Linear(width, width))
        self.norm_head0 = LlamaRMSNorm(width, epsilon)
        self.regr = Regress(shape)
        self.norm_regr = LlamaRMSNorm(width, epsilon)
        scale_D = final_scale(model)
        if scale_D is not None:
            for norm in (self.norm_head0, self.norm_regr):
                norm.weight = nn.Parameter(scale_D.float().clone())
        self.to(self.frozen.weight_VD)

    def read(self, tokens: Tensor) -> Tensor:
        """e [..., D] of tokens, those among them that cannot be guessed too."""
        return self.frozen.vectors(tokens).to(self.dtype)

    def augment(self, state_BND: Tensor, token_BND: Tensor, sight: Sight) -> Tensor:
        """h of f and the e of the tokens after."""
        normed: Tensor = self.norm(self.aug(self.attn_dec(state_BND, token_BND), sight))
        return normed

    def first(self, state: Tensor) -> Tensor:
        """What head 0 guesses from, after h."""
        normed: Tensor = self.norm_head0(self.head0(state))
        return normed

    def carry(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next s, and what its head guesses from, after s and the e of a drafted token."""
        state = self.regr.attn(state, token)
        return state, self.norm_regr(self.regr.mix(torch.cat([state, token], -1)))

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        # Past the end there is nothing to learn, and something has to stand.
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

    def own_output(self, k: int) -> nn.Linear | None:
        return None


class CloverDrafter(TreeDrafter):
    """Drafts the heads' static tree; the two layers run once over what was committed."""

    name = "clover"
    Heads = CloverHeads
    needs = CloverHeads.needs
    _heads: CloverHeads

    def __init__(
        self,
        heads: CloverHeads,
        paths: Sequence[tuple[Sequence[int], float]],
        config: TreeConfig | None = None,
    ) -> None:
        super().__init__(heads, paths, config)
        self._draft_cache = DraftCache(heads.rotary, len(heads.aug.layers))
        self._carried_BPD: Tensor | None = None

    @torch.inference_mode()
    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        # Column t is made of the target's state at t and of the token after it.
        self._draft_cache.begin(prompts, [prompt.row.tokens[1:] for prompt in prompts])
        super().begin(prompts, cache)

    def _read(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], features: Sequence[Features]
    ) -> None:
        self._draft_cache.select(rows)
        heads, device = self._heads, self._heads.frozen.weight_VD.device
        after = [row[1:] for row in tokens]
        inputs = [
            [found["layer -1"].to(heads.dtype) for found in features],
            [heads.read(torch.tensor(row, device=device)) for row in after],
        ]
        states = self._draft_cache.feed(after, inputs, heads.augment)
        self._states.update(zip(rows, states, strict=True))

    def _level(
        self, rows: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        if k == 0:
            self._carried_BPD = state_BD[:, None]
            return self._heads.first(self._carried_BPD)
        assert self._carried_BPD is not None
        level = self._tree.levels[k]
        token_BPD = self._heads.read(tokens_BN[:, level.paths_PA[:, -1]])
        self._carried_BPD, out_BPD = self._heads.carry(
            self._carried_BPD[:, level.above_P], token_BPD
        )
        return out_BPD
