"""Decoder layers of a drafter, and the KV cache of these layers.

Layers are Llama's (RMS norms, rotary positions, gated MLP) with Llama's module names, in the
target's shape whatever the target's own layers are. `DraftCache` holds the keys and values of
committed tokens, and as its tail those of the tree that is being drafted.

Suffixes: B requests or texts, L tokens of a text, N nodes or tokens fed, T nodes in the tail,
S keys, H attention heads of width E, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Features, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.target.masks import isolate_texts, tree_mask
from spectool.model.decoder import find_decoder

# Largest size of attention scores that a training step keeps; recomputing them for the gradient
# takes a ninth more time.
_SCORE_BYTES = 1 << 26
# Tokens of a prompt per pass; bounds the mask.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Sight:
    """Rotary positions, mask and cache of one pass.

    `rotary`: cosines and sines [B, N, E]. Without a mask attention is causal within the pass;
    without a cache it covers the pass alone.
    """

    rotary: tuple[Tensor, Tensor]
    mask_B1NS: Tensor | None = None
    cache: Cache | None = None


class Rotary:
    """Rotary angles of the target, or plain ones; no module, so that casts do not round angles."""

    def __init__(self, config: LlamaConfig) -> None:
        self._angles = LlamaRotaryEmbedding(config)

    def at(self, positions_BN: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, N, E] in the dtype and on the device of `like`."""
        rotary: tuple[Tensor, Tensor] = self._angles(like, positions_BN.to(like.device))
        return rotary

    def text(self, like_BLD: Tensor, segments_BL: Tensor | None = None) -> Sight:
        """Return the sight of whole texts, for training.

        With `segments_BL`, texts packed into one row do not attend to each other.
        """
        if segments_BL is not None:
            positions_BL, visible_BLL = isolate_texts(segments_BL)
            lengths = [0] * len(positions_BL)
            mask_B1LL = tree_mask(lengths, positions_BL, visible_BLL, like_BLD.dtype)
            return Sight(self.at(positions_BL, like_BLD), mask_B1LL)
        positions_1L = torch.arange(like_BLD.shape[1])[None]
        return Sight(self.at(positions_1L, like_BLD))


class Attention(nn.Module):
    """Grouped-query attention that reads `inputs` concatenated states [D]."""

    def __init__(self, config: LlamaConfig, index: int, *, inputs: int = 1) -> None:
        super().__init__()
        self.index = index
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.head_width = config.head_dim
        width = inputs * config.hidden_size
        keys = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(self.q_proj.out_features, config.hidden_size, bias=False)

    def project(self, x_BND: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return queries, keys and values [B, H, N, E]; the first two with rotary positions."""
        parts = [
            layer(x_BND).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k = apply_rotary_pos_emb(parts[0], parts[1], *rotary)
        return q, k, parts[2]

    def merge(self, out_BHNE: Tensor) -> Tensor:
        """Concatenate the attention heads' outputs and project them to [B, N, D]."""
        merged: Tensor = self.o_proj(out_BHNE.transpose(1, 2).flatten(2))
        return merged

    def forward(self, x_BND: Tensor, sight: Sight) -> Tensor:
        q, k, v = self.project(x_BND, sight.rotary)
        if sight.cache is not None:
            k, v = sight.cache.update(k, v, self.index)
        causal = sight.mask_B1NS is None
        return self.merge(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=sight.mask_B1NS, is_causal=causal, enable_gqa=True
            )
        )


