"""Parallel Prompt Decoding: trained prompt tokens after a node, at which the target guesses ahead.

Chen et al. 2024 (arXiv:2405.18628). Prompt token j (from 1) of a node at position t has position
t + j and attends to the node's context and the prompt tokens before it. The target's logits there,
averaged over an ensemble of n embeddings that do not attend to each other's chains, guess
x_{t+j+1}. Only the embeddings are trained: K n D numbers. Loss: the sum over j of 0.8^(j-1) times
the mean cross entropy against the target's probabilities along the text, at random positions of
each text. The target's keys and values of the text are computed once, and gradients flow through
the prompt tokens' rows alone.

Embeddings start at the mean of the target's, plus a little noise so that those of an ensemble
differ; the authors start with the embeddings of words. Shapes: see `inpass`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.heads.inpass import InPassDrafter, InPassHeads
from spectool.decode.protocol import Inject, Needs
from spectool.model.packed import dense_weight
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch

# Noise of initial embeddings, relative to the standard deviation of the target's.
_NOISE = 0.1


class PPDHeads(InPassHeads):
    """The prompt tokens' embeddings."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(3, "prompt tokens: tokens guessed ahead", minimum=1, maximum=16)
        ensemble: int = option(1, "embeddings of a prompt token", minimum=1, maximum=16)
        anchors: int = option(64, "positions of a text to train at in a step", minimum=1)

    optimizer_defaults = OptimizerDefaults(rate=1e-2)
    loss = LossSpec(target="probs", decay=0.8)

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        vectors = dense_weight(model.get_input_embeddings()).detach()
        mean_D, std_D = vectors.float().mean(0), vectors.float().std(0)
        noise_KND = torch.randn(
            config.num_heads, config.ensemble, len(mean_D), device=mean_D.device
        )
        self.prompt_embeds = nn.Parameter(mean_D + _NOISE * std_D * noise_KND)
        self.needs = Needs(final=True, inject={-1: self._embed})

    @property
    def extra_rows(self) -> list[tuple[int, int]]:
        # Row `slot` of one prompt token follows the row of the same ensemble member before it.
        size = self.config.ensemble
        return [(max(0, slot + 1 - size), slot) for slot in range(self.num_heads * size)]

    def make_injections(self, batch: TrainingBatch) -> dict[int, Inject]:
        return {-1: self._embed}

    def _embed(self, hidden_BND: Tensor, slots_BN: Tensor, owners_BN: Tensor) -> Tensor:
        """Replace the input embeddings of extra rows by the prompt tokens'."""
        prompt_BND = self.prompt_embeds.flatten(0, 1)[slots_BN.clamp(min=0)].to(hidden_BND.dtype)
        return torch.where((slots_BN >= 0)[..., None], prompt_BND, hidden_BND)


class PPDDrafter(InPassDrafter):
    """Drafter of what the prompt tokens guessed in the previous pass."""

    name = "ppd"
    Heads = PPDHeads
