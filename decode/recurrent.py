"""Targets with a recurrent state: prompts, and drafts that are chains.

A state cannot go back to an earlier token; `replay.py` tells how drafts are undone. Rows pass one
by one: a state cannot be padded. Families are known by name, for some models of transformers 5.23
silently ignore their state when several tokens follow it. Suffixes: B batch, N nodes, T tokens of
a prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from spectool.decode.cache import TreeCache
from spectool.decode.fit import cannot_decode, is_recurrent
from spectool.decode.protocol import Needs
from spectool.decode.replay import ReplayCache
from spectool.decode.target import Pass, PrefillOutput, Target
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError
from spectool.kernels import skinny

# Tokens per pass of a prompt.
_CHUNK = 512

# Models that continue their state with several tokens at once as they do one by one.
CHAINS = {
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
    "zaya",
}
# Those whose scan begins with an empty state whatever came before.
FORGETFUL = {"falcon_mamba", "jamba", "mamba", "recurrent_gemma", "zamba"}
# Those whose modules keep the state, whatever cache is given.
_IN_MODULES = {"recurrent_gemma"}
_UNBOUNDED = (0.0, float("inf"))


class RecurrentTarget(Target):
    """A causal model with a recurrent state, as the loop sees it.

    Where it takes no drafts, all but a prompt passes token by token, and `plain` says why.

    Raises:
        UnsupportedError: a family that is not known to be right.
        UsageError: a context longer than the model's.
    """

    def __init__(self, model: PreTrainedModel, *, context: int | None = None) -> None:
        super().__init__(model, context=context)
        # Its passes take the rotary factors that transformers chooses: the short ones.
        self.context, self._original = self.span(1), None
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        limits = [getattr(module, "time_step_limit", None) for module in model.modules()]
        self.plain = ""
        if self.name in FORGETFUL:
            self.plain = "passes of several tokens ignore the state before them"
        elif any(limit and tuple(limit) != _UNBOUNDED for limit in limits):
            self.plain = "passes of several tokens bound the time steps, those of one do not"
        self.takes_drafts = not self.plain
        if self.name in _IN_MODULES:
            self.keeps_rows = False
            self.notes.append(f"{self.name}: its modules keep the state; one text after another")

    def _check_fit(
        self, model: PreTrainedModel, config: PreTrainedConfig, accepted: Mapping[str, Any]
    ) -> None:
        if config.model_type not in CHAINS | FORGETFUL:
            raise cannot_decode(config, "its kind of recurrent state is not known")
        if not type(model).__module__.startswith("transformers."):
            raise cannot_decode(
                config, "its recurrent state is known in transformers' own code alone"
            )

    def _choose_attention(self) -> None:
        """Any will do: no pass has a mask of ours."""

    def cache(self, batch: int, context: int | None = None) -> ReplayCache:
        """Empty states for `batch` rows."""
        return ReplayCache(batch=batch, context=context or self.context, config=self.model.config)

    @torch.inference_mode()
    def prefill(
        self, cache: TreeCache, tokens: Sequence[Sequence[int]], needs: Needs | None = None
    ) -> PrefillOutput:
        """Feed and commit committed tokens; rows may be of any length, also empty.

        An empty row's logits are zeros.
        """
        assert isinstance(cache, ReplayCache)
        wanted = needs or Needs()
        logits: dict[int, Tensor] = {}
        features: list[dict[str, Tensor]] = [{} for _ in tokens]
        heard = replace(wanted, final=wanted.final or wanted.top > 0)
        for row, fresh in enumerate(tokens):
            if fresh:
                logits_1V, features[row] = self._pass(cache, row, fresh, heard, 1, certain=True)
                logits[row] = logits_1V[-1]
        assert logits, "nothing to feed"
        zeros_V = torch.zeros_like(next(iter(logits.values())))
        logits_BV = torch.stack([logits.get(row, zeros_V) for row in range(len(tokens))])
        cache.commit(tokens, [range(len(fresh)) for fresh in tokens])
        return self._prefill_output(logits_BV, features, wanted)

    @torch.inference_mode()
    def verify(self, cache: TreeCache, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        """Feed every row's chain; nothing is committed. Logits of row b past its end mean nothing.

        Raises:
            UnsupportedError: a draft that branches, or is more than the root where `plain`.
        """
        assert isinstance(cache, ReplayCache)
        found = []
        for row, draft in enumerate(drafts):
            if not draft.is_chain or (self.plain and len(draft) > 1):
                takes = f"no drafts: {self.plain}" if self.plain else "chains only, not trees"
                raise UnsupportedError(f"{self.name}, whose state is recurrent, takes {takes}")
            certain = len(draft) == 1
            wanted = needs or Needs()
            found.append(self._pass(cache, row, draft.tokens, wanted, len(draft), certain=certain))
        logits_BNV = pad_sequence([logits_NV for logits_NV, _ in found], batch_first=True)
        names = found[0][1]
        features = {n: pad_sequence([own[n] for _, own in found], batch_first=True) for n in names}
        return Pass(logits_BNV, features)

    def grow(self, *args: Any, **kwargs: Any) -> Pass:
        """No pass of a drafter's own.

        Raises:
            UnsupportedError: always; the state would have to go back.
        """
        raise UnsupportedError(f"{self.name}: a recurrent state takes no passes of a drafter's own")

    def _pass(
        self,
        cache: ReplayCache,
        row: int,
        tokens: Sequence[int],
        needs: Needs,
        num_logits: int,
        *,
        certain: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is to be replayed, then `tokens`: logits of the last ones, and features of all."""
        if (state := cache.restarted(row)) is not None and cache.tokens[row]:
            self._feed(state, cache.tokens[row], 0, Needs(), 1)
        state = cache.attempt(row, certain=certain)
        fed = [*cache.replayed(row), *tokens]
        begin = len(cache.tokens[row]) + len(tokens) - len(fed)
        logits_NV, features = self._feed(state, fed, begin, needs, num_logits)
        return logits_NV, {name: feature[-len(tokens) :] for name, feature in features.items()}

    def _feed(
        self, state: DynamicCache, fed: Sequence[int], begin: int, needs: Needs, num_logits: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pass tokens from position `begin` on: logits of the last ones, and features of all."""
        # Where passes of several tokens are wrong, the first is right, and as `generate` has it.
        size = _CHUNK if self.takes_drafts else 1 if begin else len(fed)
        logits, heard = [], []
        for start in range(0, len(fed), size):
            piece = fed[start : start + size]
            # 0 would ask for all of them.
            kept = max(1, min(num_logits - (len(fed) - start - len(piece)), len(piece)))
            options: dict[str, Any] = {self.cache_name: state}
            if self._takes_positions:
                positions = torch.arange(len(piece), device=self.device) + begin + start
                options["position_ids"] = positions[None]
            if self._keeps_logits:
                options["logits_to_keep"] = kept
            ids = torch.tensor([piece], device=self.device)
            with self._listen(needs) as features, skinny.products(self._linears, self._most_rows):
                output = self.model(input_ids=ids, use_cache=True, **options)
            logits.append(output.logits[0, -kept:])
            heard.append(features)
        whole = {name: torch.cat([piece[name][0] for piece in heard]) for name in heard[0]}
        return torch.cat(logits)[-num_logits:], whole


def open_target(model: PreTrainedModel, *, context: int | None = None) -> Target:
    """The `Target` of a model, or its `RecurrentTarget`, whose errors it raises."""
    recurrent = is_recurrent(model, model.config.get_text_config(decoder=True))
    return (RecurrentTarget if recurrent else Target)(model, context=context)
