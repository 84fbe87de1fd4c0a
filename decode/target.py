"""The only place that knows how transformers' models are called: masks, positions, features.

A pass feeds N nodes per row on top of the committed tokens in a `TreeCache`. Masks are 4-D,
additive and in the model's dtype: boolean ones are silently added as 0/1 by eager attention.
Positions are committed length + depth. Models stay unmodified; one that cannot be handled through
mask, positions and cache is refused by name. Suffixes: B batch, N nodes, S columns of the cache
(committed and tail), T nodes in the tail or tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from spectool import machine
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.decode import rotary, tree
from spectool.decode.cache import TextCache, TreeCache, cache_argument
from spectool.decode.fit import check_fit
from spectool.decode.protocol import Inject, Needs
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError, UsageError
from spectool.kernels import skinny
from spectool.model.decoder import decoder_of

# Prompt tokens per pass: bounds the mask and, under eager attention, the scores.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Pass:
    """Logits [B, kept nodes, V] and the features asked for, [B, N, D] each."""

    logits_BNV: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """After committed tokens were fed: the last one's logits and, per row, features [T, D] and
    what computes the likeliest ids [T][K] after each."""

    logits_BV: Tensor
    features: list[dict[str, Tensor]]
    top: list[Callable[[], list[list[int]]]]


class Target:
    """A causal model as the loop sees it. `context` bounds prompt and new tokens together.

    `notes` says what had to be changed or bounded to run it rightly. `takes_drafts`: passes of
    several tokens are right after others. `keeps_rows`: its caches hold all that a text leaves, so
    that several can take turns. `cache_name` is what the model's forward calls its cache.

    Raises:
        UnsupportedError: an architecture that tree passes cannot be right for.
        UsageError: a context longer than the model's.
    """

    takes_drafts = True
    keeps_rows = True

    def __init__(self, model: PreTrainedModel, *, context: int | None = None) -> None:
        config = model.config.get_text_config(decoder=True)
        accepted = inspect.signature(model.forward).parameters
        self._check_fit(model, config, accepted)
        self.model: Any = model
        self.decoder: Any = decoder_of(model)
        self.name = config.model_type
        self.notes: list[str] = []
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.device = model.device
        self.dtype = model.dtype
        self._windows = _windows(config)
        name = cache_argument(accepted)
        assert name is not None, "a forward that takes no cache is refused"
        self.cache_name = name
        self._keeps_logits = "logits_to_keep" in accepted
        self._linears = skinny.eligible_linears(model.modules())
        self._most_rows = kernel_rows(self.dtype)
        self._original, self.bound = rotary.two_ranges(config), rotary.bound_by(config)
        self._rotaries = rotary.longropes(model)
        self.context = self._bound(config, context)
        if self._original is not None:
            self.notes.append(
                f"texts of up to {self._original} tokens, new ones included, run with the short "
                "rotary factors, longer ones with the long factors throughout"
            )
        self._choose_attention()

    def span(self, length: int) -> int:
        """The context that a text of up to `length` tokens, new ones included, is read in.

        Some models have two, with rotary factors of their own (longrope). One text keeps to one:
        keys that are cached with the short factors mean nothing to the long ones.
        """
        if self._original is None or length > self._original:
            return self.context
        return min(self._original, self.context)

    def cache(self, batch: int, context: int | None = None) -> TreeCache:
        """An empty cache for `batch` rows, of this context as `span` has it."""
        return TreeCache(batch=batch, num_layers=self.num_layers, context=context or self.context)

    @torch.inference_mode()
    def prefill(
        self, cache: TreeCache, tokens: Sequence[Sequence[int]], needs: Needs | None = None
    ) -> PrefillOutput:
        """Feed and commit committed tokens, in chunks; rows may be of any length, also empty.

        An empty row's logits are zeros.
        """
        wanted = needs or Needs()
        heard = replace(wanted, final=wanted.final or wanted.top > 0)
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
                heard,
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
        """What was asked for, of features that hold `final` wherever `top` was asked for."""
        top: list[Callable[[], list[list[int]]]] = []
        for row in features:
            states_TD = row.get("final") if wanted.final else row.pop("final", None)
            if states_TD is None or not wanted.top:
                top.append(list)
            else:
                top.append(functools.partial(self._likeliest_after, states_TD, wanted.top))
        return PrefillOutput(logits_BV, features, top)

    @torch.inference_mode()
    def _likeliest_after(self, states_TD: Tensor, count: int) -> list[list[int]]:
        """The `count` likeliest ids [T][K] after states that the output matrix reads.

        Scaled or bounded logits are in the order of the products, which are enough here.
        """
        head = self.model.get_output_embeddings()
        found: list[list[int]] = []
        with skinny.products(self._linears, self._most_rows):
            for part_TD in torch.split(states_TD, _CHUNK):
                found += top_ids(head(part_TD), count).tolist()
        return found

    @torch.inference_mode()
    def verify(self, cache: TreeCache, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        """Feed every row's tree; nothing is committed. Logits of row b past its tree mean nothing.

        Smaller trees are padded with nodes that see only themselves.
        """
        num_rows = max(draft.num_rows for draft in drafts)
        tokens, parents, slots, owners = [], [], [], []
        for draft in drafts:
            num_nodes = len(draft)
            padding = range(draft.num_rows, num_rows)
            tokens.append(draft.tokens + [0] * (num_rows - num_nodes))
            above = [0, *draft.parents[1:], *(parent for parent, _ in draft.beside), *padding]
            parents.append(above)
            slots.append([-1] * num_nodes + [slot for _, slot in draft.beside])
            slots[-1] += [-1] * len(padding)
            owner = list(range(num_rows))
            for row in range(num_nodes, draft.num_rows):
                owner[row] = owner[above[row]]
            owners.append(owner)
        beside = None
        if any(draft.beside for draft in drafts):
            beside = (torch.tensor(slots, device=self.device), torch.tensor(owners).to(self.device))
        return self.grow(cache, tokens, parents, needs=needs, beside=beside)

    @torch.inference_mode()
    def grow(
        self,
        cache: TreeCache,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        *,
        fed: int = 0,
        seen: Sequence[int] | None = None,
        needs: Needs | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Pass:
        """Feed the nodes from `fed` on of trees, or forests, whose first nodes are in the tail.

        A node without a parent is its own; all rows have as many nodes. The rows see their first
        `seen` committed tokens, all by default, and the nodes stand right after these. `beside`
        are the last two arguments of what the drafter injects.
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
            beside,
        )

    @torch.no_grad()
    def read(
        self,
        tokens_BL: Tensor,
        needs: Needs,
        segments_BL: Tensor | None = None,
        *,
        keep: TextCache | None = None,
    ) -> dict[str, Tensor]:
        """Features [B, L, D] of whole texts, for training: no logits; keys and values to `keep`.

        Rows are padded at the right, where causal attention does not look. Of several texts in a
        row, as `segments_BL` numbers them, each is read as if it stood alone. Not inference mode:
        autograd saves no inference tensors.
        """
        options: dict[str, Any] = {}
        if keep is not None:
            options[self._decoder_cache_name] = keep
        if segments_BL is not None:
            positions_BL, visible_BLL = packed(segments_BL.to(self.device))
            batch, length = positions_BL.shape
            masks = {
                kind: tree_mask(
                    [0] * batch, positions_BL, visible_BLL, length, self.dtype, window=window
                )
                for kind, window in self._windows.items()
            }
            options["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
            options["position_ids"] = positions_BL
        with self._listen(needs) as features:
            self.decoder(
                input_ids=tokens_BL.to(self.device),
                use_cache=keep is not None,
                **options,
            )
        return features

    def check(self, needs: Needs) -> None:
        """Raises: UnsupportedError: the features that are asked for are not [B, N, D]."""
        self.read(torch.zeros(1, 2, dtype=torch.long), needs)

    def read_extra_rows(
        self,
        kept: TextCache,
        places_BA: Tensor,
        rows: Sequence[tuple[int, int]],
        inject: Mapping[int, Inject],
    ) -> Tensor:
        """States [B, A, X, D] after the final norm of rows beside texts, for training.

        At each of a text's A places there are X `rows`, a parent and what it stands for each as in
        `Draft.beside`, where node 0 is the text's token at the place. They see the text up to it
        and their own parents, and differentiate. `inject` hears of places of the text as the nodes
        that rows belong to.
        """
        (batch, num_places), num_own = places_BA.shape, len(rows)
        parents, depths = [0], [0]
        for parent, _ in rows:
            parents.append(parent)
            depths.append(depths[parent] + 1)
        own_XX = tree.ancestor_mask(torch.tensor([parents]), max(depths))[0, 1:, 1:]
        # Chains of different places do not see each other.
        own_NN = torch.eye(num_places).kron(own_XX.float()).bool().to(self.device)
        places_BN = places_BA.repeat_interleave(num_own, 1).to(self.device)
        depths_N = torch.tensor(depths[1:] * num_places, device=self.device)
        positions_BN = (places_BN + depths_N).clamp_(max=self.context - 1)
        text_BNL = torch.arange(kept.length, device=self.device) <= places_BN[..., None]
        sees_BNS = torch.cat([text_BNL, own_NN.expand(batch, -1, -1)], -1)
        masks = {}
        for kind, window in self._windows.items():
            near_BNS = sees_BNS
            if window is not None:
                key_L = torch.arange(kept.length, device=self.device).expand(batch, -1)
                key_BS = torch.cat([key_L, positions_BN], 1)
                near_BNS = sees_BNS & (positions_BN[..., None] - key_BS[:, None] < window)
            hidden = torch.finfo(self.dtype).min
            mask_BNS = torch.zeros(near_BNS.shape, dtype=self.dtype, device=self.device)
            masks[kind] = mask_BNS.masked_fill_(~near_BNS, hidden)[:, None]
        slots_BN = torch.tensor([slot for _, slot in rows] * num_places, device=self.device)
        with (
            self._listen(Needs(final=True)) as features,
            self._inject(inject, (slots_BN.expand(batch, -1), places_BN)),
        ):
            self.decoder(
                input_ids=torch.zeros_like(places_BN),
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions_BN,
                use_cache=True,
                **{self._decoder_cache_name: kept},
            )
        return features["final"].view(batch, num_places, num_own, -1)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The directory that the model was loaded from; None if it came from nowhere."""
        place = Path(self.model.config._name_or_path or "")
        return open_checkpoint(place) if (place / "config.json").is_file() else None

    @functools.cached_property
    def _decoder_cache_name(self) -> str:
        """What the decoder calls its cache; one that takes anything, as the model does."""
        accepted = inspect.signature(self.decoder.forward).parameters
        return cache_argument(accepted) or self.cache_name

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding: the ids that a text may have."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def width(self) -> int:
        """The size of the state that the output matrix reads."""
        width: int = self.model.get_output_embeddings().in_features
        return width

    def _forward(
        self,
        cache: TreeCache,
        tokens: list[list[int]],
        depths_BT: Tensor,
        visible_BNT: Tensor,
        needs: Needs,
        kept: list[int] | None,
        seen: Sequence[int] | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Pass:
        """One call of the model, for the last N of the tail's T nodes; `kept` ones get logits.

        Depths and visibility come on the host. Padding never reaches positions that the model has
        not: learned tables end at the context.
        """
        lengths = cache.lengths
        seen = seen or lengths
        num_nodes, num_tail = visible_BNT.shape[1:]
        positions_BT = (torch.tensor(seen)[:, None] + depths_BT).clamp_(max=cache.context - 1)
        cache.open(num_nodes, self.device, after=num_tail - num_nodes)
        positions_BT = positions_BT.to(self.device)
        visible_BNT = visible_BNT.to(self.device)
        options: dict[str, Any] = {self.cache_name: cache}
        if kept is not None and self._keeps_logits:
            last = kept == [num_nodes - 1]
            options["logits_to_keep"] = 1 if last else torch.tensor(kept, device=self.device)
        masks = {
            kind: tree_mask(
                lengths,
                positions_BT,
                visible_BNT,
                cache.width,
                self.dtype,
                seen=seen,
                window=window,
            )
            for kind, window in self._windows.items()
        }
        with (
            self._listen(needs) as features,
            self._inject(needs.inject, beside),
            rotary.long_factors(self._rotaries, self._original, cache.context),
            skinny.products(self._linears, self._most_rows),
        ):
            output = self.model(
                input_ids=torch.tensor(tokens, device=self.device),
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions_BT[:, num_tail - num_nodes :],
                use_cache=True,
                **options,
            )
        logits_BNV = output.logits
        if kept is not None and not self._keeps_logits:
            logits_BNV = logits_BNV[:, kept]
        return Pass(logits_BNV, features)

    @contextmanager
    def _listen(self, needs: Needs) -> Iterator[dict[str, Tensor]]:
        """Capture what was asked for during one pass, by forward hooks."""
        features: dict[str, Tensor] = {}
        handles = []
        if needs.layers:
            layers = self.layers()
            for index in needs.layers:
                hook = _capture(features, f"layer {index}")
                handles.append(layers[index].register_forward_hook(hook))
        if needs.final:
            handles.append(self.decoder.register_forward_hook(_capture(features, "final")))
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _inject(
        self, inject: Mapping[int, Inject], beside: tuple[Tensor, Tensor] | None
    ) -> Iterator[None]:
        """During one pass, let layers read what a drafter puts in place of rows beside the tree."""
        handles = []
        for index, put in inject.items():
            if beside is None:
                continue
            if index < 0:
                hook = _replacing_output(put, *beside)
                handles.append(self.model.get_input_embeddings().register_forward_hook(hook))
            else:
                before = _replacing_input(put, *beside)
                layer = self.layers()[index]
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> nn.ModuleList:
        """The decoder layers, the first first.

        Raises:
            UnsupportedError: the model keeps them in no list.
        """
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise UnsupportedError(f"{self.name}: found no list of {self.num_layers} decoder layers")

    def _check_fit(
        self, model: PreTrainedModel, config: PreTrainedConfig, accepted: Mapping[str, Any]
    ) -> None:
        """Raises: UnsupportedError: passes of trees cannot be right."""
        check_fit(model, config, accepted)

    def _bound(self, config: PreTrainedConfig, asked: int | None) -> int:
        limit = rotary.longest_context(config)
        if limit is None:
            return asked if asked is not None else 1 << 20
        if asked is not None and asked > limit:
            raise UsageError(
                f"--context {asked}: {self.name} holds at most {limit} tokens", hint=self.bound
            )
        return asked if asked is not None else limit

    def _choose_attention(self) -> None:
        """Flash and flex kernels take no such masks: change to one that does, and say so."""
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
    positions_BT: Tensor,
    visible_BNT: Tensor,
    width: int,
    dtype: torch.dtype,
    *,
    seen: Sequence[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """What each node sees, [B, 1, N, S] additive: its row's committed tokens and its path.

    Of `lengths` committed columns the first `seen`, all by default; in layers with a window, keys
    less than `window` positions back.
    """
    batch, num_nodes, num_tail = visible_BNT.shape
    hidden, device = torch.finfo(dtype).min, visible_BNT.device
    seen = seen or lengths
    mask_B1NS = torch.full((batch, 1, num_nodes, width), hidden, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        mask_B1NS[row, :, :, : seen[row]] = 0
        tail_1NT = mask_B1NS[row, :, :, length : length + num_tail]
        tail_1NT.masked_fill_(visible_BNT[row], 0)
    if window is not None and max(seen) + num_tail > window:
        for row, length in enumerate(lengths):
            key_S = torch.arange(width, device=device)
            key_S[length : length + num_tail] = positions_BT[row]
            behind_NS = positions_BT[row, num_tail - num_nodes :, None] - key_S
            mask_B1NS[row, 0].masked_fill_(behind_NS >= window, hidden)
    return mask_B1NS


def packed(segments_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, L] that begin anew with every text of a row, and what each token sees of the
    others [B, L, L]: those of its own text up to itself."""
    length = segments_BL.shape[1]
    place_L = torch.arange(length, device=segments_BL.device)
    begins_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    starts_BL = torch.where(begins_BL, place_L, 0).cummax(-1).values
    own_BLL = segments_BL[:, :, None] == segments_BL[:, None]
    return place_L - starts_BL, own_BLL.tril()


def top_ids(logits_BNV: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest logits, the largest first; fewer in a smaller vocabulary."""
    return logits_BNV.topk(min(count, logits_BNV.shape[-1])).indices


def kernel_rows(dtype: torch.dtype) -> int:
    """Up to how many rows a CPU's products of this dtype are faster by our kernel than by torch."""
    if dtype == torch.bfloat16:
        if not machine.has_bfloat16():
            # torch crawls there.
            return sys.maxsize
        if machine.has_bfloat16_tiles():
            return skinny.MOST_ROWS_BESIDE_TILES
    return skinny.MOST_ROWS


def _capture(features: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # A layer returns a tensor or a tuple, a decoder a ModelOutput; the state comes first.
        state = output if isinstance(output, Tensor) else output[0]
        if state.ndim != 3:
            # Gemma 3n has several side by side.
            raise UnsupportedError(
                f"{type(module).__name__}: its hidden states have more dimensions than batch, "
                "length and width; heads that read them cannot be run",
                hint="medusa and hydra heads read the last layer's alone",
            )
        features[name] = state

    return hook


def _replacing_output(put: Inject, slots_BN: Tensor, owners_BN: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return put(output, slots_BN, owners_BN)

    return hook


def _replacing_input(put: Inject, slots_BN: Tensor, owners_BN: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, options: Any) -> Any:
        if inputs:
            return (put(inputs[0], slots_BN, owners_BN), *inputs[1:]), options
        return inputs, options | {
            "hidden_states": put(options["hidden_states"], slots_BN, owners_BN)
        }

    return hook


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kinds of attention layers and their windows, as transformers' own caches infer them."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
