"""A reporter that records a run, for all tests."""

from __future__ import annotations

from typing import Any

from spectool.report import Reporter


class Heard(Reporter):
    """Plans, progress and events of a run, in their order."""

    def __init__(self) -> None:
        self.plans: list[Any] = []
        self.ticks: list[tuple[float, int, str]] = []
        self.events: list[Any] = []

    def plan(self, plan: Any) -> None:
        self.plans.append(plan)

    def progress(self, done: float, total: int, what: str) -> None:
        self.ticks.append((done, total, what))

    def event(self, event: Any) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        """Return the events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]
