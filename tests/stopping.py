"""Runs that are stopped in the middle, for the tests that continue them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def count(
    patch: pytest.MonkeyPatch, owner: Any, name: str, *, stop: int | None = None, only: str = ""
) -> list[int]:
    """Count the calls of a function from now on; the one after `stop` calls is interrupted.

    `only`: beginning of the second argument of the calls that count.
    """
    original, calls = getattr(owner, name), [0]

    def counting(*given: Any, **options: Any) -> Any:
        if not only or given[1].startswith(only):
            if calls[0] == stop:
                raise KeyboardInterrupt
            calls[0] += 1
        return original(*given, **options)

    patch.setattr(owner, name, counting)
    return calls


@contextmanager
def stopped(owner: Any, name: str, *, after: int, only: str = "") -> Iterator[None]:
    """Interrupt the block after so many calls of a function; see `count`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count(patch, owner, name, stop=after, only=only)
        yield
