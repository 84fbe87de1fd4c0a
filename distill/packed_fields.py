"""Training of a packed model's floating fields, while its codes stay: a packed model is repaired.

The parameters are the scales, real zero points and codebooks of all packed matrices, and the
vectors that are not packed, norms and biases. Each learns at the rate times the mean size of its
values, so that AdamW first changes all of them by equal shares. They are trained in float32 and
stored in their own dtypes, so the file has the bits that it had.

Source: the end-to-end stage of Chen et al., EfficientQAT, 2024 (arXiv:2407.11062), which trains the
scales of a uniform grid; here the fields of every format that is unpacked by differentiable
operations. Shapes: n outputs, m inputs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from spectool.distill.weights import TrainedWeights
from spectool.errors import UnsupportedError
from spectool.model.packed import Fields, PackedEmbedding, PackedLinear

if TYPE_CHECKING:
    from spectool.distill.objectives.base import WeightTask

# Norms and biases that are smaller than this on average, such as biases of zero, learn as if they
# had this size.
_SMALLEST = 1e-2


class PackedFields(TrainedWeights):
    """Floating fields of the packed matrices, norms and biases of a packed model.

    Raises:
        UnsupportedError: a matrix whose unpacking has no gradient.
    """

    def __init__(self, task: WeightTask) -> None:
        self.module = task.model
        for parameter in task.model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        entries = task.source.layout.modules
        for name, part in task.model.named_modules():
            linear = part.packed if isinstance(part, PackedEmbedding) else part
            if not isinstance(linear, PackedLinear):
                continue
            if not linear.is_differentiable:
                method = entries[name]["method"] if name in entries else "its method"
                raise UnsupportedError(f"{name}: the fields of {method} cannot be trained")
            _make_parameters(linear.q)
            trained: Any = linear
            trained.forward = functools.partial(_forward, linear)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        groups = []
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                size = float(parameter.detach().abs().mean())
                size = size if ".q." in name else max(_SMALLEST, size)
                groups.append({"params": [parameter], "lr": rate * size})
        return groups

    def changed(self) -> dict[str, Tensor]:
        """Return the fields, norms and biases."""
        pairs = self.module.named_parameters()
        return {name: p.detach() for name, p in pairs if p.requires_grad}


def _make_parameters(fields: Fields) -> None:
    """Make the floating buffers of a matrix parameters in float32; a tied matrix has been seen."""
    for name, buffer in list(fields.named_buffers()):
        if buffer.is_floating_point():
            del fields._buffers[name]
            fields.register_parameter(name, nn.Parameter(buffer.float()))


def _forward(linear: PackedLinear, x: Tensor) -> Tensor:
    """Multiply with the unpacked matrix, which the backward pass unpacks again."""
    if not is_grad_enabled():
        return PackedLinear.forward(linear, x)
    product: Tensor = checkpoint(PackedLinear.forward, linear, x, use_reentrant=False)
    return product
