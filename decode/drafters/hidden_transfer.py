"""Hidden Transfer: extra rows that start in a middle layer from a node's transformed state.

Wu et al. 2024 (arXiv:2404.12022). Extra row i (from 1) of a node at position t has position t + i.
At layer l_i its state is set to W_i h + b_i, where h is the node's input to layer l_i. It passes
the remaining, frozen layers, attending to the node's context and to the rows before it, and its
output distribution guesses x_{t+i+1}. Only W_i and b_i are trained; W_i starts as the identity.
Loss: the sum over i of the mean cross entropy against the target's probabilities along the text, at
random positions of each text.

Extra rows also pass the layers below l_i, with states that are overwritten at l_i; no node attends
to them. l_i may not decrease with i, so that a row attends to earlier rows after they were set. The
authors give every node all m rows; here nodes where drafts rarely end have fewer (`inpass`).
Shapes: see `inpass`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.heads.inpass import InPassDrafter, InPassHeads
from spectool.decode.protocol import Inject, Needs
from spectool.errors import UnsupportedError, UsageError
from spectool.options import option
from spectool.training import TrainingBatch


class HiddenTransferHeads(InPassHeads):
    """The matrices W_i that transfer states to later positions."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(3, "tokens guessed ahead", minimum=1, maximum=16)
        layers: tuple[int, ...] = option(
            (), "layers to start at, like 4-4-5; empty: the middle one for all"
        )
        anchors: int = option(64, "positions of a text to train at in a step", minimum=1)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """Make untrained heads for a target.

        Raises:
            UsageError: the layers are not in the target, not one per head, or decreasing.
            UnsupportedError: the target has a single layer.
        """
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.layers = _choose_layers(config, num_layers)
        width = self.frozen.weight_VD.shape[1]
        matrices = [nn.Linear(width, width) for _ in self.layers]
        for matrix in matrices:
            nn.init.eye_(matrix.weight)
            nn.init.zeros_(matrix.bias)
        self.transfer = nn.ModuleList(matrices)
        self.to(self.frozen.weight_VD)
        # The input of layer l is the output of layer l - 1.
        read = sorted({layer - 1 for layer in self.layers})
        inject = {layer: functools.partial(self._transfer, layer, None) for layer in self.layers}
        self.needs = Needs(layers=tuple(read), final=True, inject=inject)

    @property
    def extra_rows(self) -> list[tuple[int, int]]:
        return [(slot, slot) for slot in range(self.num_heads)]

    def make_injections(self, batch: TrainingBatch) -> dict[int, Inject]:
        return {
            layer: functools.partial(self._transfer, layer, batch.features[f"layer {layer - 1}"])
            for layer in self.layers
        }

    def _transfer(
        self,
        layer: int,
        text_BLD: Tensor | None,
        hidden_BND: Tensor,
        slots_BN: Tensor,
        owners_BN: Tensor,
    ) -> Tensor:
        """Set the states of the extra rows that start at this layer.

        Their nodes are rows of the same pass, or tokens of `text_BLD`, which was read before.
        """
        # h: the node's input to this layer.
        source = hidden_BND if text_BLD is None else text_BLD
        index_BND = owners_BN[..., None].expand(-1, -1, source.shape[-1])
        node_BND = source.gather(1, index_BND).to(self.dtype)
        for slot, first_layer in enumerate(self.layers):
            if first_layer == layer:
                moved_BND = self.transfer[slot](node_BND).to(hidden_BND.dtype)
                hidden_BND = torch.where((slots_BN == slot)[..., None], moved_BND, hidden_BND)
        return hidden_BND


class HiddenTransferDrafter(InPassDrafter):
    """Drafter of what the transferred states guessed in the previous pass."""

    name = "hidden-transfer"
    Heads = HiddenTransferHeads


def _choose_layers(config: HiddenTransferHeads.Config, num_layers: int) -> list[int]:
    """Return the layer at which each head's extra row starts."""
    if num_layers < 2:
        raise UnsupportedError("hidden-transfer needs a target of two layers at least")
    if not config.layers:
        return [num_layers // 2] * config.num_heads
    layers, given = list(config.layers), "-".join(map(str, config.layers))
    if len(layers) != config.num_heads or layers != sorted(layers):
        raise UsageError(
            f"--layers {given}: expected {config.num_heads} layers, none before an earlier"
        )
    if layers[0] < 1 or layers[-1] >= num_layers:
        raise UsageError(f"--layers {given}: states can begin at layers 1 to {num_layers - 1}")
    return layers
