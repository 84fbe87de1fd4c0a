"""A table of trigrams learnt from the text, and the best tree by their scores.

ADED (Liu et al. 2024, arXiv:2406.18200). The table maps two tokens to the scores of what followed
them; it starts empty, or from a kept state, and learns the prompt and every committed token. The
authors search the tree at random (150 rollouts); here the likeliest node is expanded next, which
needs no randomness and takes microseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectool import options
from spectool.decode import draft_state
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind, Trie
from spectool.errors import CheckpointError
from spectool.options import option

# The authors add 0.04 for every round that a trigram stays among the last 16 tokens, up to 3: about
# so much for each occurrence, at two tokens a round. A quarter is exact in float32, as it is kept.
_GAIN, _HIGHEST = 0.25, 3.0
# Successors kept of a pair, as in their corpus.
_SUCCESSORS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class TrigramConfig(options.Config):
    """Options of `trigram`."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=1024)
    depth: int = option(8, "most proposed tokens in a row", minimum=1, maximum=64)
    state: str | None = option(None, "file to keep the table in between runs")


class TrigramTable:
    """Scores of tokens by the two before them."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], dict[int, float]] = {}

    def learn(self, tokens: Sequence[int]) -> None:
        """Every trigram of a stretch of text counts once."""
        for one, two, three in zip(tokens, tokens[1:], tokens[2:], strict=False):
            scores = self._after.setdefault((one, two), {})
            scores[three] = min(scores.get(three, 0.0) + _GAIN, _HIGHEST)
            if len(scores) > _SUCCESSORS:
                # Not the newcomer, or none could ever come in.
                del scores[min((s, t) for t, s in scores.items() if t != three)[1]]

    def after(self, one: int, two: int) -> list[tuple[float, int]]:
        """(share of the score, token), the likeliest first."""
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
    """One table for all rows; it outlives batches and, with `state`, runs.

    Raises:
        CheckpointError: `state` is no table, or (at the first prompt) one of a larger vocabulary.
    """

    name = "trigram"
    Config = TrigramConfig
    needs = Needs()

    def __init__(self, config: TrigramConfig | None = None) -> None:
        self.config = config or TrigramConfig()
        self.table = TrigramTable()
        self._largest = -1
        if self.config.state:
            self._load(Path(self.config.state))

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        if self._largest >= (vocabulary := prompts[0].logits_V.shape[-1]):
            raise CheckpointError(
                f"{self.config.state}: holds token {self._largest}; the model has {vocabulary}"
            )
        for prompt in prompts:
            self.table.learn(prompt.row.tokens)

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row.tokens, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, tokens: Sequence[int], limit: int) -> Draft:
        """Best first: of all tokens that could come next to the tree, the likeliest path's."""
        made = Trie(tokens[-1], self.config.nodes)
        if len(tokens) < 2 or limit == 0:
            return made.draft()
        depth = min(self.config.depth, limit)
        # Negative share, then the order of discovery: equal inputs give equal trees.
        heap: list[tuple[float, int, int, int, int, int]] = []
        found = 0

        def discover(share: float, node: int, level: int, one: int, two: int) -> None:
            nonlocal found
            for part, token in self.table.after(one, two):
                found += 1
                heapq.heappush(heap, (-share * part, found, node, level, two, token))

        discover(1.0, 0, 1, tokens[-2], tokens[-1])
        while heap and not made.full:
            share, _, parent, level, before, token = heapq.heappop(heap)
            # How sure the path is, in eighths.
            node = made.add(token, parent, int(-8 * share))
            if node is not None and level < depth:
                discover(-share, node, level + 1, before, token)
        return made.draft()

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.table.learn(outcome.row.tokens[-2 - len(outcome.path) :])

    def close(self) -> None:
        if self.config.state:
            rows = list(self.table)
            tensors = {
                "trigrams": torch.tensor([row[:3] for row in rows], dtype=torch.int32).view(-1, 3),
                "scores": torch.tensor([row[3] for row in rows], dtype=torch.float32),
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
