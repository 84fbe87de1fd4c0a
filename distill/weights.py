"""Weights of a model that a training changes: all, or low-rank updates that are merged.

An update of rank r of a linear layer's weight [n, m] is

    W' = W + (alpha / r) B A,  alpha = r / 4,  B [n, r] from zero, A [r, m] random

with dropout 0.1 on the inputs of A. Experts of a fused tensor, the embedding and the lm_head get no
update.

Source: Hu et al., LoRA, 2021 (arXiv:2106.09685), by peft; scale and dropout as in the preprocessing
of Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from spectool.distill.objective import seeded
from spectool.errors import require, silence_logger

if TYPE_CHECKING:
    from spectool.distill.objectives.base import WeightTask
    from spectool.distill.processes import Processes


class TrainedWeights(ABC):
    """The parameters of a task's model that a training changes.

    `module` is called as the model; its parameters that require a gradient are trained.
    `can_split`: several processes may hold a part of each, instead of all of them.
    """

    module: nn.Module
    can_split: ClassVar[bool] = False

    def split(self, processes: Processes) -> None:
        """Split the parameters among several processes, if they can be split."""

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the trained parameters in groups, each with its learning rate."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "lr": rate}]

    @abstractmethod
    def changed(self) -> dict[str, Tensor]:
        """Return the changed tensors by the model's names, in its memory; called at the end.

        Afterwards `module` computes with them.
        """


class FullWeights(TrainedWeights):
    """The model's own parameters, as far as they are `wanted` by name.

    A parameter that is stored in parts, as fused experts are, cannot be written back and stays.
    """

    can_split = True

    def __init__(self, task: WeightTask, wanted: Callable[[str], bool] = lambda name: True) -> None:
        origins = task.architecture.origins
        self.task, self.module = task, task.model
        for name, parameter in task.model.named_parameters():
            is_whole = name in origins and origins[name].converter is None
            parameter.requires_grad_(is_whole and wanted(name))

    def split(self, processes: Processes) -> None:
        processes.split(self.task.model)

    def changed(self) -> dict[str, Tensor]:
        """Return the trained parameters."""
        pairs = self.module.named_parameters()
        return {name: p.detach() for name, p in pairs if p.requires_grad}


class LowRankUpdates(TrainedWeights):
    """Updates of `rank` of the linear layers `names`, by default of all in the blocks.

    Raises:
        MissingExtra: peft is not installed.
    """

    def __init__(self, task: WeightTask, rank: int, names: Container[str] | None = None) -> None:
        with silence_logger("bitsandbytes"):
            # peft imports it, and it complains of a missing package.
            peft = require("peft", extra="lora", reason="training low-rank updates")
        architecture = task.architecture
        blocks = (architecture.block_matrices(block) for block in architecture.blocks)
        self._matrices = [
            matrix
            for block in blocks
            for matrix in block
            if matrix.expert is None and (names is None or matrix.name in names)
        ]
        asked = peft.LoraConfig(
            r=rank,
            lora_alpha=rank / 4,
            lora_dropout=0.1,
            target_modules=[matrix.name for matrix in self._matrices],
        )
        with warnings.catch_warnings(), seeded(task.seed, task.device):
            # peft reads a deprecated attribute of transformers, and says of each Conv1D that it is
            # one.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")
            self.module = peft.get_peft_model(task.model, asked)

    def changed(self) -> dict[str, Tensor]:
        """Merge the updates and return the matrices by parameter name."""
        updated: Any = self.module
        self.module = updated.merge_and_unload()
        tensors = {}
        for matrix in self._matrices:
            module: Any = self.module.get_submodule(matrix.name)
            weight = module.weight.detach()
            # A Conv1D stays one, unless the model was quantized: then it is a linear layer now.
            is_turned = matrix.transposed and isinstance(module, nn.Linear)
            tensors[matrix.parameter] = weight.T if is_turned else weight
        return tensors
