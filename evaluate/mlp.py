"""The MLP of one decoder layer in a whole model: what goes in and comes out, and a stand-in for it.

Windows pass one at a time, so that no number depends on the size of a batch. The first token of a
window is left alone: it has read nothing, and models keep their largest activations there.

Shapes: L tokens of a window, D width, N = L - 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.target.layer_parts import UnknownLayerError, find_mlp
from spectool.errors import UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.finite import not_finite


class _Done(Exception):
    """The MLP has computed; the layers behind it need not."""


def name_layer(checkpoint: Checkpoint, index: int | None) -> str:
    """Return the name of a decoder layer with a dense MLP, by default the one in the middle.

    Raises:
        UsageError: there is no such layer.
        UnsupportedError: it has no dense MLP that is known.
    """
    architecture = Architecture(checkpoint)
    names = architecture.blocks
    index = len(names) // 2 if index is None else index
    if index >= len(names):
        raise UsageError(
            f"--transcoder-layer {index}: {checkpoint.name} has the decoder layers 0 to "
            f"{len(names) - 1}"
        )
    reason = "it has none under a known name, or experts"
    try:
        if find_mlp(architecture.model.get_submodule(names[index])) is not None:
            return names[index]
    except UnknownLayerError as error:
        reason = str(error)
    raise UnsupportedError(
        f"{checkpoint.name}: {names[index]}: a transcoder needs a dense MLP: {reason}"
    )


class TappedMlp:
    """The MLP of a layer in a model; `name` is a layer's of `name_layer`."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        mlp = find_mlp(model.get_submodule(name))
        assert mlp is not None
        self._first, self._last = mlp.inputs[0], mlp.out

    @torch.inference_mode()
    def read(self, ids_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return what goes into the MLP and what comes out [N, D], float32.

        Raises:
            NotFinite: one of them is NaN or infinite.
        """
        found: list[Tensor] = []

        def stop(x_LD: Tensor, out: Tensor) -> None:
            found.extend((x_LD, _rows(out)))
            raise _Done

        with contextlib.suppress(_Done):
            self._forward(ids_L, stop)
        x_ND, y_ND = (rows_LD[1:].float() for rows_LD in found)
        if not (x_ND.isfinite().all() and y_ND.isfinite().all()):
            raise not_finite(self.model.config._name_or_path, "cannot be evaluated", self.name)
        return x_ND, y_ND

    @torch.inference_mode()
    def score(self, ids_L: Tensor, stand_in: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the negative log-likelihoods [N] of a window's tokens.

        `stand_in` computes the MLP's output [N, D] from its input, both in float32.
        """

        def replace(x_LD: Tensor, out: Tensor) -> Tensor | None:
            if stand_in is None:
                return None
            rows_ND = stand_in(x_LD[1:].float()).to(out.dtype)
            return torch.cat([_rows(out)[:1], rows_ND]).view_as(out)

        logits_LV = self._forward(ids_L, replace)
        next_N = ids_L[1:].to(logits_LV.device)
        return functional.cross_entropy(logits_LV[:-1].float(), next_N, reduction="none")

    def _forward(
        self, ids_L: Tensor, at_output: Callable[[Tensor, Tensor], Tensor | None]
    ) -> Tensor:
        """Return the logits [L, V].

        `at_output` takes what goes into the MLP [L, D] and its output, which it may replace.
        """
        inputs: list[Tensor] = []
        handles = [
            self._first.register_forward_pre_hook(
                lambda module, args: inputs.append(_rows(args[0]))
            ),
            self._last.register_forward_hook(lambda module, args, out: at_output(inputs[-1], out)),
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
