"""Trigram table of the text, and the most probable tree by its scores.

ADED (Liu et al. 2024, arXiv:2406.18200). The table maps two tokens to scores of the tokens that
followed them. It starts empty, or from a saved state, and is updated with the prompt and every
committed token. The authors search the tree at random (150 rollouts); here the likeliest node is
expanded next, which needs no randomness and takes microseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectool import options
from spectool.decode import draft_state
from spectool.decode.cache import BatchCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.tree import Draft, Trie
from spectool.errors import CheckpointError
from spectool.options import option

# The authors add 0.04 in every round that a trigram is among the last 16 tokens, up to a score of
# 3. At two tokens a round that is about 0.3 per occurrence; 0.25 is exact in float32, in which
# scores are stored.
_GAIN, _HIGHEST = 0.25, 3.0
# Successors that are kept of each pair, as in the authors' corpus.
_SUCCESSORS = 12


class TrigramTable:
    """Scores of tokens, by the two tokens before them."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], dict[int, float]] = {}

    def learn(self, tokens: Sequence[int]) -> None:
        """Count every trigram of a piece of text."""
        for one, two, three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            scores = self._after.setdefault((one, two), {})
            scores[three] = min(scores.get(three, 0.0) + _GAIN, _HIGHEST)
            if len(scores) > _SUCCESSORS:
                # The new token is spared, or no new successor could ever enter a full entry.
                del scores[min((s, t) for t, s in scores.items() if t != three)[1]]

    def after(self, one: int, two: int) -> list[tuple[float, int]]:
        """Return (share of the scores, token) of what followed two tokens, the likeliest first."""
        scores = self._after.get((one, two), {})
        total = sum(scores.values())
        return sorted(((score / total, token) for token, score in scores.items()), reverse=True)

    def __iter__(self) -> Iterator[tuple[int, int, int, float]]:
        for (one, two), scores in self._after.items():
            for three, score in scores.items():
                yield one, two, three, score

    def put(self, one: int, two: int, three: int, score: float) -> None:
        self._after.setdefault((one, two), {})[three] = score


class TrigramDrafter(Drafter):
    """Drafter from one table, kept across requests and, with `state`, across runs.

    Raises:
        CheckpointError: the `state` file is no such table, or (at the first prompt) one of a larger
            vocabulary.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `trigram`."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
        depth: int = option(8, "most proposed tokens on a path", minimum=1, maximum=64)
        state: str | None = option(None, "file to keep the table in between runs")

    name = "trigram"
    takes_sources = True
    needs = Needs()

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.table = TrigramTable()
        self._largest = -1
        if self.config.state:
            self._load(Path(self.config.state))

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        if self._largest >= (vocabulary := prompts[0].logits_V.shape[-1]):
            raise CheckpointError(
                f"{self.config.state}: holds token {self._largest}; the model has {vocabulary}"
            )
        for prompt in prompts:
            self.table.learn(prompt.request.text_tokens)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        pairs = zip(requests, budget, strict=True)
        return [self._draft(request.text_tokens, limit) for request, limit in pairs]

    def _draft(self, tokens: Sequence[int], limit: int) -> Draft:
        """Grow a tree best first: always add the node whose path has the largest probability."""
        trie = Trie(tokens[-1], self.config.nodes)
        if len(tokens) < 2 or limit == 0:
            return trie.draft()
        depth = min(self.config.depth, limit)
        # Ordered by negative probability, then by discovery, so that equal inputs give equal trees.
        heap: list[tuple[float, int, int, int, int, int]] = []
        num_found = 0

        def add_children(prob: float, node: int, level: int, one: int, two: int) -> None:
            nonlocal num_found
            for share, token in self.table.after(one, two):
                num_found += 1
                heapq.heappush(heap, (-prob * share, num_found, node, level, two, token))

        add_children(1.0, 0, 1, tokens[-2], tokens[-1])
        while heap and not trie.full:
            negative, _, parent, level, before, token = heapq.heappop(heap)
            # The source is the path's probability in eighths.
            node = trie.add(token, parent, int(-8 * negative))
            if node is not None and level < depth:
                add_children(-negative, node, level + 1, before, token)
        return trie.draft()

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.table.learn(outcome.request.text_tokens[-2 - len(outcome.path) :])

    def close(self) -> None:
        if self.config.state:
            entries = list(self.table)
            trigrams, scores = [entry[:3] for entry in entries], [entry[3] for entry in entries]
            tensors = {
                "trigrams": torch.tensor(trigrams, dtype=torch.int32).view(-1, 3),
                "scores": torch.tensor(scores, dtype=torch.float32),
            }
            draft_state.save(Path(self.config.state), self.name, tensors)

    def _load(self, path: Path) -> None:
        tensors = draft_state.load(path, self.name)
        if not tensors:
            return
        trigrams_M3, scores_M = tensors.get("trigrams"), tensors.get("scores")
        if trigrams_M3 is None or scores_M is None or trigrams_M3.shape != (len(scores_M), 3):
            raise CheckpointError(f"{path}: not a table of trigrams with a score each")
        self._largest = int(trigrams_M3.max()) if len(trigrams_M3) else -1
        for (one, two, three), score in zip(trigrams_M3.tolist(), scores_M.tolist(), strict=True):
            self.table.put(one, two, three, score)
