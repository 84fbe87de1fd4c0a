"""A block of two linear layers with its inputs, for the fits of whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectool.model.blocks import Activations
from spectool.model.matrices import find_matrices
from spectool.model.shell import Call
from spectool.quantize.base import Block, Streams


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


def make_pair(
    length: int, dtype: torch.dtype = torch.float32, *, correlated: bool = False
) -> tuple[Block, Streams]:
    """Make the block `b`, and six texts of its inputs; those of the packed stream have noise."""
    torch.manual_seed(0)
    module = Pair().requires_grad_(False)
    matrices = {matrix.name: matrix for matrix in find_matrices(module, "b")}
    weights = {name: module.get_parameter(name[2:] + ".weight").clone() for name in matrices}
    original = Activations((6, length, 40), dtype)
    packed = original.empty_like()
    inputs_SLD = torch.randn(6, length, 40)
    original.hidden_SLD.copy_(inputs_SLD @ torch.randn(40, 40) / 3 if correlated else inputs_SLD)
    packed.hidden_SLD.copy_(original.hidden_SLD + 0.1 * torch.randn(6, length, 40))
    block = Block(
        name="b",
        matrices=matrices,
        weights=weights,
        device=torch.device("cpu"),
        module=module.to(dtype),
        calls=dict.fromkeys((1, 2, 4), Call((), {})),
    )
    return block, Streams(original, packed)
