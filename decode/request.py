"""A request in flight: its committed tokens, its end and its counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spectool.decode.control.base import Control, ControlStates
from spectool.decode.options import SamplingParams
from spectool.decode.sampling import Draws
from spectool.decode.streaming import TextStream
from spectool.decode.verify import GREEDY, Verification
from spectool.errors import SpectoolError

if TYPE_CHECKING:
    from spectool.decode.target.entropy import Switch

FinishReason = Literal["eos", "stop", "length", "context", "interrupted"]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request in flight. `index` is its number within its call, `id` the engine's.

    `tokens` are those of the prompt and all committed ones; the last one is the pending root. An
    encoder-decoder's prompt is the `source`, and `tokens` begin with those that its decoder starts
    from.
    `committed` has the tokens that each forward brought, the prompt's first. `drafted` and
    `accepted` count nodes; `offered_at[d]` counts the steps whose draft reached depth d + 1,
    `accepted_at[d]` those whose committed path did. `reported` counts the tokens and the characters
    that were passed to the callback. `switch`: whose turn it is of two models.
    """

    index: int
    tokens: list[int]
    draws: Draws
    sampling: SamplingParams
    controls: Sequence[Control[Any]] = ()
    max_new_tokens: int
    context: int
    source: Sequence[int] = ()
    eos: Collection[int] = ()
    text: TextStream | None = None
    verification: Verification = GREEDY
    id: int = -1
    num_prompt: int = field(init=False)
    finish_reason: FinishReason | None = None
    committed: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    offered_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    reported: tuple[int, int] = (0, 0)
    error: Exception | None = None
    switch: Switch | None = None
    _states: tuple[int, ControlStates] | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def forwards(self) -> int:
        """Return the number of passes of the target so far, the prompt's included."""
        return len(self.committed)

    @property
    def new_tokens(self) -> list[int]:
        """Return the committed tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def text_tokens(self) -> list[int]:
        """Return all that is known of the text, for drafters that look things up in it."""
        return [*self.source, *self.tokens] if self.source else self.tokens

    @property
    def most(self) -> int:
        """Return how many tokens prompt and output may have together."""
        return min(self.num_prompt + self.max_new_tokens, self.context)

    @property
    def num_left(self) -> int:
        """Return how many more tokens may be committed."""
        return self.most - len(self.tokens)

    def control_states(self) -> ControlStates:
        """Return the states of the request's controls after all of its tokens."""
        num_read, states = self._states or (0, None)
        if states is None or num_read > len(self.tokens):
            states = ControlStates.start(self.controls, self.tokens)
        else:
            for token in self.tokens[num_read:]:
                states = states.advance(token)
        self._states = len(self.tokens), states
        return states

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Where its own controls fail, let the request go on without them, with its `error` set."""
        try:
            yield
        except Exception as error:
            self.error, self.controls = error, ()

    def extend(self, tokens: list[int]) -> list[str]:
        """Commit tokens one by one until one of them ends the request.

        Returns the text that each committed token releases. Text held back counts for the token
        that releases it.
        """
        released = []
        for token in tokens:
            self.tokens.append(token)
            released.append("")
            if token in self.eos:
                self.finish_reason = "eos"
            elif self.text is not None:
                released[-1] += self.text.push(token)
                if self.text.stopped:
                    self.finish_reason = "stop"
            if self.finish_reason is None:
                self.finish_if_full()
            if self.finish_reason is not None:
                released[-1] += self._close()
                break
        return released

    def _close(self) -> str:
        """Release the text held back and return it."""
        if self.text is None:
            return ""
        released = self.text.finish()
        if self.text.stopped:
            self.finish_reason = "stop"
        return released

    def finish_if_full(self) -> None:
        """Set `finish_reason` if no further token fits."""
        if self.num_left <= 0:
            full = len(self.tokens) >= self.num_prompt + self.max_new_tokens
            self.finish_reason = "length" if full else "context"

    def interrupt(self) -> tuple[list[int], str]:
        """End the request where it is; return the tokens and the text that were not reported yet.

        Ctrl-C may strike between any two instructions, so only `tokens` is relied on: the new ones
        are committed once more from the first.
        """
        tokens = self.new_tokens
        del self.tokens[self.num_prompt :]
        self.finish_reason = None
        if self.text is not None:
            self.text.reset()
        self.finish_if_full()
        if self.finish_reason is None:
            self.extend(tokens)
        if self.finish_reason is None:
            self.finish_reason = "interrupted"
            self._close()
        text = "" if self.text is None else self.text.text
        return self.new_tokens[self.reported[0] :], text[self.reported[1] :]

    def count(self, depths: list[int], num_accepted: int, committed: int) -> None:
        """Count one step: its draft's depths, the nodes accepted, and all tokens committed."""
        self.committed.append(committed)
        deepest = max(depths)
        missing = deepest - len(self.offered_at)
        self.offered_at += [0] * missing
        self.accepted_at += [0] * missing
        for depth in range(deepest):
            self.offered_at[depth] += 1
        for depth in range(num_accepted):
            self.accepted_at[depth] += 1
        self.drafted += len(depths) - 1
        self.accepted += num_accepted


def no_token_left(request: Request) -> SpectoolError:
    """Make the error for a request whose controls exclude every token."""
    return SpectoolError(
        f"prompt {request.index + 1}: its bans, biases and penalties exclude every token after "
        f"{len(request.new_tokens)} new ones",
        hint="allow a token that may follow, or end the text earlier",
    )


def apply_controls(
    requests: Sequence[Request],
    logits_BNV: Tensor,
    states_of: Callable[[int], Iterable[ControlStates]],
) -> Tensor:
    """Return the logits as the controls of each row's request change them.

    `states_of(b)` gives the states at the first nodes of row b; other nodes stay as they are. The
    result is an fp32 copy where any request has controls.
    """
    if not any(request.controls for request in requests):
        return logits_BNV
    logits_BNV = logits_BNV.to(torch.float32, copy=True)
    for b, request in enumerate(requests):
        with request.guard():
            for node, at_node in enumerate(states_of(b) if request.controls else ()):
                logits_BNV[b, node] = at_node.process(logits_BNV[b, node])
    return logits_BNV
