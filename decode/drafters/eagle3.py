"""EAGLE-3: one decoder layer that reads the target's states, then its own outputs.

Li et al. 2025 (arXiv:2503.01840). At position t the states of three of the target's layers are
fused to g_t = W [a_t ; b_t ; c_t]. The layer reads g_t and x_{t+1}:

    q, k, v from [norm(E x_{t+1}) ; norm(g_t)],   y = g_t + attention,   y_t = y + MLP(norm y),

and an lm_head on norm(y_t) guesses x_{t+2}. For the next token it reads y_t in place of g_{t+1},
which the target has not computed yet. Training does the same ("training-time test"): at step s the
row at t reads x_{t+1+s} and the output of step s - 1, has the rotary position t + s, and attends to
the first step's rows up to t and to its own chain. Loss: the sum over s of 0.8^s times the mean
cross entropy against the target's probabilities, renormalised on the draft vocabulary. Positions
where the target's best token is outside it do not count; the mean is over the others (the authors'
is over all).

A step drafts EAGLE-2's tree (Li et al. 2024, arXiv:2406.16858): on each level the `width` nodes
with the most probable paths are expanded, each into its `width` likeliest tokens, and the `nodes`
best of all nodes are kept. The layer's KV cache of committed tokens is computed from the target's
states.

Shapes: B texts or requests of a batch, L tokens, R positions in texts, D width, F nodes of a level,
C candidates, N nodes that are kept, T nodes in the tail, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from spectool import options
from spectool.decode import tree
from spectool.decode.heads.base import Heads, HeadsDrafter, Paths
from spectool.decode.heads.layer import (
    Attention,
    DraftCache,
    NewText,
    Rotary,
    attend_chains,
    make_layer_config,
    read_final_scale,
)
from spectool.decode.protocol import Features, Needs
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import UsageError
from spectool.kernels.registry import use_kernels
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch

# Draft vocabulary of targets that have a larger one, as published.
_DRAFT_VOCAB = 32000
# The attention score that a row gives itself before training.
_SELF_SCORE = 12.0
# Targets with at least this many layers fuse the published states.
_DEEP = 16


class MidLayer(nn.Module):
    """The decoder layer, with module names as in the authors' checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(width, epsilon)
        self.hidden_norm = LlamaRMSNorm(width, epsilon)
        self.self_attn = Attention(config, 0, inputs=2)
        self.post_attention_layernorm = LlamaRMSNorm(width, epsilon)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(
        self, embedded_BND: Tensor, state_BND: Tensor, attend: Callable[[Tensor], Tensor]
    ) -> Tensor:
        read = torch.cat([self.input_layernorm(embedded_BND), self.hidden_norm(state_BND)], -1)
        state_BND = state_BND + attend(read)
        out: Tensor = state_BND + self.mlp(self.post_attention_layernorm(state_BND))
        return out