def attend_chains(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Compute attention [B, H, N, E] of a draft chain at every position at once, for training.

    At step s position t attends to the first step's keys up to t, and to the key at t of each later
    step. `keys` and `values` are those of steps 0 ... s, [B, H or fewer, N, E] each.
    """
    batch, heads, length, _ = q.shape
    large = 4 * batch * heads * length**2 > _SCORE_BYTES
    if not (large and torch.is_grad_enabled()):
        return _attend(q, keys, values)
    # Large scores are recomputed for the gradient: all steps' scores would be the largest tensors
    # of training. Tuples, since callers append to the lists before the backward pass.
    attended: Tensor = checkpoint(_attend, q, tuple(keys), tuple(values), use_reentrant=False)
    return attended


def _attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Compute the attention of `attend_chains`, scores and all."""
    shared = q.shape[1] // keys[0].shape[1]
    keys = [k.repeat_interleave(shared, 1) for k in keys]
    values = [v.repeat_interleave(shared, 1) for v in values]
    q = q * q.shape[-1] ** -0.5
    scores_BHNN = q @ keys[0].transpose(-1, -2)
    length = q.shape[2]
    later_NN = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores_BHNN = scores_BHNN.masked_fill(later_NN, -torch.inf)
    chain_scores = [(q * k).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.cat([scores_BHNN, *chain_scores], -1).softmax(-1)
    out_BHNE = weights[..., :length] @ values[0]
    for step, v in enumerate(values[1:]):
        out_BHNE = out_BHNE + weights[..., length + step, None] * v
    return out_BHNE


class DecoderLayer(nn.Module):
    """Llama's decoder layer: h = x + attention(norm x), out = h + MLP(norm h)."""

    def __init__(self, config: LlamaConfig, index: int = 0) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(self, x_BND: Tensor, sight: Sight) -> Tensor:
        return self.finish(x_BND, self.self_attn(self.input_layernorm(x_BND), sight))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Apply what follows attention to states `x` [..., D] and their `attended` [..., D]."""
        x = x + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def begin_as_last(self, model: PreTrainedModel) -> None:
        """Copy the weights of the target's last layer if it is a Llama layer of the same shape."""
        layers = getattr(find_decoder(model), "layers", None)
        config: Any = model.config.get_text_config(decoder=True)
        # Layers of the first Gemma have the same names, but another gate and other norms.
        if not layers or getattr(config, "hidden_act", None) != "silu":
            return
        theirs, ours = layers[-1].state_dict(), self.state_dict()
        if {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}:
            self.load_state_dict(theirs)


def make_layer_config(model: PreTrainedModel) -> LlamaConfig:
    """Return the config of a Llama layer in the target's shape, with its positions and epsilon."""
    config: Any = model.config.get_text_config(decoder=True)

    def first(*names: str, default: Any) -> Any:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if value), default)

    width, num_heads = config.hidden_size, config.num_attention_heads
    rope = dict(first("rope_parameters", default={}))
    if "rope_theta" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        # No rotary positions, several kinds of them, or only on a part of each attention head.
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    head_width = first("head_dim", default=width // num_heads)
    # In some models it is a list: the MLP width differs by layer.
    widths = first("intermediate_size", "ffn_dim", "n_inner", default=4 * width)
    return LlamaConfig(
        hidden_size=width,
        num_attention_heads=num_heads,
        num_key_value_heads=first("num_key_value_heads", default=num_heads),
        head_dim=head_width + head_width % 2,
        intermediate_size=max(widths) if isinstance(widths, (list, tuple)) else widths,
        rms_norm_eps=first("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-6),
        max_position_embeddings=first("max_position_embeddings", default=2048),
        rope_parameters=rope,
        hidden_act="silu",
    )


def read_final_scale(model: PreTrainedModel) -> Tensor | None:
    """Return the weight [D] of the target's last norm; None if that is not an RMS norm."""
    decoder: Any = find_decoder(model)
    norm = getattr(decoder, "norm", None)
    if norm is None or "RMSNorm" not in type(norm).__name__:
        return None
    weight_D: Tensor = norm.weight.detach()
    # Gemma and others store the weight minus 1: the norm of ones shows what it multiplies by.
    with torch.no_grad():
        scale_D: Tensor = norm(torch.ones_like(weight_D))
    return weight_D + (scale_D - weight_D).mean().round()


@dataclass(frozen=True, slots=True)
class NewText:
    """Newly committed tokens of a request, and the target's features of all but the last one.

    The last one is the new root, which the target has not read yet.
    """

    request: Request
    tokens: list[int]
    features: Features

    @classmethod
    def of_prompt(cls, prompt: PrefilledPrompt) -> NewText:
        """Return the prompt tokens just read with the token after them."""
        num_read = len(next(iter(prompt.features.values())))
        return cls(prompt.request, prompt.request.tokens[-1 - num_read :], prompt.features)

    @classmethod
    def of_outcome(cls, outcome: Outcome) -> NewText:
        """Return the tokens that a step committed, with the new root."""
        path = outcome.path
        tokens = [*(outcome.draft.tokens[node] for node in path), outcome.next_token]
        features = {name: found_ND[path] for name, found_ND in outcome.features.items()}
        return cls(outcome.request, tokens, features)


class DraftCache:
    """KV cache of a drafter's layers, in step with what the target committed.

    Each column is labelled with a token, so that a later call that continues a kept prefix can
    tell which columns are still valid: that of the state which was read, or with `ahead` the one
    after it. Positions are column indices; a prefix that was never read only shifts them, and
    rotary attention depends on differences alone.
    """

    def __init__(self, rotary: Rotary, num_layers: int, *, ahead: bool = False) -> None:
        self._rotary, self._num_layers, self._ahead = rotary, num_layers, ahead
        self._cache = TreeCache(batch=0, num_layers=num_layers, context=0)
        self._requests: list[Request] = []

    def take_over(self, prompts: Sequence[PrefilledPrompt]) -> None:
        """Give the columns of the request that a prompt comes `after` to the prompt's request.

        Kept are those of prompt tokens that the target did not read again, where labels agree.
        """
        for prompt in prompts:
            if prompt.after in self._requests:
                row = self._requests.index(prompt.after)
                self._requests[row] = prompt.request
                labels = self._label(prompt.request.tokens)
                num_new = len(next(iter(prompt.features.values())))
                self._cache.keep_shared(row, labels[: len(labels) - num_new])

    def remove(self, request: Request) -> None:
        """Drop a request's columns, if it has any."""
        if request in self._requests:
            left = [b for b, other in enumerate(self._requests) if other is not request]
            # In this order: after Ctrl-C in between, `remove` works for the others.
            self._requests = [self._requests[b] for b in left]
            self._cache.select(left)

    def _label(self, tokens: Sequence[int]) -> list[int]:
        """Return the labels of the columns of committed tokens, the new root last."""
        return list(tokens[1:] if self._ahead else tokens[:-1])

    def feed(
        self,
        new: Sequence[NewText],
        inputs: Sequence[Sequence[Tensor]],
        run: Callable[..., Tensor],
    ) -> list[Tensor]:
        """Commit columns; return the output [D] at each request's last one.

        The texts are those of all requests of the cache, or of new ones that join it. `inputs` are
        the arguments of `run(*inputs_BND, sight)`, each a sequence of [N, D] by request.
        """
        requests = [text.request for text in new]
        cache, joins = self._cache, requests != self._requests
        if joins:
            assert not set(requests) & set(self._requests)
            context = requests[0].context
            cache = TreeCache(batch=len(requests), num_layers=self._num_layers, context=context)
        last: list[Tensor | None] = [None] * len(new)
        columns = [self._label(text.tokens) for text in new]
        for start in range(0, max(map(len, columns)), _CHUNK):
            parts = [labels[start : start + _CHUNK] for labels in columns]
            padded = [
                pad_sequence([x_ND[start : start + _CHUNK] for x_ND in xs], batch_first=True)
                for xs in inputs
            ]
            num_nodes = max(map(len, parts))
            depths_BN = torch.arange(num_nodes).expand(len(parts), -1)
            visible_NN = torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril()
            visible_BNN = visible_NN.expand(len(parts), -1, -1)
            out_BND = self.grow(padded, depths_BN, visible_BNN, run, cache)
            cache.commit(parts, [range(len(part)) for part in parts])
            for b, part in enumerate(parts):
                if part:
                    last[b] = out_BND[b, len(part) - 1]
        if joins and self._requests:
            self._cache.join(cache)
        elif joins:
            self._cache = cache
        self._requests += requests if joins else []
        return [state_D for state_D in last if state_D is not None]

    def grow(
        self,
        inputs: Sequence[Tensor],
        depths_BT: Tensor,
        visible_BNT: Tensor,
        run: Callable[..., Tensor],
        cache: TreeCache | None = None,
    ) -> Tensor:
        """Feed the tail's last N of T nodes and return their outputs [B, N, D].

        The first T - N were fed before. Depth 0 is the first column after the committed ones.
        """
        cache = cache or self._cache
        like = inputs[0]
        num_nodes, num_tail = visible_BNT.shape[1:]
        lengths = cache.lengths
        positions_BT = torch.tensor(lengths)[:, None] + depths_BT.cpu()
        cache.open(positions_BT, num_nodes, like.device)
        keys_BS = cache.positions_BS[:, : cache.width]
        mask_B1NS = tree_mask(lengths, keys_BS, visible_BNT.to(like.device), like.dtype)
        rotary = self._rotary.at(positions_BT[:, num_tail - num_nodes :], like)
        return run(*inputs, Sight(rotary, mask_B1NS, cache.model_cache))
