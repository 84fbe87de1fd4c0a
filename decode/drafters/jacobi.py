"""Speculative Jacobi decoding: the window of the last pass, predicted anew, is the next draft.

Teng et al. 2024 (arXiv:2410.01699), for text. A pass over drafts x_1 ... x_W gives a law after
each; beyond the accepted ones every position is drawn again from the law it has just got, and
stands for test with that law in the next pass. It is exact because a token's own noise decides
nothing before it, and because q stays the law that the token was drawn from. Fresh tokens at the
end of the window are looked up in the text (a deterministic draft). At temperature 0 this is Jacobi
decoding: each position holds the likeliest token, and what did not change stands. Suffixes: N
nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool import options
from spectool.decode.cache import TreeCache
from spectool.decode.drafters.ngram import NgramIndex, continuation
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams, pick
from spectool.decode.tree import Draft, Kind
from spectool.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class JacobiConfig(options.Config):
    """Options of `jacobi`."""

    window: int = option(16, "tokens predicted at once", minimum=1, maximum=256)


@dataclass(slots=True)
class _Window:
    """Tokens predicted for a row's next positions, and the laws they were drawn from."""

    tokens: list[int]
    probs_NV: Tensor | None


class JacobiDrafter(Drafter):
    """A window per row: a chain of drawn tokens, then of looked-up ones."""

    name = "jacobi"
    Config = JacobiConfig
    needs = Needs(probs=True)
    combines = False

    def __init__(self, config: JacobiConfig | None = None) -> None:
        self.config = config or JacobiConfig()
        self._windows: dict[int, _Window] = {}
        self._indexes: dict[int, NgramIndex] = {}

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",) if control.greedy else ("iid", "deterministic")

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._windows = {}
        self._indexes = {prompt.row.index: NgramIndex(1, 4) for prompt in prompts}

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(row, limit) for row, limit in zip(rows, budget, strict=True)]

    def _draft(self, row: Request, limit: int) -> Draft:
        size = min(self.config.window, limit)
        window = self._windows.get(row.index) or _Window([], None)
        drawn = window.tokens[:size]
        probs_NV = window.probs_NV[: len(drawn)] if window.probs_NV is not None and drawn else None
        index = self._indexes[row.index]
        index.extend(row.tokens)
        fresh = _fresh(row.tokens, drawn, index, size - len(drawn))
        kind: Kind = "deterministic" if probs_NV is None else "iid"
        kinds: list[Kind] = [kind] * (1 + len(drawn)) + ["deterministic"] * len(fresh)
        tokens = [row.tokens[-1], *drawn, *fresh]
        return Draft(tokens, list(range(-1, len(tokens) - 1)), kinds, probs_NV)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Draw every position after the new root from the law of the node before it."""
        found: list[tuple[Outcome, Tensor, Tensor]] = []
        for outcome in outcomes:
            assert outcome.probs_NV is not None
            # The node after the accepted path held what the new root replaced.
            probs_NV = outcome.probs_NV[len(outcome.path) :]
            if outcome.row.control.greedy:
                tokens_N = probs_NV.argmax(-1)
            else:
                start, draws = len(outcome.row.tokens), outcome.row.draws
                numbers = [draws.uniform(start + at, "draft") for at in range(len(probs_NV))]
                uniform_N = torch.tensor(numbers, dtype=torch.float64, device=probs_NV.device)
                tokens_N = pick(probs_NV, uniform_N)
            found.append((outcome, probs_NV, tokens_N))
        tokens = torch.cat([tokens_N for _, _, tokens_N in found]).tolist()
        for outcome, probs_NV, _ in found:
            own, tokens = tokens[: len(probs_NV)], tokens[len(probs_NV) :]
            probs = None if outcome.row.control.greedy else probs_NV
            self._windows[outcome.row.index] = _Window(own, probs)


def _fresh(tokens: Sequence[int], drawn: Sequence[int], index: NgramIndex, count: int) -> list[int]:
    """What the text goes on with after the window, as far as is known; then any of its tokens.

    What they are decides speed only: the next pass predicts these positions from their context.
    """
    for _, end in index.matches([*tokens[-4:], *drawn]):
        return continuation(tokens, end, count)
    return [tokens[(len(tokens) + at) * 7919 % len(tokens)] for at in range(count)]
