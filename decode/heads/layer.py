"""Decoder layers of a drafter's own, with keys and values of their own.

The layer is Llama's (RMS norms, rotary positions, gated MLP), in the target's shape whatever the
target's own layers are; its modules are named as there. `DraftCache` keeps the rows that follow
the target's committed tokens, and the tree that is being drafted as their tail.

Suffixes: B rows, N nodes or tokens fed, T nodes in the tail, S keys, H heads of width E, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from spectool.decode.cache import TreeCache
from spectool.decode.protocol import PrefilledPrompt
from spectool.decode.target import isolate_texts, tree_mask
from spectool.model.decoder import decoder_of

# Scores of a training step that are kept; to make them anew costs a ninth more time.
_SCORE_BYTES = 1 << 26
# Tokens of a prompt per pass: bounds the mask.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Sight:
    """Where the rows of a pass stand and what they see.

    `rotary` are cosines and sines [B, N, E]. Without a mask rows see all before them in the pass,
    as whole texts do; without a cache there is nothing else.
    """

    rotary: tuple[Tensor, Tensor]
    mask_B1NS: Tensor | None = None
    cache: TreeCache | None = None


class Rotary:
    """The target's rotary positions, or plain ones. No module: casts must not reach its angles."""

    def __init__(self, config: LlamaConfig) -> None:
        self._angles = LlamaRotaryEmbedding(config)

    def at(self, positions_BN: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, N, E] in the dtype and on the device of `like`."""
        found: tuple[Tensor, Tensor] = self._angles(like, positions_BN.to(like.device))
        return found

    def text(self, like_BLD: Tensor, segments_BL: Tensor | None = None) -> Sight:
        """The sight of whole texts, for training; of several in a row each sees itself alone."""
        if segments_BL is not None:
            positions_BL, visible_BLL = isolate_texts(segments_BL)
            batch, length = positions_BL.shape
            mask_B1LL = tree_mask([0] * batch, positions_BL, visible_BLL, length, like_BLD.dtype)
            return Sight(self.at(positions_BL, like_BLD), mask_B1LL)
        positions_1L = torch.arange(like_BLD.shape[1])[None]
        return Sight(self.at(positions_1L, like_BLD))


class Attention(nn.Module):
    """Grouped-query attention over `inputs` states side by side, D each."""

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
        """Queries, keys and values, [B, H, N, E] each, the first two turned to their positions."""
        parts = [
            layer(x_BND).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        q, k = apply_rotary_pos_emb(parts[0], parts[1], *rotary)
        return q, k, parts[2]

    def merge(self, out_BHNE: Tensor) -> Tensor:
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
    """Attention [B, H, N, E] of every place's own chain of drafts, for training all at once.

    At step s the row at place t sees the first step's rows up to t, and of each later step the row
    at t alone. `keys` and `values` are those of the steps 0 ... s, [B, H or fewer, N, E] each.
    Large scores are made anew for the gradient: those of all steps would outweigh everything else.
    """
    batch, heads, length, _ = q.shape
    large = 4 * batch * heads * length**2 > _SCORE_BYTES
    if not (large and torch.is_grad_enabled()):
        return _attend(q, keys, values)
    # More are added to the lists before the gradient is asked for.
    attended: Tensor = checkpoint(_attend, q, tuple(keys), tuple(values), use_reentrant=False)
    return attended


def _attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    shared = q.shape[1] // keys[0].shape[1]
    keys = [k.repeat_interleave(shared, 1) for k in keys]
    values = [v.repeat_interleave(shared, 1) for v in values]
    q = q * q.shape[-1] ** -0.5
    scores_BHNN = q @ keys[0].transpose(-1, -2)
    length = q.shape[2]
    later_NN = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores_BHNN = scores_BHNN.masked_fill(later_NN, -torch.inf)
    own = [(q * k).sum(-1, keepdim=True) for k in keys[1:]]
    weights = torch.cat([scores_BHNN, *own], -1).softmax(-1)
    out_BHNE = weights[..., :length] @ values[0]
    for step, v in enumerate(values[1:]):
        out_BHNE = out_BHNE + weights[..., length + step, None] * v
    return out_BHNE


class DecoderLayer(nn.Module):
    """x + attention(norm x), then + MLP(norm of that)."""

    def __init__(self, config: LlamaConfig, index: int = 0) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]

    def forward(self, x_BND: Tensor, sight: Sight) -> Tensor:
        return self.finish(x_BND, self.self_attn(self.input_layernorm(x_BND), sight))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, of states [..., D] and what that gave for them."""
        x = x + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def begin_as_last(self, model: PreTrainedModel) -> None:
        """Take the weights of the target's last layer, where that is a Llama layer too."""
        layers = getattr(decoder_of(model), "layers", None)
        config: Any = model.config.get_text_config(decoder=True)
        # Gemma's first layers have the same names, another gate and other norms.
        if not layers or getattr(config, "hidden_act", None) != "silu":
            return
        found, own = layers[-1].state_dict(), self.state_dict()
        if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
            self.load_state_dict(found)


