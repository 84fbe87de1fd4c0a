"""Log-likelihoods of continuations, all those of one context together.

A context is read once. Its continuations branch off its last token as a tree, which passes as a
draft does in verification, and is not committed. What passes together depends on all pairs and on
the batch size; where rows of a pass are independent (`Target.rows_are_independent`), no bit of a
score depends on that either. Suffixes: N nodes, T tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectool.decode.target.base import CHUNK, Target
from spectool.decode.tree import Draft, chain

# Contexts that pass together by default.
BATCH = 8
# Logits of a pass: 256 MB.
LOGITS = 1 << 26

# Token ids of a context and of a continuation; neither is empty.
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of a continuation in nats, and whether greedy decoding would write it."""

    value: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class Group:
    """A context, and its continuations with the indices of the pairs that ask for each.

    `span`: the context to open, as `Target.span` has it. `long`: the only continuation is longer
    than a pass.
    """

    context: tuple[int, ...]
    span: int
    long: bool
    continuations: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Return the most nodes of a pass."""
        return min(CHUNK, sum(map(len, self.continuations)))


class _Tree:
    """Continuations of a context as the tree of one pass. `paths`: the node before each token."""

    def __init__(self, last: int) -> None:
        self.tokens, self.parents = [last], [-1]
        self.paths: dict[tuple[int, ...], list[int]] = {}
        self._children: dict[tuple[int, int], int] = {}

    def add(self, continuation: tuple[int, ...]) -> None:
        """Add a continuation; nodes that it shares with others are there once."""
        path = [0]
        for token in continuation[:-1]:
            node = self._children.setdefault((path[-1], token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(path[-1])
            path.append(node)
        self.paths[continuation] = path


class Scorer:
    """Scores pairs of a context and a continuation."""

    def __init__(self, target: Target[Any], batch_size: int | None = None) -> None:
        self.target = target
        # Without, each continuation is read with its context, as the state cannot go back.
        self._branches = target.takes_drafts and target.state_in_cache
        self._batch_size = (batch_size or BATCH) if self._branches else 1

    def plan(self, pairs: Sequence[Pair]) -> list[list[Group]]:
        """Return the groups of all pairs in batches, those of the longest contexts first.

        Contexts lose their first tokens where the model's context is too short for both.
        """
        groups: dict[Any, Group] = {}
        for index, (context, continuation) in enumerate(pairs):
            assert context and 0 < len(continuation) <= self.target.context
            kept = tuple(context[-(self.target.context + 1 - len(continuation)) :])
            span = self.target.span(len(kept) + len(continuation) - 1)
            long = len(continuation) > CHUNK
            key = (kept, span, tuple(continuation) if long else ())
            group = groups.setdefault(key, Group(kept, span, long))
            group.continuations.setdefault(tuple(continuation), []).append(index)
        batches: list[list[Group]] = []
        most = LOGITS // self.target.vocab_size
        for group in sorted(groups.values(), key=lambda each: (-len(each.context), each.context)):
            last = batches[-1] if batches else []
            wide = (len(last) + 1) * max([group.width, *(each.width for each in last)]) > most
            alike = bool(last) and last[0].span == group.span and not (last[0].long or group.long)
            if alike and not wide and len(last) < self._batch_size:
                last.append(group)
            else:
                batches.append([group])
        return batches

    @torch.inference_mode()
    def run(self, batch: Sequence[Group]) -> dict[int, Likelihood]:
        """Return the likelihoods of the pairs of a batch, by index."""
        if not self._branches:
            found = self._read_whole(batch[0])
        elif batch[0].long:
            found = self._read_long(batch[0])
        else:
            found = self._read_branches(batch)
        return {
            index: scored
            for group, by_continuation in zip(batch, found, strict=True)
            for continuation, scored in by_continuation.items()
            for index in group.continuations[continuation]
        }

    def _read_branches(self, batch: Sequence[Group]) -> list[dict[tuple[int, ...], Likelihood]]:
        """Read contexts, then a tree of each in one pass after another."""
        cache = self._read_contexts(batch)
        found: list[dict[tuple[int, ...], Likelihood]] = [{} for _ in batch]
        trees = [list(self._split(group)) for group in batch]
        for turn in range(max(map(len, trees))):
            # Those that are through pass their root, which says nothing new.
            taken = [
                each[turn] if turn < len(each) else _Tree(group.context[-1])
                for each, group in zip(trees, batch, strict=True)
            ]
            drafts = [Draft(each.tokens, each.parents) for each in taken]
            logits_BNV = self.target.verify(cache, drafts).logits_BNV
            for row, (each, logits_NV) in enumerate(zip(taken, logits_BNV, strict=True)):
                logp_NV = torch.log_softmax(logits_NV[: len(each.tokens)].float(), -1)
                for continuation, path in each.paths.items():
                    found[row][continuation] = _score(logp_NV[path], continuation)
        return found

    def _split(self, group: Group) -> Iterator[_Tree]:
        """Yield the continuations as trees of up to CHUNK nodes, or each as a chain."""
        made = _Tree(group.context[-1])
        for continuation in group.continuations:
            full = len(made.tokens) + len(continuation) - 1 > CHUNK or not self.target.takes_trees
            if made.paths and full:
                yield made
                made = _Tree(group.context[-1])
            made.add(continuation)
        yield made

    def _read_long(self, group: Group) -> list[dict[tuple[int, ...], Likelihood]]:
        """Read a long continuation piece by piece."""
        cache = self._read_contexts([group])
        (continuation,) = group.continuations
        tokens, parts = [group.context[-1], *continuation[:-1]], []
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK]
            draft = chain(piece, kind="deterministic")
            logits_TV = self.target.verify(cache, [draft]).logits_BNV[0, : len(piece)]
            logp_TV = torch.log_softmax(logits_TV.float(), -1)
            parts.append(_score(logp_TV, continuation[start : start + CHUNK]))
            cache.commit([piece], [range(len(piece))])
        whole = Likelihood(sum(part.value for part in parts), all(part.greedy for part in parts))
        return [{continuation: whole}]

    def _read_contexts(self, batch: Sequence[Group]) -> Any:
        """Return a cache that holds the contexts but for their last tokens."""
        cache = self.target.cache(len(batch), batch[0].span)
        before = [list(group.context[:-1]) for group in batch]
        if any(before):
            self.target.prefill(cache, before)
        return cache

    def _read_whole(self, group: Group) -> list[dict[tuple[int, ...], Likelihood]]:
        """Read each continuation behind its context, in one pass without a cache."""
        found = {}
        for continuation in group.continuations:
            ids_1L = torch.tensor([[*group.context, *continuation[:-1]]], device=self.target.device)
            logits_LV = self.target.model(input_ids=ids_1L, use_cache=False).logits[0]
            logp_TV = torch.log_softmax(logits_LV[-len(continuation) :].float(), -1)
            found[continuation] = _score(logp_TV, continuation)
        return [found]


def _score(logp_TV: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Return the likelihood of a continuation under the log-probabilities before each token."""
    ids_T = torch.tensor(continuation, device=logp_TV.device)
    value = float(logp_TV.gather(-1, ids_T[:, None]).sum(dtype=torch.float64))
    return Likelihood(value, bool((logp_TV.argmax(-1) == ids_T).all()))
