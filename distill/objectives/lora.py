"""Low-rank updates of the blocks' linear layers, merged into the weights when they are written.

    W' = W + (alpha / r) B A,  alpha = r / 4,  B [n, r] from zero, A [r, m] random

Inputs of A have dropout 0.1. Experts of a fused tensor, the embedding and the lm_head stay.

Source: Hu et al., LoRA, 2021 (arXiv:2106.09685), by peft; scale and dropout as in the preprocessing
of Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179).
"""

from __future__ import annotations

import warnings
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectool import options
from spectool.distill.objective import seeded
from spectool.distill.objectives.base import WeightObjective, WeightTask
from spectool.errors import require, silence_logger
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
            r=config.rank,
            lora_alpha=config.rank / 4,
            lora_dropout=0.1,
            target_modules=[matrix.name for matrix in self._matrices],
        )
        with warnings.catch_warnings(), seeded(task.seed, task.device):
            # peft reads a deprecated attribute of transformers, and says of each Conv1D that it is
            # one.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")
            module: Any = peft.get_peft_model(task.model, asked)
        super().__init__(task, module)

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