def layer_config(model: PreTrainedModel) -> LlamaConfig:
    """A Llama layer of the target's width, heads, MLP width, positions and epsilon."""
    config: Any = model.config.get_text_config(decoder=True)

    def first(*names: str, default: Any) -> Any:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if value), default)

    width, num_heads = config.hidden_size, config.num_attention_heads
    rope = dict(first("rope_parameters", default={}))
    if "rope_theta" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        # No rotary positions, or several kinds, or of a part of the head only.
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    head_width = first("head_dim", default=width // num_heads)
    # Some models have another width in each layer, or several kinds of them.
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


def final_scale(model: PreTrainedModel) -> Tensor | None:
    """The weight [D] of the target's last RMS norm; None where it has another norm."""
    decoder: Any = decoder_of(model)
    norm = getattr(decoder, "norm", None)
    if norm is None or "RMSNorm" not in type(norm).__name__:
        return None
    weight_D: Tensor = norm.weight.detach()
    # Gemma's are stored as what is added to 1.
    return weight_D + 1 if "Gemma" in type(norm).__name__ else weight_D


class DraftCache:
    """Keys and values of a drafter's layers, a row's in step with what the target committed.

    What a row's column was made of is named by a token, so that a later call that goes on from a
    kept prefix finds how much of it still holds. Positions are columns: only differences matter to
    rotary positions, so a beginning that was never seen is no harm.
    """

    def __init__(self, rotary: Rotary, num_layers: int) -> None:
        self._rotary, self._num_layers = rotary, num_layers
        self._cache = TreeCache(batch=0, num_layers=num_layers, context=0)
        self._order: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Committed columns of each row."""
        return self._cache.lengths

    def begin(self, prompts: Sequence[PrefilledPrompt], tokens: Sequence[Sequence[int]]) -> None:
        """A new batch: `tokens[b]` name the columns that row b's prompt will have.

        Those of what the prompts did not pass anew are kept from the call before, as far as they
        are there.
        """
        self._order = [prompt.row.index for prompt in prompts]
        context = prompts[0].row.context
        if len(self._cache.tokens) != len(prompts) or self._cache.context != context:
            self._cache = TreeCache(
                batch=len(prompts), num_layers=self._num_layers, context=context
            )
        for row, (prompt, named) in enumerate(zip(prompts, tokens, strict=True)):
            num_new = len(next(iter(prompt.features.values())))
            pairs = zip(self._cache.tokens[row], named[: len(named) - num_new], strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._cache.truncate(row, shared)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, by their index."""
        if list(rows) != self._order:
            self._cache.select([self._order.index(row) for row in rows])
            self._order = list(rows)

    def feed(
        self,
        tokens: Sequence[Sequence[int]],
        inputs: Sequence[Sequence[Tensor]],
        run: Callable[..., Tensor],
    ) -> list[Tensor]:
        """Commit columns; the output [D] at the last one of each row. None of the rows is empty.

        `inputs` are, one after the other, what `run(*inputs_BND, sight)` takes, [N, D] for each
        row.
        """
        last: list[Tensor | None] = [None] * len(tokens)
        for start in range(0, max(map(len, tokens)), _CHUNK):
            parts = [list(row[start : start + _CHUNK]) for row in tokens]
            padded = [
                pad_sequence([x_ND[start : start + _CHUNK] for x_ND in each], batch_first=True)
                for each in inputs
            ]
            num_nodes = max(map(len, parts))
            depths_BN = torch.arange(num_nodes).expand(len(parts), -1)
            visible_NN = torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril()
            out_BND = self.grow(padded, depths_BN, visible_NN.expand(len(parts), -1, -1), run)
            self._cache.commit(parts, [range(len(part)) for part in parts])
            for row, part in enumerate(parts):
                if part:
                    last[row] = out_BND[row, len(part) - 1]
        return [state_D for state_D in last if state_D is not None]

    def grow(
        self,
        inputs: Sequence[Tensor],
        depths_BT: Tensor,
        visible_BNT: Tensor,
        run: Callable[..., Tensor],
    ) -> Tensor:
        """The outputs [B, N, D] of the tail's last N nodes; the first T - N are fed already.

        Depths count from the first column after the committed ones.
        """
        like = inputs[0]
        num_nodes, num_tail = visible_BNT.shape[1:]
        lengths = self._cache.lengths
        positions_BT = (torch.tensor(lengths)[:, None] + depths_BT.cpu()).to(like.device)
        self._cache.open(num_nodes, like.device, after=num_tail - num_nodes)
        mask_B1NS = tree_mask(
            lengths, positions_BT, visible_BNT.to(like.device), self._cache.width, like.dtype
        )
        rotary = self._rotary.at(positions_BT[:, num_tail - num_nodes :], like)
        return run(*inputs, Sight(rotary, mask_B1NS, self._cache))
