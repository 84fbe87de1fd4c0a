"""The interface of a control, and the states of a request's controls.

A control reads a request's tokens one after the other, prompt included, and changes the logits of
the next one. Its state is a value: `advance` returns a new one and leaves the old one valid, so a
draft's tree is walked from parent to child with one state a node, and drafters that sample draw
from the logits that the verifier will see. Suffix: V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

State = TypeVar("State")


class Control(ABC, Generic[State]):
    """A rule about which tokens may follow, and how likely. Serves any number of requests."""

    @abstractmethod
    def start(self, tokens: Sequence[int]) -> State:
        """Return the state after a prompt's tokens."""

    @abstractmethod
    def advance(self, state: State, token: int) -> State:
        """Return the state after one more token; `state` stays valid."""

    @abstractmethod
    def process(self, state: State, logits_V: Tensor) -> Tensor:
        """Return the logits of the next token, changed; may change `logits_V` in place."""


class ControlStates:
    """The states of all controls of one request after some of its tokens."""

    __slots__ = ("_controls", "_states")

    def __init__(self, controls: Sequence[Control[Any]], states: Sequence[Any]) -> None:
        self._controls, self._states = controls, states

    @classmethod
    def start(cls, controls: Sequence[Control[Any]], tokens: Sequence[int]) -> ControlStates:
        """Return the states after `tokens`."""
        return cls(controls, [control.start(tokens) for control in controls])

    def __bool__(self) -> bool:
        return bool(self._controls)

    def advance(self, token: int) -> ControlStates:
        """Return the states after one more token."""
        pairs = zip(self._controls, self._states, strict=True)
        return ControlStates(self._controls, [c.advance(state, token) for c, state in pairs])

    def process(self, logits_V: Tensor) -> Tensor:
        """Return the logits of the next token as all controls change them, in their order."""
        for control, state in zip(self._controls, self._states, strict=True):
            logits_V = control.process(state, logits_V)
        return logits_V

    def along(self, tokens: Sequence[int], parents: Sequence[int]) -> Iterator[ControlStates]:
        """Yield the states at each node of a draft's tree, whose root these states are at.

        `tokens` and `parents` are the draft's: parents come before their children.
        """
        reached = [self]
        yield self
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            reached.append(reached[parent].advance(token))
            yield reached[-1]
