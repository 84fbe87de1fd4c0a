"""The interface of measures: what `eval` can find out about a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Self

from spectool.evaluate.context import Context, Need
from spectool.evaluate.results import number_names


class Measure(ABC):
    """A frozen dataclass whose fields are the keys of the result's JSON, made by `run`.

    `needs` are attributes of the context. They are opened before any measure runs, so that what
    does not fit is refused at once; a measure without one of them does not run. One that is not
    run `by_default` runs where `--measure` names it.
    """

    needs: ClassVar[tuple[Need, ...]]
    by_default: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def run(cls, context: Context) -> Self:
        """Measure the checkpoint."""

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """Yield the lines that a run shows."""

    @classmethod
    def metrics(cls, context: Context | None = None) -> list[str]:
        """List the names of the numbers among the fields, dotted, which gates may compare.

        With a context, those that its run has.
        """
        return list(number_names(cls))
