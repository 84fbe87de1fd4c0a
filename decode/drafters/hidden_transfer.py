"""Hidden Transfer: states of a middle layer, carried to the places ahead, pass on with the tree.

Wu et al. 2024 (arXiv:2404.12022). Row i (from 1) below a node at place t stands at t + i; from
layer l_i on it is what W_i h + b_i makes of the state h that layer l_i reads at the node. It passes
the remaining, frozen layers, sees the node's context and the rows before it, and its law guesses
x_{t+i+1}. Only W_i and b_i are trained. Loss: the sum over i of the mean cross entropy against the
target's laws along its own text, at random places of each text.

The rows pass through the layers below l_i as well, where they are nothing and nobody real sees
them; layers may not decrease with i, so that later rows see what earlier ones became. The
authors give every node all m rows; here nodes where drafts rarely end have fewer (`inpass`). W_i
begins as the identity. Shapes: see `inpass`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.heads.inpass import InPassDrafter, InPassHeads
from spectool.decode.protocol import Inject, Needs, TrainingBatch
from spectool.errors import UnsupportedError, UsageError
from spectool.options import option


class HiddenTransferHeads(InPassHeads):
    """The matrices that carry states ahead."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(3, "tokens guessed ahead", minimum=1, maximum=16)
        layers: str = option("", "layers to begin at, like 4-4-5; empty: the middle one for all")
        anchors: int = option(64, "places of a text to learn at in a step", minimum=1)

        def validate(self) -> None:
            if not all(part.isdigit() for part in self.layers.split("-") if self.layers):
                raise UsageError(f"--layers {self.layers}: expected numbers like 4-4-5")

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """
        Raises:
            UsageError: layers that the target has not, not one for each head, or decreasing.
            UnsupportedError: a target of one layer.
        """
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.layers = _layers(config, num_layers)
        width = self.frozen.weight_VD.shape[1]
        matrices = [nn.Linear(width, width) for _ in self.layers]
        for matrix in matrices:
            nn.init.eye_(matrix.weight)
            nn.init.zeros_(matrix.bias)
        self.transfer = nn.ModuleList(matrices)
        self.to(self.frozen.weight_VD)
        # What layer l reads is what the one before has made.
        read = sorted({layer - 1 for layer in self.layers})
        inject = {layer: functools.partial(self._carry, layer, None) for layer in self.layers}
        self.needs = Needs(layers=tuple(read), final=True, inject=inject)

    @property
    def extra_rows(self) -> list[tuple[int, int]]:
        return [(slot, slot) for slot in range(self.num_heads)]

    def make_injections(self, batch: TrainingBatch) -> dict[int, Inject]:
        return {
            layer: functools.partial(self._carry, layer, batch.features[f"layer {layer - 1}"])
            for layer in self.layers
        }

    def _carry(
        self,
        layer: int,
        text_BLD: Tensor | None,
        hidden_BND: Tensor,
        slots_BN: Tensor,
        owners_BN: Tensor,
    ) -> Tensor:
        """Put what the rows that begin at this layer are there.

        Their nodes are in the pass, or in the text that was read before.
        """
        source = hidden_BND if text_BLD is None else text_BLD
        index_BND = owners_BN[..., None].expand(-1, -1, source.shape[-1])
        node_BND = source.gather(1, index_BND).to(self.dtype)
        for slot, begins in enumerate(self.layers):
            if begins == layer:
                own_BND = self.transfer[slot](node_BND).to(hidden_BND.dtype)
                hidden_BND = torch.where((slots_BN == slot)[..., None], own_BND, hidden_BND)
        return hidden_BND


class HiddenTransferDrafter(InPassDrafter):
    """Drafts what the carried states guessed in the pass before."""

    name = "hidden-transfer"
    Heads = HiddenTransferHeads


def _layers(config: HiddenTransferHeads.Config, num_layers: int) -> list[int]:
    if num_layers < 2:
        raise UnsupportedError("hidden-transfer needs a target of two layers at least")
    if not config.layers:
        return [num_layers // 2] * config.num_heads
    found = [int(part) for part in config.layers.split("-")]
    if len(found) != config.num_heads or found != sorted(found):
        raise UsageError(
            f"--layers {config.layers}: expected {config.num_heads} layers, none before an earlier"
        )
    if found[0] < 1 or found[-1] >= num_layers:
        raise UsageError(
            f"--layers {config.layers}: states can begin at layers 1 to {num_layers - 1}"
        )
    return found
