"""Parallel Prompt Decoding: trained embeddings after a node, at which the target guesses ahead.

Chen et al. 2024 (arXiv:2405.18628). Prompt token j (from 1) below a node at place t stands at
position t + j and sees the node's context and the prompt tokens before it; the target's law there,
averaged over `ensemble` embeddings of which each sees only its like, guesses x_{t+j+1}. Only the
embeddings are trained: K n D numbers. Loss: the mean over j of 0.8^(j-1) times the cross entropy
against the target's laws along its own text, at random places of each text; the target's keys and
values of the text are computed once, and gradients flow through the prompt tokens' rows alone.

Embeddings begin at the mean of the target's, with a little noise so that those of an ensemble
differ; the authors begin with the embeddings of words. Shapes: see `inpass`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode.heads.base import OptimizerDefaults
from spectool.decode.heads.inpass import InPassDrafter, InPassHeads
from spectool.decode.protocol import Inject, Needs, TrainingBatch
from spectool.model.packed import matrix_of
from spectool.options import option

# Of the embeddings' own spread.
_NOISE = 0.1


class PPDHeads(InPassHeads):
    """The prompt tokens' embeddings."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        num_heads: int = option(3, "prompt tokens: tokens guessed ahead", minimum=1, maximum=16)
        ensemble: int = option(1, "embeddings of a prompt token", minimum=1, maximum=16)
        anchors: int = option(64, "places of a text to learn at in a step", minimum=1)

    optimizer_defaults = OptimizerDefaults(rate=1e-2)
    decay = 0.8

    def __init__(self, config: Config, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__(config, model, token_map)
        self.num_heads = config.num_heads
        vectors = matrix_of(model.get_input_embeddings()).detach()
        begin_D, spread_D = vectors.float().mean(0), vectors.float().std(0)
        noise_KND = torch.randn(
            config.num_heads, config.ensemble, len(begin_D), device=begin_D.device
        )
        self.prompt_embeds = nn.Parameter(begin_D + _NOISE * spread_D * noise_KND)
        self.needs = Needs(final=True, inject={-1: self._embed})

    @property
    def extra_rows(self) -> list[tuple[int, int]]:
        each = self.config.ensemble
        return [(max(0, slot + 1 - each), slot) for slot in range(self.num_heads * each)]

    def make_injections(self, batch: TrainingBatch) -> dict[int, Inject]:
        return {-1: self._embed}

    def _embed(self, hidden_BND: Tensor, slots_BN: Tensor, owners_BN: Tensor) -> Tensor:
        own_BND = self.prompt_embeds.flatten(0, 1)[slots_BN.clamp(min=0)].to(hidden_BND.dtype)
        return torch.where((slots_BN >= 0)[..., None], own_BND, hidden_BND)


class PPDDrafter(InPassDrafter):
    """Drafts what the prompt tokens guessed in the pass before."""

    name = "ppd"
    Heads = PPDHeads
