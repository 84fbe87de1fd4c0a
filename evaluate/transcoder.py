"""A transcoder: a wide, sparse stand-in for an MLP, trained to compute what the MLP computes.

With an MLP's input x and output y (Dunefsky et al., 2024, arXiv:2406.11944):

    z = relu(W_e (x - b_d) + b_e),   y' = W_d z + b_o,
    loss = mean over tokens of |y' - y|^2 / |y| + PENALTY sum of z,

where each feature's vector in W_d has length 1. Both terms of the loss are proportional to the
scale of y, so that the penalty means the same at any scale. Training differs from the paper's:

- The squared error is a sum over the D dimensions, and the penalty D = 768 times the paper's
  1.4e-4. The paper takes the mean at that D; a sum makes the penalty mean the same at any D.
- x - b_d and y are divided by the root mean squares of their lengths, so that the learning rate
  means the same at any scale. The trained weights are scaled back.
- b_d stays the mean of x: b_e can learn every shift of the features that b_d could.
- Tokens are few (the paper: 60 million), so that the learning rate is high and falls, steps have
  few tokens, and features begin rarely active. Dead features are counted, not revived.

Shapes: T tokens, B of a step, D width, F features.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectool.errors import NotFinite
from spectool.report import SILENT, Reporter
from spectool.training import rate_share

PENALTY = 1.4e-4 * 768
# Adam changes a number by about the learning rate. The numbers of a vector of length 1 are about
# 1 / D^0.5, so that the peak of the learning rate is RATE / D^0.5.
RATE, WARM_UP = 0.05, 0.1
BATCH = 256
# A feature is dead if no token activates it in this share of the steps, the last ones.
LAST_STEPS = 0.5


class Transcoder(nn.Module):
    """The stand-in of an MLP. The parameters have the names that they have in a file."""

    b_dec: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(features, width))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.zeros(features, width))
        self.b_dec_out = nn.Parameter(torch.zeros(width))
        self.register_buffer("b_dec", torch.zeros(width))

    @property
    def device(self) -> torch.device:
        return self.b_enc.device

    @torch.no_grad()
    def begin(self, out_D: Tensor, *, seed: int) -> None:
        """Start from random features and the mean output of the MLP."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.W_enc, self.W_dec):
            parameter.copy_(_unit(torch.randn(parameter.shape, generator=generator)))
        # W_e x is about 1 / D^0.5 for x of length 1: a sixth of the tokens activates a feature.
        self.b_enc.fill_(-(len(out_D) ** -0.5))
        self.b_dec_out.copy_(out_D)

    def encode(self, x_TD: Tensor) -> Tensor:
        """Return the features [T, F] of the MLP's inputs; those above 0 are active."""
        return functional.linear(x_TD - self.b_dec, self.W_enc, self.b_enc).relu()

    def decode(self, z_TF: Tensor) -> Tensor:
        """Return the output [T, D] that the features stand for."""
        return z_TF @ self.W_dec + self.b_dec_out

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the output [T, D] in place of the MLP's."""
        return self.decode(self.encode(x_TD))

    def loss(self, x_BD: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and the features [B, F]."""
        z_BF = self.encode(x_BD)
        squared_B = (self.decode(z_BF) - y_BD).square().sum(-1)
        # An output of zeros has no length to divide by.
        length_B = torch.linalg.vector_norm(y_BD, dim=-1).clamp(min=1e-6)
        return (squared_B / length_B).mean() + PENALTY * z_BF.sum(-1).mean(), z_BF


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A transcoder, the tokens it was trained on, its dead features, and the seconds it took."""

    transcoder: Transcoder
    tokens: int
    dead: int
    seconds: float


def train(
    x_TD: Tensor,
    y_TD: Tensor,
    *,
    features: int,
    tokens: int,
    device: torch.device,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> Trained:
    """Train a transcoder on `tokens` tokens, which are taken again in another order if T is less.

    Both numbers are at least BATCH. The result depends on the seed alone, up to rounding.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    began = time.monotonic()
    mean_D, width = x_TD.mean(0), x_TD.shape[1]
    x_scale, y_scale = _length(x_TD - mean_D), _length(y_TD)
    transcoder = Transcoder(features, width).to(device)
    transcoder.begin(y_TD.mean(0) / y_scale, seed=seed)
    optimizer = torch.optim.Adam(transcoder.parameters(), fused=True)
    steps = tokens // BATCH
    generator = torch.Generator().manual_seed(seed)
    active_F = torch.zeros(features, dtype=torch.bool, device=device)
    order_T, place = torch.randperm(len(x_TD), generator=generator), 0
    for step in range(steps):
        if place + BATCH > len(order_T):
            order_T, place = torch.randperm(len(x_TD), generator=generator), 0
        rows_B = order_T[place : place + BATCH]
        place += BATCH
        x_BD = ((x_TD[rows_B] - mean_D) / x_scale).to(device)
        y_BD = (y_TD[rows_B] / y_scale).to(device)
        optimizer.param_groups[0]["lr"] = (
            RATE * width**-0.5 * rate_share(step, steps, warmup=WARM_UP)
        )
        loss, z_BF = take_step(transcoder, optimizer, x_BD, y_BD)
        if not math.isfinite(loss):
            raise NotFinite(f"the transcoder's loss is {loss} at step {step + 1}")
        if step >= (1 - LAST_STEPS) * steps:
            active_F |= (z_BF > 0).any(0)
        reporter.progress(step + 1, steps, f"transcoder: loss {loss:.3f}, steps")
    with torch.no_grad():
        transcoder.b_dec.copy_(mean_D)
        transcoder.W_enc.mul_(y_scale / x_scale)
        transcoder.b_enc.mul_(y_scale)
        transcoder.b_dec_out.mul_(y_scale)
    return Trained(
        transcoder=transcoder,
        tokens=steps * BATCH,
        dead=int((~active_F).sum()),
        seconds=time.monotonic() - began,
    )


def take_step(
    transcoder: Transcoder, optimizer: torch.optim.Optimizer, x_BD: Tensor, y_BD: Tensor
) -> tuple[float, Tensor]:
    """Take a step that leaves the features' vectors of length 1; return the loss and the features.

    The part of a vector's gradient along it would only change its length, and is left out.
    """
    optimizer.zero_grad()
    loss, z_BF = transcoder.loss(x_BD, y_BD)
    loss.backward()  # type: ignore[no-untyped-call]
    vectors_FD, grad_FD = transcoder.W_dec, transcoder.W_dec.grad
    assert grad_FD is not None
    with torch.no_grad():
        grad_FD -= (grad_FD * vectors_FD).sum(-1, keepdim=True) * vectors_FD
        optimizer.step()
        vectors_FD.copy_(_unit(vectors_FD))
    return float(loss.detach()), z_BF.detach()


def _length(rows_TD: Tensor) -> float:
    """Return the root mean square of the rows' lengths; 1 for zeros."""
    return float(rows_TD.square().sum(-1).mean().sqrt()) or 1.0


def _unit(rows_FD: Tensor) -> Tensor:
    return functional.normalize(rows_FD, dim=-1)
