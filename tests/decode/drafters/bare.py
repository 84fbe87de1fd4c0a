"""What heads see of a target, without a target: two matrices; and texts with random states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from spectool.decode.protocol import Lesson, Needs


def bare_model(width: int = 12, vocab: int = 17, *, bias: bool = False, seed: int = 3) -> Any:
    """Embeddings, an output layer and a configuration."""
    torch.manual_seed(seed)
    return Bare(nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=bias))


class Bare:
    def __init__(self, embedding: nn.Embedding, output: nn.Linear) -> None:
        self.embedding, self.output = embedding, output
        self.config = LlamaConfig(
            vocab_size=output.out_features,
            hidden_size=output.in_features,
            intermediate_size=2 * output.in_features,
            num_hidden_layers=8,
            num_attention_heads=2,
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_decoder(self) -> None:
        """There is none."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.output


def make_lesson(
    rows: int = 3,
    length: int = 23,
    width: int = 12,
    vocab: int = 17,
    *,
    needs: Needs | None = None,
    share: float = 0.8,
) -> Lesson:
    """Random texts, of which a random `share` of the tokens is taught."""
    generator = torch.Generator().manual_seed(5)
    names = ["final", *(f"layer {n}" for n in (needs.layers if needs else ()))]
    return Lesson(
        tokens_BL=torch.randint(0, vocab, (rows, length), generator=generator),
        taught_BL=torch.rand(rows, length, generator=generator) < share,
        features={name: torch.randn(rows, length, width, generator=generator) for name in names},
    )


def disturb(heads: Any, *, seed: int = 1, size: float = 0.1) -> Any:
    """Away from their start, so that guesses differ from head to head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return heads
