"""Targets with attention alone: trees by mask, positions and cache.

Positions are committed length + depth; masks are those of `masks.py`. Suffixes: B batch, N nodes,
S columns of the cache (committed and tail), T nodes in the tail or tokens of a prompt, V
vocabulary, D hidden width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.kv.base import parse_kv
from spectool.decode.protocol import Inject, Needs
from spectool.decode.target import rotary, row_attention
from spectool.decode.target.base import CHUNK, Pass, Target
from spectool.decode.target.fit import check_fit
from spectool.decode.target.fused import end_after, fuse_layers, release_layers
from spectool.decode.target.masks import list_windows, tree_mask
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError
from spectool.kernels.registry import use_kernels
from spectool.model.experts import choose_experts, release_experts
from spectool.model.kernels import attach_kernels, has_products


class AttentionTarget(Target[TreeCache]):
    """A causal model whose layers keep keys and values of every token, in the store `kv`.

    `seq2seq`: it has an encoder too (`encoder_decoder.py`).

    Raises:
        UnsupportedError: an architecture for which tree passes cannot be correct.
        UsageError: a context longer than the model's.
    """

    seq2seq = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context: int | None = None,
        kv: str = "dense",
        forward: str = "auto",
    ) -> None:
        self.forward = forward
        self.kv, self._make_store = kv, parse_kv(kv)
        check_fit(model, seq2seq=self.seq2seq)
        super().__init__(model, context)
        config = model.config.get_text_config(decoder=True)
        self.windows = list_windows(config)
        self._original = rotary.find_original_context(config)
        self._rotaries = rotary.list_longrope_modules(model)
        if self._original is not None:
            self.notes.append(
                f"texts of up to {self._original} tokens, new ones included, run with the short "
                "rotary factors, longer ones with the long factors throughout"
            )
        self._choose_attention()
        self._fuse_layers()

    def span(self, length: int) -> int:
        # A text keeps to one of longrope's two sets of factors, each with its own context: keys
        # cached with the short factors are wrong under the long ones.
        if self._original is None or length > self._original:
            return self.context
        return min(self._original, self.context)

    def cache(self, batch: int, context: int | None = None) -> TreeCache:
        return TreeCache(
            batch=batch,
            num_layers=self.num_layers,
            context=context or self.context,
            make_store=self._make_store,
        )

    def _feed_prompts(
        self, cache: TreeCache, tokens: Sequence[Sequence[int]], needs: Needs
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Feed and commit tokens in chunks."""
        logits_BV: Tensor | None = None
        collected: list[list[dict[str, Tensor]]] = [[] for _ in tokens]
        for start in range(0, max(map(len, tokens)), CHUNK):
            parts = [list(row[start : start + CHUNK]) for row in tokens]
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
                needs,
                kept=kept,
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
        return logits_BV, features

    @torch.inference_mode()
    def verify(self, cache: TreeCache, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        # Smaller trees are padded with nodes that see only themselves.
        num_rows = max(draft.num_rows for draft in drafts)
        tokens, parents, slots, owners = [], [], [], []
        for draft in drafts:
            padding = range(draft.num_rows, num_rows)
            above, own_slots = [p for p, _ in draft.extra_rows], [s for _, s in draft.extra_rows]
            tokens.append(draft.tokens + [0] * (num_rows - len(draft)))
            parents.append([0, *draft.parents[1:], *above, *padding])
            slots.append([-1] * len(draft) + own_slots + [-1] * len(padding))
            owners.append([*draft.owners(), *padding])
        extra = None
        if any(draft.extra_rows for draft in drafts):
            extra = (torch.tensor(slots, device=self.device), torch.tensor(owners).to(self.device))
        depths_BN, visible_BNN = _describe_trees(parents)
        return self._forward(cache, tokens, depths_BN, visible_BNN, needs or Needs(), extra=extra)

    @torch.inference_mode()
    def grow(
        self,
        cache: TreeCache,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        *,
        fed: int = 0,
        seen: Sequence[int] | None = None,
    ) -> Tensor:
        depths_BT, visible_BTT = _describe_trees(parents)
        new, visible_BNT = [list(row[fed:]) for row in tokens], visible_BTT[:, fed:]
        return self._forward(cache, new, depths_BT, visible_BNT, Needs(), seen=seen).logits_BNV

    def _forward(
        self,
        cache: TreeCache,
        tokens: list[list[int]],
        depths_BT: Tensor,
        visible_BNT: Tensor,
        needs: Needs,
        *,
        kept: list[int] | None = None,
        seen: Sequence[int] | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Pass:
        """Call the model for the last N of the tail's T nodes; only the nodes `kept` get logits.

        Depths and visibility are on the host. `extra` are slots and owners [B, N] for
        `Needs.inject`.
        """
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
            self.limit_torch(len(tokens) * num_nodes),
        ):
            output = self._call(
                cache,
                torch.tensor(tokens, device=self.device),
                masks,
                positions_BT[:, num_tail - num_nodes :].to(self.device),
                options,
            )
        if self.kv_bytes_per_token is None:
            self.kv_bytes_per_token = cache.token_bytes
        logits_BNV = output.logits
        if kept is not None and not self._keeps_logits:
            logits_BNV = logits_BNV[:, kept]
        return Pass(logits_BNV, features)

    def _call(
        self,
        cache: TreeCache,
        ids_BN: Tensor,
        masks: Tensor | dict[str, Tensor],
        positions_BN: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """Return the model's output for a pass whose columns the cache has opened."""
        return self.model(
            input_ids=ids_BN,
            attention_mask=masks,
            position_ids=positions_BN,
            use_cache=True,
            **options,
        )

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
    def inject_states(
        self, inject: Mapping[int, Inject], extra: tuple[Tensor, Tensor] | None
    ) -> Iterator[None]:
        """During one pass, replace the hidden states of extra rows at the inputs of layers."""
        with ExitStack() as hooks:
            for index, put in inject.items():
                if extra is None:
                    continue
                if index < 0:
                    embedding = self.model.get_input_embeddings()
                    hook = embedding.register_forward_hook(_output_hook(put, *extra))
                else:
                    before, layer = _input_hook(put, *extra), self.layers()[index]
                    hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                hooks.enter_context(hook)
            yield

    def _fuse_layers(self) -> None:
        """Let layers run in C, those that can, unless their modules are to run."""
        try:
            layers: list[Any] = list(self.layers())
        except UnsupportedError:
            return
        release_experts(self.model)
        if self.forward == "modules" or self.seq2seq:
            release_layers(layers)
            return
        if self.kv != "dense":
            release_layers(layers)
            self.unfused = {f"keys and values are kept as {self.kv}": len(layers)}
            return

        def probe() -> None:
            # Rows of different lengths, a tree after them: columns that are hidden, positions that
            # repeat.
            cache, texts = self.cache(2), [[0, 1, 0], [1, 0]]
            with end_after(layers[-1]):
                self.prefill(cache, texts)
            cache.commit(texts, [range(3), range(2)])
            with end_after(layers[-1]):
                trees = [Draft([0, 1, 0, 1], [-1, 0, 0, 1]), Draft([1, 0, 1], [-1, 0, 1])]
                self.verify(cache, trees)

        choose_experts(self.model)
        self.unfused = fuse_layers(layers, self.model, probe)
        self.num_fused = len(layers) - sum(self.unfused.values())
        if not self.num_fused:
            release_experts(self.model)
        else:
            # The lm_head too is independent of the number of rows then.
            self.kernels = attach_kernels(self.model, self.dtype, any_rows=True)
        head = self.model.get_output_embeddings()
        has_kernel = getattr(head, "product", None) is not None
        rests = [layer.fused.rest for layer in layers] if not self.unfused else []
        is_fused = has_kernel and not self.unfused
        if is_fused and all(rest is None or rest.rows_are_independent for rest in rests):
            self.rows_are_independent = True
            # Nothing large is left to torch.
            self._few_rows = sys.maxsize

    def _choose_attention(self) -> None:
        """Replace an attention that takes no 4-D mask (flash, flex), and add a note.

        With packed products, rows of a pass do not depend on each other in attention either.
        """
        given = self.model.config._attn_implementation
        if given == "sdpa" and has_products(self.model):
            self.model.set_attn_implementation(row_attention.NAME)
        # A model may be opened several times.
        if given in ("sdpa", "eager", row_attention.NAME):
            return
        try:
            self.model.set_attn_implementation("sdpa")
        except ValueError:
            self.model.set_attn_implementation("eager")
        chosen = self.model.config._attn_implementation
        self.notes.append(f"attention {given} takes no tree mask; using {chosen}")


def _describe_trees(parents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the depths [B, N] of nodes, and which nodes of their tree they see [B, N, N]."""
    depths: list[list[int]] = []
    for row in parents:
        found: list[int] = []
        for node, parent in enumerate(row):
            found.append(0 if parent == node else found[parent] + 1)
        depths.append(found)
    deepest = max(map(max, depths))
    return torch.tensor(depths), tree.ancestor_mask(torch.tensor(parents), deepest)


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
