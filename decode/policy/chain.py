"""Wrappers of drafters for targets that verify chains only."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.drafters.combined import Combined
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.recurrent import RecurrentTarget
from spectool.decode.replay import ReplayCache
from spectool.decode.request import Request
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.errors import UnsupportedError, UsageError

# A request with this many tokens to replay drafts nothing for one step, which clears them.
_MOST_REPLAYED = 16


class Chains(Drafter):
    """A drafter for a recurrent target: first paths, or nothing while there is much to replay.

    Trees of a drafter with `combines` off are left as they are.
    """

    def __init__(self, drafter: Drafter, target: RecurrentTarget) -> None:
        self.drafter = drafter
        self.name = drafter.name
        self.needs = drafter.needs
        self.combines = drafter.combines
        self._target = target
        self._cache: ReplayCache | None = None

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return self.drafter.kinds(sampling)

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)
        note = f"{target.name}: {self._target.why_plain}; decoding plainly"
        if self._target.why_plain and self.name != "none" and note not in target.notes:
            target.notes.append(note)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        assert isinstance(cache, ReplayCache)
        self._cache = cache
        self.drafter.add(prompts, cache)

    def remove(self, request: Request) -> None:
        self.drafter.remove(request)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        assert self._cache is not None
        limits = [
            limit if len(self._cache.tokens_to_replay(b)) < _MOST_REPLAYED else 0
            for b, limit in enumerate(budget)
        ]
        if self._target.why_plain:
            limits = [0] * len(requests)
        drafts = self.drafter.propose(requests, limits)
        return [tree.first_path(draft) for draft in drafts] if self.combines else drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.drafter.observe(outcomes)

    def close(self) -> None:
        self.drafter.close()


class FirstPath(Drafter):
    """A drafter as in servers that verify chains only: the first path, cut to a depth."""

    combines = False

    def __init__(self, drafter: Drafter, depth: int) -> None:
        self.drafter, self.depth = drafter, depth
        self.name, self.needs = drafter.name, drafter.needs

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return self.drafter.kinds(sampling)

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        self.drafter.add(prompts, cache)

    def remove(self, request: Request) -> None:
        self.drafter.remove(request)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        drafts = self.drafter.propose(requests, [min(most, self.depth) for most in budget])
        return [tree.first_path(draft, self.depth) for draft in drafts]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.drafter.observe(outcomes)

    def close(self) -> None:
        self.drafter.close()


def wrap_for_target(drafter: Drafter, target: Target) -> Drafter:
    """Wrap a drafter as far as this target requires.

    Raises:
        InputError: the drafter needs uncut trees, or passes through the target's state.
    """
    if not isinstance(target, RecurrentTarget) or isinstance(drafter, Chains):
        return drafter
    for part in drafter.drafters if isinstance(drafter, Combined) else [drafter]:
        if part.name == "skip":
            raise UnsupportedError(
                f"skip cannot draft for {target.name}: its recurrent state cannot go back"
            )
        if part.needs.inject:
            raise UnsupportedError(
                f"{part.name} cannot draft for {target.name}: a recurrent state takes no extra rows"
            )
        shape = getattr(getattr(part, "config", None), "tree", "chain")
        if part.name == "draft_model" and shape != "chain":
            raise UsageError(
                f"{target.name}, whose state is recurrent, takes chains only, not tree={shape}",
                hint="draft with tree=chain",
            )
    return Chains(drafter, target)
