"""Speculative Jacobi decoding: each pass predicts the next draft window from the current one.

Teng et al. 2024 (arXiv:2410.01699), applied to text. A pass over drafts x_1 ... x_W gives a
distribution after each. Every position after the accepted ones is redrawn from its new
distribution, which is kept as q when the token is verified in the next pass. The output is exact
because q is the distribution that the token was drawn from, and because the random number of a
position is used for nothing before that position. Tokens that fill up the window are looked up in
the text (deterministic nodes). At temperature 0 this is Jacobi decoding: each position takes the
likeliest token, and tokens that stay the same are accepted.

The window slides with the text, so all its positions are in flight at once; a model trained by
`distill consistency` in blocks of n has w / n blocks in flight in a window of w. Joined with other
drafters, whose nodes share the tree, the window is a path of deterministic nodes, and rejected
tokens come back through a drafter that remembers them (`jacobi+recycle`).

With `cap`, a token is accepted as it is once its position was part of that many drafts (early exit;
Song et al., CEED-VLA, 2025, arXiv:2506.13725). From `cap` = window on nothing changes: by then each
token is committed, since every pass commits one at least.

Suffixes: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectool import options
from spectool.decode.cache import BatchCache
from spectool.decode.drafters.ngram import NgramIndex, continue_text
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import pick
from spectool.decode.tree import Draft, Kind
from spectool.options import option


@dataclass(slots=True)
class _Window:
    """Tokens predicted for a request's next positions, and the q that each was drawn from.

    `index` is that of the request's text. `path`: the tokens of the last draft. `ages` counts
    the drafts that each position of it was part of.
    """

    index: NgramIndex
    tokens: list[int] = field(default_factory=list)
    probs_NV: Tensor | None = None
    path: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)


class JacobiDrafter(Drafter):
    """Drafter of one window per request: a chain of predicted, then of looked-up tokens."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `jacobi`."""

        window: int = option(16, "tokens predicted at once", minimum=1, maximum=256)
        cap: int | None = option(
            None, "accept tokens untested after this many passes; lossy", minimum=1
        )

    name = "jacobi"
    takes_sources = True
    needs = Needs(probs=True)
    # Drawn nodes come with their probabilities; joined with others they are deterministic.
    can_be_cut = False

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        # A shared tree does not tell whose nodes are accepted untested.
        self.combines = self.config.cap is None
        self._windows: dict[Request, _Window] = {}

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        forced: tuple[Kind, ...] = () if self.config.cap is None else ("forced",)
        return (*(() if sampling.greedy else ("iid",)), "deterministic", *forced)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        for prompt in prompts:
            self._windows[prompt.request] = _Window(NgramIndex(1, 4))

    def remove(self, request: Request) -> None:
        self._windows.pop(request, None)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [
            self._draft(request, limit) for request, limit in zip(requests, budget, strict=True)
        ]

    def _draft(self, request: Request, limit: int) -> Draft:
        size = min(self.config.window, limit)
        window = self._windows[request]
        drawn = window.tokens[:size]
        probs_NV = window.probs_NV[: len(drawn)] if window.probs_NV is not None and drawn else None
        window.index.extend(request.text_tokens)
        fresh = _look_up(request.text_tokens, drawn, window.index, size - len(drawn))
        # Predicted tokens were drawn from q above temperature 0; looked-up ones never are.
        kind: Kind = "deterministic" if probs_NV is None else "iid"
        kinds: list[Kind] = [kind] * (1 + len(drawn)) + ["deterministic"] * len(fresh)
        window.ages = window.ages[: len(drawn)] + [0] * len(fresh)
        if self.config.cap is not None:
            for at, age in enumerate(window.ages, start=1):
                kinds[at] = "forced" if age >= self.config.cap else kinds[at]
        tokens = window.path = [request.tokens[-1], *drawn, *fresh]
        return Draft(tokens, list(range(-1, len(tokens) - 1)), kinds, probs_NV)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Draw every position after the new root from the probabilities of the node before it."""
        found: list[tuple[Outcome, Tensor, Tensor]] = []
        for outcome in outcomes:
            assert outcome.probs_NV is not None
            # The node after the accepted path is the one that the new root replaces.
            nodes = _find_path(outcome.draft, self._windows[outcome.request].path)
            probs_NV = outcome.probs_NV[nodes[len(outcome.path) :]]
            if outcome.request.sampling.greedy:
                tokens_N = probs_NV.argmax(-1)
            else:
                start, draws = len(outcome.request.tokens), outcome.request.draws
                numbers = [draws.uniform(start + at, "draft") for at in range(len(probs_NV))]
                uniform_N = torch.tensor(numbers, dtype=torch.float64, device=probs_NV.device)
                tokens_N = pick(probs_NV, uniform_N)
            found.append((outcome, probs_NV, tokens_N))
        tokens = torch.cat([tokens_N for _, _, tokens_N in found]).tolist()
        for outcome, probs_NV, _ in found:
            window = self._windows[outcome.request]
            # Only the position after the last node was not part of this draft.
            window.ages = [1 + age for age in window.ages[len(outcome.path) :]] + [0]
            window.tokens, tokens = tokens[: len(probs_NV)], tokens[len(probs_NV) :]
            window.probs_NV = None if outcome.request.sampling.greedy else probs_NV


def _find_path(draft: Draft, tokens: Sequence[int]) -> list[int]:
    """Return the nodes of a draft that spell the tokens from the root on, as far as there are."""
    nodes = [0]
    for node in range(1, len(draft)):
        depth = len(nodes)
        if (
            depth < len(tokens)
            and draft.parents[node] == nodes[-1]
            and draft.tokens[node] == tokens[depth]
        ):
            nodes.append(node)
    return nodes


def _look_up(
    tokens: Sequence[int], drawn: Sequence[int], index: NgramIndex, count: int
) -> list[int]:
    """Return `count` tokens to follow the window: an n-gram's continuation, else arbitrary ones.

    They only affect speed, since the next pass predicts these positions anew.
    """
    for _, end in index.matches([*tokens[-4:], *drawn]):
        return continue_text(tokens, end, count)
    # Spread over the text, reproducibly.
    return [tokens[(len(tokens) + at) * 7919 % len(tokens)] for at in range(count)]
