"""Entropy adaptive decoding (EAD): a large and a small model with one tokenizer take turns.

The model that writes is chosen by the mean entropy of its last predictions: from `threshold` bits
on the large model writes, below it the small one. Simonds, 2025 (arXiv:2502.06833). Each model has
a cache of its own; when its turn comes, it reads the tokens that it missed, in one pass together
with the last token. The text is neither model's: lossy.

Choices of ours: entropies are those of the logits that penalties, biases and bans left, before
temperature and filters, so that a forced token does not call the large model. A switch clears the
window, since the two models' entropies are not on one scale. The large model begins, unless the
threshold is infinite. A mean equal to the threshold counts as above it, so that at 0 the large
model writes everything. The default dwell was chosen without knowing the paper's.

Suffixes: B batch, N nodes (one: nothing is drafted), V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectool import options
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.decode.result import Turns
from spectool.decode.target.base import Pass, Target
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError, UsageError
from spectool.options import option

LARGE, SMALL = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyConfig(options.Config):
    """Options of `entropy`."""

    threshold: float = option(
        1.0,
        "bits of mean entropy from which on the large model writes; 0 to inf",
        minimum=0,
        maximum=math.inf,
    )
    window: int = option(5, "most predictions since the last switch in the mean", minimum=1)
    dwell: int = option(10, "fewest tokens that a model writes before the next switch", minimum=1)


@dataclass(slots=True)
class Switch:
    """Turns of a request: the model that writes its next token, `active`, and the turns so far.

    `since` counts the tokens since the last switch. `positions`: the number of new tokens before
    each switch. `small_tokens` of all `num_tokens` are the small model's; `caught_up` counts those
    that a model read because the other one had them before.
    """

    config: EntropyConfig
    active: int
    entropies: deque[float]
    since: int = 0
    positions: list[int] = field(default_factory=list)
    num_tokens: int = 0
    small_tokens: int = 0
    caught_up: int = 0

    @classmethod
    def start(cls, config: EntropyConfig) -> Switch:
        """Make the state of a request of which no token was written."""
        first = SMALL if math.isinf(config.threshold) else LARGE
        return cls(config, first, deque(maxlen=config.window))

    def take(self, entropy: float) -> None:
        """Take the entropy, in bits, of the prediction that the next token is drawn from."""
        if self.since == 0 and self.num_tokens:
            self.positions.append(self.num_tokens)
        self.num_tokens += 1
        self.small_tokens += self.active == SMALL
        self.since += 1
        self.entropies.append(entropy)
        if self.since >= self.config.dwell and self.choose() != self.active:
            self.active, self.since = 1 - self.active, 0
            self.entropies.clear()

    def choose(self) -> int:
        """Return the model that the entropies since the last switch ask for."""
        mean = sum(self.entropies) / len(self.entropies)
        return LARGE if mean >= self.config.threshold else SMALL

    def turns(self) -> Turns:
        """Return the counts for a result."""
        return Turns(
            switches=tuple(self.positions),
            small_tokens=self.small_tokens,
            caught_up=self.caught_up,
        )


class PairCache(BatchCache):
    """The caches of both models, with the same rows, and each row's `Switch`.

    `tokens` are the committed ones; a model's own cache holds the first of them, up to its last
    turn.
    """

    def __init__(
        self, caches: Sequence[BatchCache], context: int, start: Callable[[], Switch]
    ) -> None:
        super().__init__(batch=len(caches[0].tokens), context=context)
        self.caches, self._start = caches, start
        self.switches = [start() for _ in self.tokens]

    def keep_prefix(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Keep what both caches can; the requests begin with no token written."""
        self.switches = [self._start() for _ in prompts]
        return super().keep_prefix(prompts)

    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]`; the model whose turn it was has them already."""
        for row, path in enumerate(paths):
            self.tokens[row].extend(tokens[row][node] for node in path)

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row, in both caches."""
        super().truncate(row, length)
        for cache in self.caches:
            cache.truncate(row, length)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        super().select(rows)
        self.switches = [self.switches[row] for row in rows]
        for cache in self.caches:
            cache.select(rows)

    def join(self, other: PairCache) -> None:
        """Append the rows of another cache."""
        super().join(other)
        self.switches += other.switches
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.join(theirs)


class EntropyTarget(Target[PairCache]):
    """Two models as one target: what is no pass is the large one's. Takes no drafts.

    In a batch every pass of a model has a row for each request, also for those whose turn is the
    other model's.

    Raises:
        UnsupportedError: a model that keeps its state in its modules.
        UsageError: models on different devices.
    """

    Config = EntropyConfig
    takes_drafts = takes_trees = False
    why_plain = "two models take turns"
    why_lossy = "two models take turns, so the text is neither model's own"

    def __init__(
        self, large: Target[Any], small: Target[Any], config: EntropyConfig | None = None
    ) -> None:
        for each in (large, small):
            if not each.state_in_cache:
                raise UnsupportedError(
                    f"{each.name}: its modules keep the state, so no other model can take turns "
                    "with it"
                )
        if large.device != small.device:
            raise UsageError(f"the models are on {large.device} and {small.device}; use one device")
        # Not by the base's constructor, which would choose and build the kernels once more.
        vars(self).update(vars(large))
        self.targets, self.config = (large, small), config or EntropyConfig()
        self.notes = [*large.notes, *small.notes]
        self.vocab_size = min(large.vocab_size, small.vocab_size)
        if small.context < large.context:
            self.context_reason = f"the small model's context is {small.context} tokens"
        self.context = large.context = small.context = min(large.context, small.context)

    @property
    def num_tokens(self) -> int:
        return min(target.num_tokens for target in self.targets)

    def span(self, length: int) -> int:
        return min(target.span(length) for target in self.targets)

    def cache(self, batch: int, context: int | None = None) -> PairCache:
        whole = context or self.context
        caches = [target.cache(batch, target.span(whole)) for target in self.targets]
        return PairCache(caches, whole, lambda: Switch.start(self.config))

    def _feed_prompts(
        self, cache: PairCache, tokens: Sequence[Sequence[int]], needs: Needs
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        logits_BV = self._feed(cache, tokens)
        cache.commit(tokens, [range(len(fresh)) for fresh in tokens])
        return logits_BV, [{} for _ in tokens]

    @torch.inference_mode()
    def verify(self, cache: PairCache, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        if any(draft.num_rows > 1 for draft in drafts):
            raise UnsupportedError(f"{self.name}: no drafts: {self.why_plain}")
        return Pass(self._feed(cache, [draft.tokens for draft in drafts])[:, None], {})

    def grow(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UnsupportedError(f"{self.name}: no passes of a drafter's own: {self.why_plain}")

    def _feed(self, cache: PairCache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed each row's tokens, after those it missed, to the model whose turn it is: [B, V].

        A row's tokens are sure to be committed, so the model's own cache commits them.
        """
        active_B = [switch.active for switch in cache.switches]
        found: list[Tensor] = []
        for model, (target, own) in enumerate(zip(self.targets, cache.caches, strict=True)):
            parts: list[list[int]] = [[] for _ in tokens]
            for row, fresh in enumerate(tokens):
                if active_B[row] == model and fresh:
                    missed = cache.tokens[row][len(own.tokens[row]) :]
                    cache.switches[row].caught_up += len(missed)
                    parts[row] = [*missed, *fresh]
            if any(parts):
                found.append(target.prefill(own, parts).logits_BV[:, : self.vocab_size])
        self.kv_bytes_per_token = sum(each.kv_bytes_per_token or 0 for each in self.targets)
        if len(found) == 1:
            return found[0]
        is_small_B1 = torch.tensor(active_B, device=self.device)[:, None] == SMALL
        return torch.where(is_small_B1, found[SMALL], found[LARGE])

    def observe(self, requests: Sequence[Request], cache: PairCache, logits_BNV: Tensor) -> None:
        probs_BV = logits_BNV[:, -1].float().softmax(-1)
        entropy_B = torch.special.entr(probs_BV).sum(-1) / math.log(2)
        measured = zip(requests, cache.switches, entropy_B.tolist(), strict=True)
        for request, switch, entropy in measured:
            request.switch = switch
            switch.take(entropy)
