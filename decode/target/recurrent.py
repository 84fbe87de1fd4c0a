"""Targets with a recurrent state: prompts, and drafts that are chains.

A state cannot go back to an earlier token; `replay.py` undoes drafts by copies and replay. Rows
pass one by one: a state cannot be padded. Families are listed by name (`families.py`), since some
silently ignore their state when several tokens follow it. Suffixes: B batch, N nodes, T tokens of a
prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from spectool.decode.kv.base import parse_kv
from spectool.decode.protocol import Needs
from spectool.decode.target import rotary
from spectool.decode.target.base import CHUNK, Pass, Target
from spectool.decode.target.fit import cannot_decode
from spectool.decode.target.replay import ReplayCache
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError
from spectool.families import family
from spectool.kernels.registry import use_kernels

_UNBOUNDED = (0.0, float("inf"))


class RecurrentTarget(Target[ReplayCache]):
    """A causal model with a recurrent state.

    If `takes_drafts` is false, all but the first pass is token by token.

    Raises:
        UnsupportedError: a family that is not known to be correct, or another store than `dense`.
        UsageError: a context longer than the model's.
    """

    takes_trees = False

    def __init__(
        self, model: PreTrainedModel, *, context: int | None = None, kv: str = "dense"
    ) -> None:
        parse_kv(kv)
        config = model.config.get_text_config(decoder=True)
        known = family(config)
        if known.state is None:
            raise cannot_decode(config, "its kind of recurrent state is not known")
        if not type(model).__module__.startswith("transformers."):
            raise cannot_decode(
                config, "its recurrent state is known in transformers' own code alone"
            )
        super().__init__(model, context)
        if kv != "dense":
            raise UnsupportedError(
                f"--kv {kv} is not for {self.name}: its state is recurrent, and transformers' own "
                "cache holds it",
                hint="leave out --kv",
            )
        # Its passes take the rotary factors that transformers chooses: the short ones.
        if (original := rotary.find_original_context(config)) is not None:
            self.context = min(original, self.context)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        limits = [getattr(module, "time_step_limit", None) for module in model.modules()]
        if known.state == "ignored":
            self.why_plain = "passes of several tokens ignore the state before them"
        elif any(limit and tuple(limit) != _UNBOUNDED for limit in limits):
            self.why_plain = "passes of several tokens bound the time steps, those of one do not"
        self.takes_drafts = not self.why_plain
        if known.state_in_modules:
            self.state_in_cache = False
            self.notes.append(f"{self.name}: its modules keep the state; one text after another")

    def span(self, length: int) -> int:
        return self.context

    def cache(self, batch: int, context: int | None = None) -> ReplayCache:
        return ReplayCache(batch=batch, context=context or self.context, config=self.model.config)

    def _feed_prompts(
        self, cache: ReplayCache, tokens: Sequence[Sequence[int]], needs: Needs
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        logits: dict[int, Tensor] = {}
        features: list[dict[str, Tensor]] = [{} for _ in tokens]
        for row, fresh in enumerate(tokens):
            if fresh:
                logits_1V, features[row] = self._run_pass(cache, row, fresh, needs, 1, certain=True)
                logits[row] = logits_1V[-1]
        assert logits, "nothing to feed"
        zeros_V = torch.zeros_like(next(iter(logits.values())))
        logits_BV = torch.stack([logits.get(row, zeros_V) for row in range(len(tokens))])
        cache.commit(tokens, [range(len(fresh)) for fresh in tokens])
        return logits_BV, features

    @torch.inference_mode()
    def verify(
        self, cache: ReplayCache, drafts: Sequence[Draft], needs: Needs | None = None
    ) -> Pass:
        """Feed every request's chain without committing. Logits past a row's end are undefined.

        Raises:
            UnsupportedError: a draft that branches, or is more than the root where `why_plain`.
        """
        outputs = []
        for row, draft in enumerate(drafts):
            if not draft.is_chain or (self.why_plain and len(draft) > 1):
                takes = (
                    f"no drafts: {self.why_plain}" if self.why_plain else "chains only, not trees"
                )
                raise UnsupportedError(f"{self.name}, whose state is recurrent, takes {takes}")
            certain = len(draft) == 1
            wanted = needs or Needs()
            outputs.append(
                self._run_pass(cache, row, draft.tokens, wanted, len(draft), certain=certain)
            )
        logits_BNV = pad_sequence([logits_NV for logits_NV, _ in outputs], batch_first=True)
        names = outputs[0][1]
        features = {
            n: pad_sequence([by_name[n] for _, by_name in outputs], batch_first=True) for n in names
        }
        return Pass(logits_BNV, features)

    def grow(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UnsupportedError(f"{self.name}: a recurrent state takes no passes of a drafter's own")

    def _run_pass(
        self,
        cache: ReplayCache,
        row: int,
        tokens: Sequence[int],
        needs: Needs,
        num_logits: int,
        *,
        certain: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed the tokens to replay, then `tokens`.

        Returns the last `num_logits` logits, and the features of `tokens`.
        """
        if (state := cache.restart_if_ahead(row)) is not None and cache.tokens[row]:
            self._feed(state, cache.tokens[row], 0, Needs(), 1)
        state = cache.begin_pass(row, certain=certain)
        begin = len(cache.tokens[row]) - cache.num_to_replay(row)
        fed = [*cache.tokens[row][begin:], *tokens]
        logits_NV, features = self._feed(state, fed, begin, needs, num_logits)
        return logits_NV, {name: feature[-len(tokens) :] for name, feature in features.items()}

    def _feed(
        self, state: DynamicCache, fed: Sequence[int], begin: int, needs: Needs, num_logits: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed tokens from position `begin` on; return the last logits, and the features of all."""
        # Where passes of several tokens are wrong, only the first pass may have several.
        size = CHUNK if self.takes_drafts else 1 if begin else len(fed)
        logits, captured = [], []
        for start in range(0, len(fed), size):
            piece = fed[start : start + size]
            # At least 1: transformers takes logits_to_keep=0 for all.
            kept = max(1, min(num_logits - (len(fed) - start - len(piece)), len(piece)))
            options: dict[str, Any] = {self.cache_name: state}
            if self._takes_positions:
                positions = torch.arange(len(piece), device=self.device) + begin + start
                options["position_ids"] = positions[None]
            if self._keeps_logits:
                options["logits_to_keep"] = kept
            ids = torch.tensor([piece], device=self.device)
            with (
                self.capture_features(needs) as features,
                use_kernels(),
                self.limit_torch(len(piece)),
            ):
                output = self.model(input_ids=ids, use_cache=True, **options)
            logits.append(output.logits[0, -kept:])
            captured.append(features)
        whole = {name: torch.cat([piece[name][0] for piece in captured]) for name in captured[0]}
        return torch.cat(logits)[-num_logits:], whole
