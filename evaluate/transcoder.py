"""A transcoder: a wide, sparse stand-in for an MLP, trained to compute what the MLP computes.

With x what goes into the MLP and y what comes out (Dunefsky et al., 2024, arXiv:2406.11944):

    z = relu(W_e (x - b_d) + b_e),   y' = W_d z + b_o,
    loss = mean over tokens of |y' - y|^2 / |y| + PENALTY sum of z,

where each feature's vector in W_d has length 1. Both terms grow with y to the first power, so that
the penalty means the same whatever the scale of y. The paper takes the mean over the D dimensions
of the squared error, with a penalty of 1.4e-4 at D = 768; here it is their sum, so that PENALTY
means the same at any width. It is trained on x - b_d and y divided by the root mean squares of
their lengths, so that the learning rate does, too; its weights are rescaled in the end. b_d is the
mean of x: b_e makes up for what it could learn. The paper trains on 60 million tokens; here the
learning rate is higher and falls in the end, and features begin as rarely active ones. Those that
die are counted, not revived.

Shapes: T tokens, B of a step, D width, F features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import read_tensors
from spectool.errors import CheckpointError, NotFinite, UsageError
from spectool.files import disk_errors, replacing
from spectool.report import SILENT, Reporter
from spectool.training import Recipe

PENALTY = 1.4e-4 * 768
# Of vectors of length 1: a number in one takes steps of RATE / D^0.5.
RATE, WARM_UP = 0.05, 0.1
BATCH = 256
# A feature that no token activates in this share of the steps, the last ones, is dead.
LATE = 0.5

FORMAT_VERSION = 1


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
        # Random features of x of length 1 are about 1 / D^0.5: a sixth of the tokens activates one.
        self.b_enc.fill_(-(len(out_D) ** -0.5))
        self.b_dec_out.copy_(out_D)

    def encode(self, x_TD: Tensor) -> Tensor:
        """Return the features [T, F] of what goes into the MLP; those above 0 are active."""
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

    The result depends on the seed alone, up to rounding.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    began = time.monotonic()
    mean_D, width = x_TD.mean(0), x_TD.shape[1]
    x_scale, y_scale = _length(x_TD - mean_D), _length(y_TD)
    transcoder = Transcoder(features, width).to(device)
    transcoder.begin(y_TD.mean(0) / y_scale, seed=seed)
    optimizer = torch.optim.Adam(transcoder.parameters(), fused=True)
    recipe = Recipe(steps=max(1, tokens // BATCH), warmup=WARM_UP)
    generator = torch.Generator().manual_seed(seed)
    late_F = torch.zeros(features, dtype=torch.bool, device=device)
    order_T, place = torch.randperm(len(x_TD), generator=generator), 0
    for step in range(recipe.steps):
        if place + BATCH > len(order_T):
            order_T, place = torch.randperm(len(x_TD), generator=generator), 0
        rows_B = order_T[place : place + BATCH]
        place += BATCH
        x_BD = ((x_TD[rows_B] - mean_D) / x_scale).to(device)
        y_BD = (y_TD[rows_B] / y_scale).to(device)
        optimizer.param_groups[0]["lr"] = RATE * width**-0.5 * recipe.share(step)
        loss, z_BF = take_step(transcoder, optimizer, x_BD, y_BD)
        if not math.isfinite(loss):
            raise NotFinite(f"the transcoder's loss is {loss} at step {step + 1}")
        if step >= (1 - LATE) * recipe.steps:
            late_F |= (z_BF > 0).any(0)
        reporter.progress(step + 1, recipe.steps, f"transcoder: loss {loss:.3f}, steps")
    with torch.no_grad():
        transcoder.b_dec.copy_(mean_D)
        transcoder.W_enc.mul_(y_scale / x_scale)
        transcoder.b_enc.mul_(y_scale)
        transcoder.b_dec_out.mul_(y_scale)
    return Trained(
        transcoder=transcoder,
        tokens=recipe.steps * BATCH,
        dead=int((~late_F).sum()),
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


def write_transcoder(path: Path, trained: Trained, made_of: Mapping[str, Any]) -> None:
    """Write a transcoder, and what it was made of, to a file that appears when it is complete."""
    record = {
        "kind": "transcoder",
        "format_version": FORMAT_VERSION,
        "made_of": dict(made_of),
        "tokens": trained.tokens,
        "dead": trained.dead,
        "seconds": trained.seconds,
    }
    tensors = {name: part.cpu() for name, part in trained.transcoder.state_dict().items()}
    with disk_errors(path), replacing(path) as temporary:
        write_safetensors(temporary, tensors, record)


def read_transcoder(path: Path, made_of: Mapping[str, Any], device: torch.device) -> Trained:
    """Read a transcoder that `write_transcoder` wrote.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
        UsageError: it was made of something else.
    """
    try:
        record = json.loads(read_header(path)[0]["spectool"])
        if record["kind"] != "transcoder" or record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: no transcoder that this version reads")
        for name, value in made_of.items():
            if record["made_of"][name] != value:
                raise UsageError(
                    f"{path}: its {name} is {record['made_of'][name]}, and this run's is {value}",
                    hint="name another file, in which this run's transcoder is kept",
                )
        tensors = read_tensors(path)
        transcoder = Transcoder(*tensors["W_enc"].shape)
        transcoder.load_state_dict(tensors)
        return Trained(
            transcoder=transcoder.to(device),
            tokens=record["tokens"],
            dead=record["dead"],
            seconds=record["seconds"],
        )
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a transcoder's file (--transcoder-file)") from error


def _length(rows_TD: Tensor) -> float:
    """Return the root mean square of the rows' lengths; 1 for zeros."""
    return float(rows_TD.square().sum(-1).mean().sqrt()) or 1.0


def _unit(rows_FD: Tensor) -> Tensor:
    return functional.normalize(rows_FD, dim=-1)
