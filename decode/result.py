"""Results of `Runner.generate`, and those who hear of a request's tokens while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spectool.decode.request import FinishReason, Request

# Index of the prompt, its newly committed tokens, the text they release, and how many of the text's
# first characters came from accepted drafts.
OnTokens = Callable[[int, list[int], str, int], None]


class Streamer(Protocol):
    """The interface of transformers' `BaseStreamer`: prompts [1, T], tokens [T], ends."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Record the turns of two models.

    `switches`: the number of new tokens before each switch. `small_tokens`: those that the small
    model wrote. `caught_up`: those that a model read because the other one had written them.
    """

    switches: tuple[int, ...]
    small_tokens: int
    caught_up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The continuation of one prompt.

    `token_ids` are the new tokens, with an end-of-text token and the token that completed a stop
    string; `text` is cut before either and continues the prompt as written. `forwards` counts
    passes of the target, the prompt's included: one per token in plain decoding; `committed` are
    the tokens of each. `offered_at[d]` counts the steps that drafted d + 1 tokens deep,
    `accepted_at[d]` those that committed as deep. `turns`: where two models wrote the text.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    forwards: int
    drafted: int
    accepted: int
    committed: list[int] = field(default_factory=list)
    offered_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    lossless: bool = True
    turns: Turns | None = None

    @classmethod
    def of(cls, request: Request) -> Result:
        """Make the result of a finished request."""
        assert request.finish_reason is not None
        return cls(
            token_ids=request.new_tokens,
            text=request.text.text if request.text is not None else "",
            finish_reason=request.finish_reason,
            forwards=request.forwards,
            drafted=request.drafted,
            accepted=request.accepted,
            committed=request.committed,
            offered_at=request.offered_at,
            accepted_at=request.accepted_at,
            lossless=request.verification.lossless,
            turns=request.switch.turns() if request.switch is not None else None,
        )

    @property
    def tokens_per_forward(self) -> float:
        """Return the new tokens divided by the forwards of the target."""
        return len(self.token_ids) / max(1, self.forwards)


@dataclass(slots=True)
class Report:
    """Passes on what is committed, to the callback and to the streamer, if there are any."""

    on_tokens: OnTokens | None
    streamer: Streamer | None

    def begin(self, request: Request) -> None:
        """Tell the streamer that a prompt's turn has come, and that the one before has ended."""
        if self.streamer is not None:
            if request.index:
                self.streamer.end()
            self.streamer.put(torch.tensor([request.tokens]))

    def __call__(self, request: Request, tokens: list[int], text: str, drafted: int) -> None:
        if not tokens and not text:
            return
        num_tokens, size = request.reported
        request.reported = num_tokens + len(tokens), size + len(text)
        if self.on_tokens is not None:
            self.on_tokens(request.index, tokens, text, drafted)
        if self.streamer is not None and tokens:
            self.streamer.put(torch.tensor(tokens))

    def close(self) -> None:
        """Tell the streamer that the last prompt has ended: another thread may wait for that."""
        if self.streamer is not None:
            self.streamer.end()


# Output counts as looping from the second occurrence of any run of this many tokens.
LOOP_TOKENS = 16


def loop_start(tokens: Sequence[int], length: int = LOOP_TOKENS) -> int:
    """Return where a run of `length` tokens that occurred before begins again.

    Returns the number of tokens if no run is repeated.
    """
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - length + 1):
        run = tuple(tokens[start : start + length])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)
