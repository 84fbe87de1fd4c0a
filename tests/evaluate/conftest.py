"""A toy model whose distributions are a table, for checks against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectool.data.windows import Batch


class TableLogProbs:
    """Model of `size` tokens whose next-token distribution depends on the last token only."""

    size = 7

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logp_VV = torch.log_softmax(torch.randn(self.size, self.size, generator=generator), -1)

    def __call__(self, batch: Batch) -> Tensor:
        return self.logp_VV[batch.ids_BL[:, -1 - batch.scored : -1]]


@pytest.fixture
def table_probs() -> type[TableLogProbs]:
    return TableLogProbs
