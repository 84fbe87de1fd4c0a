"""EAGLE-3: one decoder layer that reads the target's states, then goes on from its own.

Li et al. 2025 (arXiv:2503.01840). At place t the states of three of the target's layers are fused,
g_t = W [a_t ; b_t ; c_t]. The layer reads x_{t+1} and g_t,

    q, k, v from [norm(E x_{t+1}) ; norm(g_t)],   y = g_t + attention,   y_t = y + MLP(norm y),

and an output matrix over norm(y_t) guesses x_{t+2}. A token further ahead it reads y_t in place of
g_{t+1}, which the target has not made yet. Training does the same ("training-time test"): at step s
the row at t reads the output of step s - 1 and x_{t+1+s}, stands at position t + s, and sees the
target's rows up to t and its own chain. Loss: the sum over s of 0.8^s times the mean cross entropy
against the target's laws, renormalised on the draft vocabulary; places where the target's best
token is outside it are left out, and the mean is over those that are left (the authors' is over
all).

A step drafts EAGLE-2's tree (Li et al. 2024, arXiv:2406.16858): of each level the `width` nodes
with the largest probability of their path are expanded, each into its `width` likeliest tokens,
and of all nodes the `nodes` best are kept. Its keys and values follow what the target committed,
with the target's own states.

Shapes: B rows of a batch, L tokens, R places in texts, D width, F nodes of a level, C candidates,
T nodes in the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.heads.base import Heads, OptimizerDefaults, read_outcomes, read_prompts
from spectool.decode.heads.layer import (
    Attention,
    DraftCache,
    Rotary,
    attend_chains,
    final_scale,
    layer_config,
)
from spectool.decode.protocol import (
    Drafter,
    Features,
    Needs,
    Outcome,
    PrefilledPrompt,
    TrainingBatch,
)
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.target import kernel_rows
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError
from spectool.kernels import skinny
from spectool.options import option

# Of a larger vocabulary as many tokens are guessed, as published.
_DRAFT_VOCAB = 32000
# The score that a row begins to give itself.
_SELF = 12.0
# From so many layers on the states are those published.
_DEEP = 16


class MidLayer(nn.Module):
    """The decoder layer, named as in the authors' checkpoints."""

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
    """The layer with what it reads and guesses with; a head k is its step k."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        ttt_steps: int = option(7, "tokens ahead that training goes on for", minimum=1, maximum=16)
        layers: str = option("", "states to fuse, like 2-16-29; empty: a low, a middle, a high one")
        draft_vocab: int = option(
            0, "guess only the N commonest tokens of the data; 0: 32000, or all", minimum=0
        )
        shared_head: bool = option(False, "guess with the target's lm_head")

        def validate(self) -> None:
            if not all(part.isdigit() for part in self.layers.split("-") if self.layers):
                raise UsageError(f"--layers {self.layers}: expected numbers like 2-16-29")

    optimizer_defaults = OptimizerDefaults(rate=5e-5, betas=(0.9, 0.95))
    loss_target = "probs"
    decay = 0.8

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """
        Raises:
            UsageError: states to fuse that the target has not.
        """
        super().__init__(config, model, token_map)
        self.num_heads = config.ttt_steps
        shape = layer_config(model)
        self.rotary = Rotary(shape)
        fused = _fused(config.layers, model.config.get_text_config(decoder=True).num_hidden_layers)
        # State i is what layer i reads, so the output of the one before.
        self.needs = Needs(layers=tuple(i - 1 for i in fused), final=True)
        width = shape.hidden_size
        self.fc = nn.Linear(len(fused) * width, width, bias=False)
        self.midlayer = MidLayer(shape)
        self.norm = LlamaRMSNorm(width, shape.rms_norm_eps)
        self._begin(model)
        self.lm_head = None if config.shared_head else self.fresh_output(bias=False)
        self.to(self.frozen.weight_VD)

    def _begin(self, model: PreTrainedModel) -> None:
        """Begin with the highest state as it is, read at its own place.

        Queries begin as the keys do, so that every row sees itself above all: random ones average
        over the text, and a row's own token reaches nothing but through its value (codestory-10M,
        60 steps of 1024 tokens: a loss of 5.59 in place of 5.69).
        """
        nn.init.zeros_(self.fc.weight)
        nn.init.eye_(self.fc.weight[:, -self.fc.out_features :])
        scale_D = final_scale(model)
        if scale_D is not None:
            self.norm.weight = nn.Parameter(scale_D.float().clone())
        attention = self.midlayer.self_attn
        keys, width = attention.k_proj.weight, attention.head_width
        # Of normed states of unit variance this makes scores of about _SELF.
        nn.init.normal_(keys, std=(_SELF / width**0.5 / keys.shape[1]) ** 0.5)
        heads = keys.detach().view(-1, width, keys.shape[1])
        shared = attention.q_proj.out_features // keys.shape[0]
        attention.q_proj.weight = nn.Parameter(heads.repeat_interleave(shared, 0).flatten(0, 1))

    @classmethod
    def num_guessed(cls, config: Any, vocab_size: int) -> int:
        if config.draft_vocab == 0 and vocab_size > _DRAFT_VOCAB:
            return _DRAFT_VOCAB
        return super().num_guessed(config, vocab_size)

    def fuse(self, features: Features) -> Tensor:
        """g [..., D] of the target's states."""
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

    def own_output(self, k: int) -> nn.Linear | None:
        return self.lm_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config(options.Config):
    """Options of `eagle3`."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(6, "most proposed tokens in a row", minimum=1, maximum=16)
    width: int = option(8, "nodes of a level that are expanded, and into how many", minimum=1)


@dataclass(slots=True)
class _Candidates:
    """All nodes of a growing tree, per row: token, parent among them (-1 the root), depth, and
    log q of the path and of the node itself."""

    tokens: list[Tensor]
    parents: list[Tensor]
    scores: list[Tensor]
    own: list[Tensor]
    depths: list[int]

    @property
    def count(self) -> int:
        return len(self.depths)


class Eagle3Drafter(Drafter):
    """Grows a tree from the layer's own laws; see the module docstring."""

    name = "eagle3"
    Config = Eagle3Config
    Heads = Eagle3Heads

    def __init__(
        self,
        heads: Eagle3Heads,
        paths: Sequence[tuple[Sequence[int], float]],
        config: Eagle3Config | None = None,
    ) -> None:
        """`paths`, the best static tree, is what it was measured by, not what it drafts."""
        self.config = config or Eagle3Config()
        self.needs = heads.needs
        self._heads = heads.eval()
        self._draft_cache = DraftCache(heads.rotary, 1)
        self._states: dict[int, Tensor] = {}
        self._linears = skinny.suited(heads.modules())

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    @torch.inference_mode()
    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._states.clear()
        # Column t is made of the target's state at t and of the token after it.
        self._draft_cache.begin(prompts, [prompt.row.tokens[1:] for prompt in prompts])
        with self._kernel():
            self._read([prompt.row.index for prompt in prompts], *read_prompts(prompts))

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        with self._kernel():
            self._read([outcome.row.index for outcome in outcomes], *read_outcomes(outcomes))

    @torch.inference_mode()
    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        deepest = min(max(budget), self.config.depth)
        if deepest == 0:
            return [tree.root(row.tokens[-1]) for row in rows]
        self._draft_cache.select([row.index for row in rows])
        with self._kernel():
            found = self._grow(torch.stack([self._states[row.index] for row in rows]), deepest)
        return self._best(rows, budget, found)

    def _kernel(self) -> AbstractContextManager[None]:
        return skinny.products(self._linears, kernel_rows(self._heads.dtype))

    def _read(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], features: Sequence[Features]
    ) -> None:
        """Let the layer read what was committed; its last outputs are where drafting begins."""
        self._draft_cache.select(rows)
        device = self._heads.frozen.weight_VD.device
        after = [row[1:] for row in tokens]
        embedded = [self._heads.embed(torch.tensor(row, device=device)) for row in after]
        fused = [self._heads.fuse(found) for found in features]
        states = self._draft_cache.feed(after, [embedded, fused], self._pass)
        self._states.update(zip(rows, states, strict=True))

    def _pass(self, embedded_BND: Tensor, state_BND: Tensor, sight: Any) -> Tensor:
        midlayer = self._heads.midlayer
        out_BND: Tensor = midlayer(
            embedded_BND, state_BND, lambda read: midlayer.self_attn(read, sight)
        )
        return out_BND

    def _grow(self, state_BD: Tensor, deepest: int) -> _Candidates:
        """Level by level: expand the best nodes of the last one."""
        batch, width, device = len(state_BD), self.config.width, state_BD.device
        made = _Candidates([], [], [], [], [])
        # The root is the one node of its level, and was read with what was committed.
        state_BFD = state_BD[:, None]
        score_BF = state_BD.new_zeros(batch, 1, dtype=torch.float32)
        at_BF = torch.full((batch, 1), -1, device=device)
        visible_BFT = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)
        depths: list[int] = []
        for level in range(1, deepest + 1):
            if level > 1:
                token_BF = torch.cat(made.tokens, 1).gather(1, at_BF)
                num_nodes = token_BF.shape[1]
                # Every node sees itself and what its parent sees.
                self_BFF = torch.eye(num_nodes, dtype=torch.bool, device=device)
                visible_BFT = torch.cat([visible_BFT, self_BFF.expand(batch, -1, -1)], -1)
                depths += [level - 2] * num_nodes
                state_BFD = self._draft_cache.grow(
                    [self._heads.embed(token_BF), state_BFD],
                    torch.tensor(depths).expand(batch, -1),
                    visible_BFT,
                    self._pass,
                )
            logq_BFV = self._logq(state_BFD)
            best = logq_BFV.topk(min(width, logq_BFV.shape[-1]))
            num_children = best.values.shape[-1]
            score_BC = (score_BF[..., None] + best.values).flatten(1)
            base = made.count
            made.tokens.append(self._ids(best.indices).flatten(1))
            made.parents.append(at_BF.repeat_interleave(num_children, 1))
            made.scores.append(score_BC)
            made.own.append(best.values.flatten(1))
            made.depths += [level] * score_BC.shape[1]
            score_BF, chosen_BF = score_BC.topk(min(width, score_BC.shape[1]))
            at_BF = base + chosen_BF
            # The next level's nodes begin where their parents ended.
            parent_BF = chosen_BF // num_children
            index_BFD = parent_BF[..., None].expand(-1, -1, state_BFD.shape[-1])
            state_BFD = state_BFD.gather(1, index_BFD)
            index_BFT = parent_BF[..., None].expand(-1, -1, visible_BFT.shape[-1])
            visible_BFT = visible_BFT.gather(1, index_BFT)
        return made

    def _logq(self, state_BFD: Tensor) -> Tensor:
        normed = self._heads.norm(state_BFD)
        own = self._heads.lm_head
        logits = (
            nn.functional.linear(normed, *self._heads.output(0)) if own is None else own(normed)
        )
        return logits.float().log_softmax(-1)

    def _ids(self, places: Tensor) -> Tensor:
        token_map = self._heads.token_map
        return places if token_map is None else token_map[places]

    def _best(
        self, rows: Sequence[Request], budget: Sequence[int], found: _Candidates
    ) -> list[Draft]:
        """Of all candidates the likeliest; a parent is never less likely, and stands before."""
        scores_BC = torch.cat(found.scores, 1)
        order_BN = scores_BC.sort(dim=-1, descending=True, stable=True).indices[
            :, : self.config.nodes
        ]
        kept = [torch.cat(part, 1).gather(1, order_BN) for part in (found.tokens, found.parents)]
        share_BN = torch.cat(found.own, 1).gather(1, order_BN).exp()
        tenths_BN = (10 * share_BN).long()
        columns = torch.stack([order_BN, *kept, tenths_BN], -1).tolist()
        drafts = []
        for row, limit, nodes in zip(rows, budget, columns, strict=True):
            places = {-1: 0}
            tokens, parents, sources = [row.tokens[-1]], [-1], [-1]
            for candidate, token, parent, tenths in nodes:
                if found.depths[candidate] <= limit:
                    places[candidate] = len(tokens)
                    tokens.append(token)
                    parents.append(places[parent])
                    sources.append(tenths)
            kinds: list[Kind] = ["deterministic"] * len(tokens)
            drafts.append(Draft(tokens, parents, kinds, sources=sources))
        return drafts


def _fused(asked: str, num_layers: int) -> list[int]:
    """The states to fuse: as asked, or a low, a middle and a high one.

    As published, 2, L / 2 and L - 3, where the last of these is near the end; of fewer layers the
    last itself (8 layers, short training: a loss of 5.25 in place of 5.40).
    """
    if asked:
        found = sorted({int(part) for part in asked.split("-")})
        if found[0] < 1 or found[-1] > num_layers:
            raise UsageError(f"--layers {asked}: the target has states 1 to {num_layers}")
        return found
    if num_layers >= _DEEP:
        return [2, num_layers // 2, num_layers - 3]
    return sorted({max(1, num_layers // 4), (num_layers + 1) // 2, num_layers})
