"""The MLP of one decoder layer in a whole model: its input, its output, and a stand-in for it.

Windows pass one at a time, so that no number depends on the size of a batch. The first token of a
window is left alone: it has read nothing, and models keep their largest activations there.

Shapes: L tokens of a window, D width, N = L - 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectool import families
from spectool.checkpoint.tensors import Checkpoint
from spectool.errors import NotFinite, UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.finite import first_not_finite, not_finite


class _Done(Exception):
    """Ends a forward once the MLP has computed: the layers after it are not needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpNames:
    """The names of a decoder layer, and of the first and the last matrix of its MLP.

    The MLP's input is that of the first matrix, and its output that of the last one: the module
    around them adds the residual in some families (BLOOM, MPT), and OPT has no such module.
    """

    layer: str
    first: str
    last: str


def choose_mlp(checkpoint: Checkpoint, index: int | None) -> MlpNames:
    """Find the MLP of a checkpoint's decoder layer, by default of the one in the middle.

    Raises:
        UsageError: there is no such layer.
        UnsupportedError: it has no dense MLP.
    """
    architecture = Architecture(checkpoint)
    layers = architecture.blocks
    index = len(layers) // 2 if index is None else index
    if index >= len(layers):
        raise UsageError(
            f"{checkpoint.name}: no decoder layer {index}: it has 0 to {len(layers) - 1}"
        )
    mlp = find_mlp(architecture.model, layers[index])
    if mlp is None:
        raise UnsupportedError(
            f"{checkpoint.name}: {layers[index]}: found no dense MLP, one with a first and a last "
            "matrix and without experts"
        )
    return mlp


def find_mlp(model: nn.Module, layer: str) -> MlpNames | None:
    """Find the MLP of a layer in a dense model; None if it has none that is known, or experts."""
    block = model.get_submodule(layer)
    names = (name for name in (*families.MLP, "ffn") if name in block._modules)
    holder = next(names, "")
    module, prefix = block.get_submodule(holder), f"{layer}.{holder}".rstrip(".")
    sizes = {}
    for name, part in module.named_children():
        if isinstance(part, (nn.Linear, Conv1D)):
            rows, columns = part.weight.shape
            sizes[name] = (columns, rows) if isinstance(part, nn.Linear) else (rows, columns)
    num_matrices = sum(part.ndim > 1 for part in module.parameters())
    if len(sizes) < 2 or (holder and num_matrices > len(sizes)):
        return None
    first, *_, last = sizes
    if sizes[first][0] != sizes[last][1]:
        return None
    return MlpNames(layer=layer, first=f"{prefix}.{first}", last=f"{prefix}.{last}")


class TappedMlp:
    """An MLP in a model, which may be packed."""

    def __init__(self, model: PreTrainedModel, mlp: MlpNames) -> None:
        self.model, self.mlp = model, mlp
        self.name = f"{model.config._name_or_path}: {mlp.layer}"

    @torch.inference_mode()
    def read(self, ids_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the output [N, D] of the MLP, float32.

        Raises:
            NotFinite: one of them is NaN or infinite.
            UnsupportedError: the MLP does not call its last matrix (BLOOM with `slow_but_exact`).
        """
        found: list[Tensor] = []

        def stop(x_LD: Tensor, out: Tensor) -> None:
            found.extend((x_LD, _rows(out)))
            raise _Done

        with contextlib.suppress(_Done):
            self._forward(ids_L, stop)
        if not found:
            raise UnsupportedError(f"{self.name}: its MLP does not call {self.mlp.last}")
        x_ND, y_ND = (rows_LD[1:].float() for rows_LD in found)
        if not (x_ND.isfinite().all() and y_ND.isfinite().all()):
            raise self._not_finite(self.mlp.layer)
        return x_ND, y_ND

    @torch.inference_mode()
    def score(self, ids_L: Tensor, stand_in: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the negative log-likelihoods [N] of a window's tokens.

        `stand_in` computes the MLP's output [N, D] from its input, both in float32.

        Raises:
            NotFinite: one of them is NaN or infinite.
        """

        def replace(x_LD: Tensor, out: Tensor) -> Tensor | None:
            if stand_in is None:
                return None
            rows_ND = stand_in(x_LD[1:].float()).to(out.dtype)
            return torch.cat([_rows(out)[:1], rows_ND]).view_as(out)

        logits_LV = self._forward(ids_L, replace)
        next_N = ids_L[1:].to(logits_LV.device)
        loss_N = functional.cross_entropy(logits_LV[:-1].float(), next_N, reduction="none")
        if not loss_N.isfinite().all():
            place = "the lm_head" if stand_in is None else f"the stand-in of {self.mlp.layer}"
            raise self._not_finite(first_not_finite(self.model, ids_L[None]) or place)
        return loss_N

    def _not_finite(self, place: str) -> NotFinite:
        return not_finite(self.model.config._name_or_path, "cannot be evaluated", place)

    def _forward(
        self, ids_L: Tensor, at_output: Callable[[Tensor, Tensor], Tensor | None]
    ) -> Tensor:
        """Return the logits [L, V].

        `at_output` takes the MLP's input [L, D] and its output, which it may replace.
        """
        inputs: list[Tensor] = []
        first, last = (self.model.get_submodule(each) for each in (self.mlp.first, self.mlp.last))
        handles = [
            first.register_forward_pre_hook(lambda module, args: inputs.append(_rows(args[0]))),
            last.register_forward_hook(lambda module, args, out: at_output(inputs[-1], out)),
        ]
        try:
            ids_1L = ids_L[None].to(self.model.device)
            logits: Tensor = self.model(input_ids=ids_1L, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[0]


def _rows(states: Tensor) -> Tensor:
    """Return the states [L, D] of one window; OPT's MLP computes without the batch."""
    return states.reshape(-1, states.shape[-1])
