"""The lm_head of a loaded model as a matrix, whatever it is stored as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Unit vectors that are multiplied at a time.
_ROWS = 256


@torch.inference_mode()
def read_lm_head(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the lm_head's matrix [V, D] and bias [V] in float32 on the CPU, by its products.

    A quantized lm_head gives the matrix that it computes with.
    """
    lm_head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    width = lm_head.in_features
    zero_1D = torch.zeros(1, width, dtype=model.dtype, device=model.device)
    bias_1V = lm_head(zero_1D).float()
    unit_DD = torch.eye(width, dtype=model.dtype, device=model.device)
    rows = [(lm_head(part_ND).float() - bias_1V).cpu() for part_ND in torch.split(unit_DD, _ROWS)]
    return torch.cat(rows).T.contiguous(), bias_1V[0].cpu()
