"""Plain decoding: one token per step, nothing drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectool import options
from spectool.decode import tree
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Needs
from spectool.decode.request import Request
from spectool.decode.tree import Draft, Kind


class NoDrafter(Drafter):
    """Drafter that proposes nothing."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `none`: it has none."""

    name = "none"
    takes_sources = True
    needs = Needs()

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return ()

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [tree.root(request.tokens[-1]) for request in requests]
