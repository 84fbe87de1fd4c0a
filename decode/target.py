"""The only module that knows how transformers' models are called: masks, positions, features.

A pass feeds N nodes per row on top of the committed tokens in a `TreeCache`. Masks are 4-D,
additive and in the model's dtype: boolean ones are silently added as 0/1 by eager attention.
Positions are committed length + depth. Models stay unmodified; one that cannot be handled through
mask, positions and cache is refused by name. Suffixes: B batch, N nodes, S columns of the cache
(committed and tail), T nodes in the tail or tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.decode import rotary, tree
from spectool.decode.cache import BatchCache, TreeCache, cache_argument
from spectool.decode.fit import check_fit
from spectool.decode.kv.base import parse_kv
from spectool.decode.protocol import Inject, Needs
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError, UsageError
from spectool.kernels.registry import use_kernels
from spectool.model.decoder import find_decoder
from spectool.model.kernels import attach_kernels

# Prompt tokens per pass: bounds the mask and, under eager attention, the scores.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Pass:
    """The output of a pass: logits [B, kept nodes, V], and features [B, N, D] by name."""

    logits_BNV: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """The output of feeding committed tokens: the last logits of each row, and by row the features
    [T, D] and a function that computes the likeliest ids [T][K] after each token.
    """

    logits_BV: Tensor
    features: list[dict[str, Tensor]]
    top: list[Callable[[], list[list[int]]]]


class Target:
    """A causal model as the decode loop sees it. `context` bounds prompt and new tokens together.

    `kv` names the store of its keys and values (`parse_kv`); `kv_bytes_per_token` counts all
    layers and is known after the first pass.
    `notes` lists what had to be changed or bounded to run the model correctly. `takes_drafts`: a
    pass of several tokens is correct after other passes; else `why_plain` says why not.
    `takes_trees`: a pass may hold a tree. `state_in_cache`: the cache holds all
    state of a request, so requests can take turns. `cache_name` is the cache argument of the
    model's forward. `context_reason` says why the context is shorter than the model's own, if it
    is.

    Raises:
        UnsupportedError: an architecture for which tree passes cannot be correct.
        UsageError: a context longer than the model's.
    """

    takes_drafts = True
    takes_trees = True
    why_plain = ""
    state_in_cache = True

    def __init__(
        self, model: PreTrainedModel, *, context: int | None = None, kv: str = "dense"
    ) -> None:
        self.kv = kv
        self.kv_bytes_per_token: int | None = None
        self._make_store = parse_kv(kv)
        config = model.config.get_text_config(decoder=True)
        accepted = inspect.signature(model.forward).parameters
        self._check_fit(model, config, accepted)
        self.model: Any = model
        self.decoder: Any = find_decoder(model)
        self.name = config.model_type
        self.notes: list[str] = []
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.device = model.device
        self.dtype = model.dtype
        self.windows = _windows(config)
        name = cache_argument(accepted)
        assert name is not None, "a forward that takes no cache is refused"
        self.cache_name = name
        self._keeps_logits = "logits_to_keep" in accepted
        self.kernels = attach_kernels(model, self.dtype)
        self._original = rotary.find_original_context(config)
        self.context_reason = rotary.explain_context(config)
        self._rotaries = rotary.list_longrope_modules(model)
        self.context = self._choose_context(config, context)
        if self._original is not None:
            self.notes.append(
                f"texts of up to {self._original} tokens, new ones included, run with the short "
                "rotary factors, longer ones with the long factors throughout"
            )
        self._choose_attention()

    def span(self, length: int) -> int:
        """Return the context to open for a text of up to `length` tokens, new ones included.

        A text keeps to one of longrope's two sets of factors, each with its own context: keys
        cached with the short factors are wrong under the long ones.
        """
        if self._original is None or length > self._original:
            return self.context
        return min(self._original, self.context)

    def cache(self, batch: int, context: int | None = None) -> BatchCache:
        """Return an empty cache for `batch` rows, with a context as `span` returns it."""
        return TreeCache(
            batch=batch,
            num_layers=self.num_layers,
            context=context or self.context,
            make_store=self._make_store,
        )

    @torch.inference_mode()
    def prefill(
        self, cache: BatchCache, tokens: Sequence[Sequence[int]], needs: Needs | None = None
    ) -> PrefillOutput:
        """Feed and commit tokens in chunks; rows may be empty, and have zeros as logits then."""
        wanted = needs or Needs()
        captured = replace(wanted, final=wanted.final or wanted.top > 0)
        logits_BV: Tensor | None = None
        collected: list[list[dict[str, Tensor]]] = [[] for _ in tokens]
        for start in range(0, max(map(len, tokens)), _CHUNK):
            parts = [list(row[start : start + _CHUNK]) for row in tokens]
            num_nodes = max(map(len, parts))
            ends = {
                row: len(part) - 1
                for row, part in enumerate(parts)
                if part and start + len(part) == len(tokens[row])
            }
            kept = sorted(set(ends.values())) or [num_nodes - 1]
            visible_NN = torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril()
            done = self._forward(
                cache,
                [part + [0] * (num_nodes - len(part)) for part in parts],
                torch.arange(num_nodes).expand(len(parts), -1),
                visible_NN.expand(len(parts), -1, -1),
                captured,
                kept,
            )
            cache.commit(parts, [range(len(part)) for part in parts])
            if logits_BV is None:
                logits_BV = done.logits_BNV.new_zeros(len(parts), done.logits_BNV.shape[-1])
            for row, end in ends.items():
                logits_BV[row] = done.logits_BNV[row, kept.index(end)]
            for row, part in enumerate(parts):
                collected[row].append({k: v[row, : len(part)] for k, v in done.features.items()})
        assert logits_BV is not None, "nothing to feed"
        features = [
            {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            for pieces in collected
        ]
        return self._prefill_output(logits_BV, features, wanted)

    def _prefill_output(
        self, logits_BV: Tensor, features: list[dict[str, Tensor]], wanted: Needs
    ) -> PrefillOutput:
        """Return what was asked for; `features` hold `final` wherever `top` was asked for."""
        top: list[Callable[[], list[list[int]]]] = []
        for by_name in features:
            states_TD = by_name.get("final") if wanted.final else by_name.pop("final", None)
            if states_TD is None or not wanted.top:
                top.append(list)
            else:
                top.append(functools.partial(self._top_after, states_TD, wanted.top))
        return PrefillOutput(logits_BV, features, top)

    @torch.inference_mode()
    def _top_after(self, states_TD: Tensor, count: int) -> list[list[int]]:
        """Return the `count` likeliest ids [T][K] after states at the input of the lm_head.

        Scaled or soft-capped logits are in the order of the products, which suffices here.
        """
        lm_head = self.model.get_output_embeddings()
        found: list[list[int]] = []
        with use_kernels():
            for part_TD in torch.split(states_TD, _CHUNK):
                found += top_ids(lm_head(part_TD), count).tolist()
        return found

    @torch.inference_mode()
    def verify(
        self, cache: BatchCache, drafts: Sequence[Draft], needs: Needs | None = None
    ) -> Pass:
        """Feed every request's tree without committing. Logits past a row's tree are undefined.

        Smaller trees are padded with nodes that see only themselves.
        """
        num_rows = max(draft.num_rows for draft in drafts)
        tokens, parents, slots, owners = [], [], [], []
        for draft in drafts:
            num_nodes = len(draft)
            padding = range(draft.num_rows, num_rows)
            tokens.append(draft.tokens + [0] * (num_rows - num_nodes))
            above = [0, *draft.parents[1:], *(parent for parent, _ in draft.extra_rows), *padding]
            parents.append(above)
            slots.append([-1] * num_nodes + [slot for _, slot in draft.extra_rows])
            slots[-1] += [-1] * len(padding)
            owner = list(range(num_rows))
            for row in range(num_nodes, draft.num_rows):
                owner[row] = owner[above[row]]
            owners.append(owner)
        extra = None
        if any(draft.extra_rows for draft in drafts):
            extra = (torch.tensor(slots, device=self.device), torch.tensor(owners).to(self.device))
        return self.grow(cache, tokens, parents, needs=needs, extra=extra)

    @torch.inference_mode()
    def grow(
        self,
        cache: BatchCache,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        *,
        fed: int = 0,
        seen: Sequence[int] | None = None,
        needs: Needs | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Pass:
        """Feed the nodes of trees from index `fed` on; those before it are in the tail already.

        A node without a parent is its own parent (forests); all rows have as many nodes. Each row
        sees its first `seen` committed tokens, all by default, and its nodes stand right after
        these. `extra` are slots and owners [B, N] for `Needs.inject`.
        """
        depths: list[list[int]] = []
        for row in parents:
            found: list[int] = []
            for node, parent in enumerate(row):
                found.append(0 if parent == node else found[parent] + 1)
            depths.append(found)
        visible_BNN = tree.ancestor_mask(torch.tensor(parents), max(map(max, depths)))
        return self._forward(
            cache,
            [list(row[fed:]) for row in tokens],
            torch.tensor(depths),
            visible_BNN[:, fed:],
            needs or Needs(),
            None,
            seen,
            extra,
        )

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint that the model was loaded from, or None."""
        path = Path(self.model.config._name_or_path or "")
        return open_checkpoint(path) if (path / "config.json").is_file() else None

    @property
    def num_tokens(self) -> int:
        """Return the number of rows of the embedding: ids are below it."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def width(self) -> int:
        """Return the size of the state that the lm_head reads."""
        width: int = self.model.get_output_embeddings().in_features
        return width

    def _forward(
        self,
        cache: BatchCache,
        tokens: list[list[int]],
        depths_BT: Tensor,
        visible_BNT: Tensor,
        needs: Needs,
        kept: list[int] | None,
        seen: Sequence[int] | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Pass:
        """Call the model for the last N of the tail's T nodes; only the nodes `kept` get logits.

        Depths and visibility are on the host.
        """
        assert isinstance(cache, TreeCache)
        lengths = cache.lengths
        seen = seen or lengths
        num_nodes, num_tail = visible_BNT.shape[1:]
        # Padding must not reach positions that the model does not have: learned tables end there.
        positions_BT = (torch.tensor(seen)[:, None] + depths_BT).clamp_(max=cache.context - 1)
        cache.open(positions_BT, num_nodes, self.device)
        options: dict[str, Any] = {self.cache_name: cache.model_cache}
        if kept is not None and self._keeps_logits:
            last = kept == [num_nodes - 1]
            options["logits_to_keep"] = 1 if last else torch.tensor(kept, device=self.device)
        keys_BS = cache.positions_BS[:, : cache.width]
        masks = self.masks(lengths, keys_BS, visible_BNT.to(self.device), seen)
        with (
            self.capture_features(needs) as features,
            self.inject_states(needs.inject, extra),
            rotary.use_long_factors(self._rotaries, self._original, cache.context),
            use_kernels(),
        ):
            output = self.model(
                input_ids=torch.tensor(tokens, device=self.device),
                attention_mask=masks,
                position_ids=positions_BT[:, num_tail - num_nodes :].to(self.device),
                use_cache=True,
                **options,
            )
        if self.kv_bytes_per_token is None:
            self.kv_bytes_per_token = cache.token_bytes
        logits_BNV = output.logits
        if kept is not None and not self._keeps_logits:
            logits_BNV = logits_BNV[:, kept]
        return Pass(logits_BNV, features)

    def masks(
        self,
        lengths: Sequence[int],
        positions_BS: Tensor,
        visible_BNT: Tensor,
        seen: Sequence[int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the mask of a pass; if layers differ, one for each kind of layer."""
        masks = {
            kind: tree_mask(
                lengths, positions_BS, visible_BNT, self.dtype, seen=seen, window=window
            )
            for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def capture_features(self, needs: Needs) -> Iterator[dict[str, Tensor]]:
        """Capture the features asked for during one pass, by forward hooks."""
        features: dict[str, Tensor] = {}
        handles = []
        if needs.layers:
            layers = self.layers()
            for index in needs.layers:
                hook = _capture_hook(features, f"layer {index}")
                handles.append(layers[index].register_forward_hook(hook))
        if needs.final:
            handles.append(self.decoder.register_forward_hook(_capture_hook(features, "final")))
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def inject_states(
        self, inject: Mapping[int, Inject], extra: tuple[Tensor, Tensor] | None
    ) -> Iterator[None]:
        """During one pass, replace the hidden states of extra rows at the inputs of layers."""
        handles = []
        for index, put in inject.items():
            if extra is None:
                continue
            if index < 0:
                hook = _output_hook(put, *extra)
                handles.append(self.model.get_input_embeddings().register_forward_hook(hook))
            else:
                before = _input_hook(put, *extra)
                layer = self.layers()[index]
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> nn.ModuleList:
        """Return the decoder layers; raise UnsupportedError if the model has no list of them."""
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise UnsupportedError(f"{self.name}: found no list of {self.num_layers} decoder layers")

    def _check_fit(
        self, model: PreTrainedModel, config: PreTrainedConfig, accepted: Mapping[str, Any]
    ) -> None:
        """Raise UnsupportedError if tree passes cannot be correct with this model."""
        check_fit(model, config, accepted)

    def _choose_context(self, config: PreTrainedConfig, asked: int | None) -> int:
        """Return the context asked for, else the model's; refuse a longer one."""
        limit = rotary.longest_context(config)
        if limit is None:
            return asked if asked is not None else 1 << 20
        if asked is not None and asked > limit:
            raise UsageError(
                f"--context {asked}: {self.name} holds at most {limit} tokens",
                hint=self.context_reason,
            )
        return asked if asked is not None else limit

    def _choose_attention(self) -> None:
        """Replace an attention that takes no 4-D mask (flash, flex), and add a note."""
        given = self.model.config._attn_implementation
        if given in ("sdpa", "eager"):
            return
        try:
            self.model.set_attn_implementation("sdpa")
        except ValueError:
            self.model.set_attn_implementation("eager")
        chosen = self.model.config._attn_implementation
        self.notes.append(f"attention {given} takes no tree mask; using {chosen}")


def tree_mask(
    lengths: Sequence[int],
    positions_BS: Tensor,
    visible_BNT: Tensor,
    dtype: torch.dtype,
    *,
    seen: Sequence[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """Return the additive mask [B, 1, N, S]: a node sees its row's committed tokens and its path.

    `positions_BS` are the positions of all columns, on the host. Of the `lengths` committed
    columns, a row sees the first `seen`, all by default; in layers with a window, only keys less
    than `window` positions back.
    """
    (batch, num_nodes, num_tail), width = visible_BNT.shape, positions_BS.shape[1]
    hidden, device = torch.finfo(dtype).min, visible_BNT.device
    seen = seen or lengths
    mask_B1NS = torch.full((batch, 1, num_nodes, width), hidden, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        mask_B1NS[row, :, :, : seen[row]] = 0
        tail_1NT = mask_B1NS[row, :, :, length : length + num_tail]
        tail_1NT.masked_fill_(visible_BNT[row], 0)
    if window is not None and int(positions_BS.max()) >= window:
        for row, length in enumerate(lengths):
            key_S, end = positions_BS[row].to(device), length + num_tail
            behind_NS = key_S[end - num_nodes : end, None] - key_S
            mask_B1NS[row, 0].masked_fill_(behind_NS >= window, hidden)
    return mask_B1NS


def isolate_texts(segments_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and visibility [B, L, L] for rows of several texts (sequence packing).

    Positions [B, L] start at 0 with every text; a token sees its own text up to itself.
    """
    length = segments_BL.shape[1]
    column_L = torch.arange(length, device=segments_BL.device)
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    starts_BL = torch.where(begins_BL, column_L, 0).cummax(-1).values
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None]
    return column_L - starts_BL, same_BLL.tril()


def top_ids(logits_BNV: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest logits in descending order, or of all if fewer."""
    return logits_BNV.topk(min(count, logits_BNV.shape[-1])).indices


def _capture_hook(features: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # A layer returns a tensor or a tuple, a decoder a ModelOutput; the state comes first.
        state = output if isinstance(output, Tensor) else output[0]
        if state.ndim != 3:
            # Gemma 3n returns several states, stacked.
            raise UnsupportedError(
                f"{type(module).__name__}: its hidden states have more dimensions than batch, "
                "length and width; heads that read them cannot be run",
                hint="medusa and hydra heads read the last layer's alone",
            )
        features[name] = state

    return hook


def _output_hook(put: Inject, slots_BN: Tensor, owners_BN: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return put(output, slots_BN, owners_BN)

    return hook


def _input_hook(put: Inject, slots_BN: Tensor, owners_BN: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, options: Any) -> Any:
        if inputs:
            return (put(inputs[0], slots_BN, owners_BN), *inputs[1:]), options
        return inputs, options | {
            "hidden_states": put(options["hidden_states"], slots_BN, owners_BN)
        }

    return hook


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return kinds of attention layers and their windows, as transformers infers them."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
