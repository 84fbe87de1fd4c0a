"""Distillation of a teacher's probabilities into all weights, or the fields of packed ones.

The loss is the mean over the tokens in the loss of KL(teacher || student), the forward divergence
of Hinton et al., 2015 (arXiv:1503.02531), at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectool import options
from spectool.distill.objectives.base import WeightObjective, WeightTask
from spectool.distill.packed_fields import PackedFields
from spectool.distill.weights import FullWeights


class Logits(WeightObjective):
    """Objective of a student whose probabilities approach its teacher's."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Define no options."""

    learning_rate = 1e-4
    needs_teacher = True
    takes_packed = True

    def __init__(self, task: WeightTask, config: Logits.Config) -> None:
        is_packed = task.source.layout.is_packed
        super().__init__(task, PackedFields(task) if is_packed else FullWeights(task))
        if is_packed:
            # A share of a value's size; see PackedFields.
            self.learning_rate = 1e-3
