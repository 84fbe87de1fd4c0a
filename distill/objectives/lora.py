"""Low-rank updates of the blocks' linear layers, merged into the weights when they are written.

The equations are in `distill/weights.py`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from spectool import options
from spectool.distill.objectives.base import WeightObjective, WeightTask
from spectool.distill.weights import LowRankUpdates
from spectool.options import option


class LoRA(WeightObjective):
    """Objective of low-rank updates of the layers `names`, by default of all.

    Raises:
        MissingExtra: peft is not installed.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of the updates."""

        rank: int = option(64, "rank of the updates", minimum=1)

    learning_rate = 1e-4

    def __init__(
        self, task: WeightTask, config: LoRA.Config, names: Container[str] | None = None
    ) -> None:
        super().__init__(task, LowRankUpdates(task, config.rank, names))