class Eagle3Heads(Heads):
    """The layer with its fusion matrix, norm and lm_head; head k is the layer's step k."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        ttt_steps: int = option(7, "tokens ahead that are trained", minimum=1, maximum=16)
        layers: tuple[int, ...] = option(
            (), "states to fuse, like 2-16-29; empty: a low, a middle, a high one"
        )
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: 32000, or all", minimum=0
        )
        shared_head: bool = option(False, "guess with the target's lm_head")

    optimizer_defaults = OptimizerDefaults(rate=5e-5, betas=(0.9, 0.95))
    loss = LossSpec(target="probs", decay=0.8)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """Make untrained heads for a target.

        Raises:
            UsageError: the target lacks a state that is to be fused.
        """
        super().__init__(config, model, token_map)
        self.num_heads = config.ttt_steps
        shape = make_layer_config(model)
        self.rotary = Rotary(shape)
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        fused = _choose_states(config.layers, num_layers)
        # State i is the input of layer i, hence the output of layer i - 1.
        self.needs = Needs(layers=tuple(i - 1 for i in fused), final=True)
        width = shape.hidden_size
        self.fc = nn.Linear(len(fused) * width, width, bias=False)
        self.midlayer = MidLayer(shape)
        self.norm = LlamaRMSNorm(width, shape.rms_norm_eps)
        self._init_weights(model)
        self.lm_head = None if config.shared_head else self.new_lm_head(bias=False)
        self.to(self.frozen.weight_VD)

    def _init_weights(self, model: PreTrainedModel) -> None:
        """Initialise weights: fuse to the highest state alone, attend mostly to the row itself."""
        nn.init.zeros_(self.fc.weight)
        nn.init.eye_(self.fc.weight[:, -self.fc.out_features :])
        scale_D = read_final_scale(model)
        if scale_D is not None:
            self.norm.weight = nn.Parameter(scale_D.float().clone())
        attention = self.midlayer.self_attn
        # Queries equal keys, so each row attends mostly to itself. Random queries average over the
        # text and dilute the row's own token, which enters through its value alone (codestory-10M,
        # 60 steps of 1024 tokens: loss 5.59 instead of 5.69).
        keys, width = attention.k_proj.weight, attention.head_width
        # With inputs of unit variance this std gives self-scores of about _SELF_SCORE.
        nn.init.normal_(keys, std=(_SELF_SCORE / width**0.5 / keys.shape[1]) ** 0.5)
        key_heads = keys.detach().view(-1, width, keys.shape[1])
        group = attention.q_proj.out_features // keys.shape[0]
        attention.q_proj.weight = nn.Parameter(key_heads.repeat_interleave(group, 0).flatten(0, 1))

    @classmethod
    def draft_vocab_size(cls, config: Any, vocab_size: int) -> int:
        if config.draft_vocab == 0 and vocab_size > _DRAFT_VOCAB:
            return _DRAFT_VOCAB
        return super().draft_vocab_size(config, vocab_size)

    def fuse(self, features: Features) -> Tensor:
        """Compute g [..., D] from the target's states."""
        states = [features[f"layer {index}"] for index in self.needs.layers]
        fused: Tensor = self.fc(torch.cat(states, -1).to(self.dtype))
        return fused

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        state_BLD = self.fuse(batch.features)
        tokens_BL, attention = batch.tokens_BL, self.midlayer.self_attn
        positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(self.num_heads):
            rotary = self.rotary.at(positions_L[None] + step, state_BLD)

            def attend(read: Tensor, rotary: Any = rotary) -> Tensor:
                q, k, v = attention.project(read, rotary)
                keys.append(k)
                values.append(v)
                return attention.merge(attend_chains(q, keys, values))

            # Clamped: positions past the end have no label, so their values are unused.
            ahead_L = (positions_L + 1 + step).clamp(max=len(positions_L) - 1)
            state_BLD = self.midlayer(self.embed(tokens_BL[:, ahead_L]), state_BLD, attend)
            yield self.norm(state_BLD[batch_R, position_R])

    def own_lm_head(self, k: int) -> nn.Linear | None:
        return self.lm_head


@dataclass(slots=True)
class _Candidates:
    """All nodes of the growing trees, one tensor [B, C] per level.

    `parents` index the candidates (-1: the root); `path_logq` is log q of the path, `node_logq`
    of the node given its parent.
    """

    tokens: list[Tensor]
    parents: list[Tensor]
    path_logq: list[Tensor]
    node_logq: list[Tensor]
    depths: list[int]


