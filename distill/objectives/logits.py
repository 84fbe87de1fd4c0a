"""Distillation of a teacher's probabilities into all weights of a student.

The loss is the mean over the tokens in the loss of KL(teacher || student), the forward divergence
of Hinton et al., 2015 (arXiv:1503.02531), at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectool import options
from spectool.distill.objectives.base import WeightObjective, WeightTask
from spectool.distill.weights import FullWeights


class Logits(WeightObjective):
    """Objective of a student whose probabilities approach its teacher's."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Define no options."""

    learning_rate = 1e-4
    needs_teacher = True

    def __init__(self, task: WeightTask, config: Logits.Config) -> None:
        super().__init__(task, FullWeights(task))
