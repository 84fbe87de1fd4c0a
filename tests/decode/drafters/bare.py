"""A stand-in target of two matrices for draft heads, and training batches of random states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from spectool.decode.protocol import Needs
from spectool.distill.losses import compute_loss
from spectool.training import TrainingBatch


def bare_model(width: int = 12, vocab: int = 17, *, bias: bool = False, seed: int = 3) -> Any:
    """Make a stand-in target: an embedding, an lm_head and a config."""
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
        """Return None: there is no decoder."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.output


def make_batch(
    rows: int = 3,
    length: int = 23,
    width: int = 12,
    vocab: int = 17,
    *,
    needs: Needs | None = None,
    share: float = 0.8,
) -> TrainingBatch:
    """Make random texts; a random `share` of their tokens counts for the loss."""
    generator = torch.Generator().manual_seed(5)
    names = ["final", *(f"layer {n}" for n in (needs.layers if needs else ()))]
    return TrainingBatch(
        tokens_BL=torch.randint(0, vocab, (rows, length), generator=generator),
        loss_mask_BL=torch.rand(rows, length, generator=generator) < share,
        features={name: torch.randn(rows, length, width, generator=generator) for name in names},
    )


def disturb(heads: Any, *, seed: int = 1, size: float = 0.1) -> Any:
    """Add noise to all parameters, so that guesses differ from head to head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return heads


def make_heads(kind: Any, model: Any, *, token_map: Tensor | None = None, **options: Any) -> Any:
    """Make draft heads of this class, disturbed."""
    torch.manual_seed(0)
    return disturb(kind(kind.Config(**options), model, token_map)).eval()


def check_loss(
    heads: Any,
    batch: TrainingBatch,
    by_head: Callable[[], Iterable[tuple[list[Tensor], int | None]]],
    *,
    decay: float = 1.0,
    tolerance: float = 1e-3,
) -> None:
    """Compare losses and gradients with the equations'.

    `by_head()` gives the loss of each token of each head, and how many of its guesses are right.
    """
    done = compute_loss(heads, batch)
    found = {name: p.grad for name, p in heads.named_parameters()}
    heads.zero_grad()
    total = torch.zeros(())
    for k, (losses, right) in enumerate(by_head()):
        loss = torch.stack(losses)
        total = total + decay**k * loss.mean()
        assert done.counts[k] == len(losses) > 0 and right in (None, done.right[k])
        assert done.loss[k] == pytest.approx(loss.sum().item(), rel=tolerance / 10)
    total.backward()
    for name, parameter in heads.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=tolerance, atol=tolerance / 100
        )


def rms(x_D: Tensor, norm: Any) -> Tensor:
    """Compute an RMS norm by its equation."""
    scaled: Tensor = norm.weight * x_D / (x_D.square().mean() + norm.variance_epsilon).sqrt()
    return scaled


def llama_layer(layer: nn.Module, x_LD: Tensor) -> Tensor:
    """Return the outputs [L, D] of transformers' layer with these weights, for a `bare_model`."""
    config = LlamaConfig(
        hidden_size=x_LD.shape[1],
        intermediate_size=2 * x_LD.shape[1],
        num_attention_heads=2,
        rms_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        theirs = LlamaDecoderLayer(config, 0)
    length = len(x_LD)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    rotary = LlamaRotaryEmbedding(config)(x_LD, torch.arange(length)[None])
    given = {"attention_mask": mask, "position_embeddings": rotary}
    out: Any = functional_call(theirs, dict(layer.named_parameters()), (x_LD[None],), given)
    states: Tensor = out[0]
    return states.view(length, -1)