class Eagle3Drafter(HeadsDrafter):
    """Drafter that grows a tree by the layer's own probabilities; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `eagle3`."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        depth: int = option(6, "most proposed tokens on a path", minimum=1, maximum=16)
        width: int = option(8, "nodes of a level that are expanded, and into how many", minimum=1)

    name = "eagle3"
    Heads = Eagle3Heads
    _heads: Eagle3Heads
    _draft_cache: DraftCache

    def __init__(self, heads: Eagle3Heads, paths: Paths, config: Config | None = None) -> None:
        """Make the drafter; `paths`, the best static tree, only served to measure the heads."""
        # Column t is computed from the target's state at t and the token after it.
        super().__init__(heads, DraftCache(heads.rotary, 1, ahead=True))
        self.config = config or self.Config()

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        deepest = min(max(budget), self.config.depth)
        if deepest == 0:
            return [tree.root(request.tokens[-1]) for request in requests]
        with use_kernels():
            found = self._grow(torch.stack([self._states[r] for r in requests]), deepest)
        return self._keep_best(requests, budget, found)

    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        device = self._heads.frozen.weight_VD.device
        inputs = [
            [self._heads.embed(torch.tensor(text.tokens[1:], device=device)) for text in new],
            [self._heads.fuse(text.features) for text in new],
        ]
        return self._draft_cache.feed(new, inputs, self._run_layer)

    def _run_layer(self, embedded_BND: Tensor, state_BND: Tensor, sight: Any) -> Tensor:
        midlayer = self._heads.midlayer
        out_BND: Tensor = midlayer(
            embedded_BND, state_BND, lambda read: midlayer.self_attn(read, sight)
        )
        return out_BND

    def _grow(self, state_BD: Tensor, deepest: int) -> _Candidates:
        """Grow the trees level by level, expanding the best nodes of the level before."""
        batch, width, device = len(state_BD), self.config.width, state_BD.device
        made = _Candidates([], [], [], [], [])
        # The root is the only node of level 0, and was fed with the committed tokens.
        state_BFD = state_BD[:, None]
        score_BF = state_BD.new_zeros(batch, 1, dtype=torch.float32)
        at_BF = torch.full((batch, 1), -1, device=device)
        visible_BFT = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)
        depths: list[int] = []
        for level in range(1, deepest + 1):
            if level > 1:
                token_BF = torch.cat(made.tokens, 1).gather(1, at_BF)
                num_nodes = token_BF.shape[1]
                # A node attends to itself and to whatever its parent attends to.
                self_BFF = torch.eye(num_nodes, dtype=torch.bool, device=device)
                visible_BFT = torch.cat([visible_BFT, self_BFF.expand(batch, -1, -1)], -1)
                depths += [level - 2] * num_nodes
                state_BFD = self._draft_cache.grow(
                    [self._heads.embed(token_BF), state_BFD],
                    torch.tensor(depths).expand(batch, -1),
                    visible_BFT,
                    self._run_layer,
                )
            logits_BFV = self._heads.logits(self._heads.norm(state_BFD), 0)
            logq_BFV = logits_BFV.float().log_softmax(-1)
            best = logq_BFV.topk(min(width, logq_BFV.shape[-1]))
            num_children = best.values.shape[-1]
            score_BC = (score_BF[..., None] + best.values).flatten(1)
            base = len(made.depths)
            made.tokens.append(self._heads.ids(best.indices).flatten(1))
            made.parents.append(at_BF.repeat_interleave(num_children, 1))
            made.path_logq.append(score_BC)
            made.node_logq.append(best.values.flatten(1))
            made.depths += [level] * score_BC.shape[1]
            score_BF, chosen_BF = score_BC.topk(min(width, score_BC.shape[1]))
            at_BF = base + chosen_BF
            # The next level's nodes read their parents' output states.
            parent_BF = chosen_BF // num_children
            index_BFD = parent_BF[..., None].expand(-1, -1, state_BFD.shape[-1])
            state_BFD = state_BFD.gather(1, index_BFD)
            index_BFT = parent_BF[..., None].expand(-1, -1, visible_BFT.shape[-1])
            visible_BFT = visible_BFT.gather(1, index_BFT)
        return made

    def _keep_best(
        self, requests: Sequence[Request], budget: Sequence[int], found: _Candidates
    ) -> list[Draft]:
        """Make drafts of the `nodes` candidates with the most probable paths."""
        # A parent's path is at least as probable as its children's, and a stable sort keeps it
        # before them, so every prefix is a tree.
        scores_BC = torch.cat(found.path_logq, 1)
        order_BN = scores_BC.sort(dim=-1, descending=True, stable=True).indices[
            :, : self.config.nodes
        ]
        kept = [torch.cat(part, 1).gather(1, order_BN) for part in (found.tokens, found.parents)]
        q_BN = torch.cat(found.node_logq, 1).gather(1, order_BN).exp()
        # The source of a node is its q in tenths: equal sources are about equally often right.
        tenths_BN = (10 * q_BN).long()
        columns = torch.stack([order_BN, *kept, tenths_BN], -1).tolist()
        drafts = []
        for request, limit, candidates in zip(requests, budget, columns, strict=True):
            nodes = {-1: 0}
            tokens, parents, sources = [request.tokens[-1]], [-1], [-1]
            for candidate, token, parent, tenths in candidates:
                if found.depths[candidate] <= limit:
                    nodes[candidate] = len(tokens)
                    tokens.append(token)
                    parents.append(nodes[parent])
                    sources.append(tenths)
            drafts.append(Draft(tokens, parents, sources=sources))
        return drafts


def _choose_states(asked: Sequence[int], num_layers: int) -> list[int]:
    """Return the states to fuse: those `asked` for, or a low, a middle and a high one."""
    if asked:
        states = sorted(set(asked))
        if states[0] < 1 or states[-1] > num_layers:
            given = "-".join(map(str, asked))
            raise UsageError(f"--layers {given}: the target has states 1 to {num_layers}")
        return states
    if num_layers >= _DEEP:
        # As published.
        return [2, num_layers // 2, num_layers - 3]
    # In a shallow target L - 3 is far from the end; its last state works better (8 layers, short
    # training: loss 5.25 instead of 5.40).
    return sorted({max(1, num_layers // 4), (num_layers + 1) // 2, num_layers})
