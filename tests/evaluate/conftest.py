"""A toy model whose laws are a table, for checks against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectool.evaluate.windows import Batch


class TableLogProbs:
    """The law of the next token depends on the last one only. `size` tokens."""

    size = 7

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logp_VV = torch.log_softmax(torch.randn(self.size, self.size, generator=generator), -1)

    def __call__(self, batch: Batch) -> Tensor:
        return self.logp_VV[batch.ids_BL[:, :-1]]


@pytest.fixture
def table_probs() -> type[TableLogProbs]:
    return TableLogProbs
