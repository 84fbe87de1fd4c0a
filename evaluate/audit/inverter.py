"""A small network that guesses the tokens of a prompt from what an observer sees.

Shapes: N prompts, P tokens of each, F numbers seen of each, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectool.report import SILENT, Reporter

# Width of the network, and of what it says of one token.
HIDDEN, TOKEN = 512, 128
BATCH, LEARNING_RATE = 64, 1e-3


@dataclass(frozen=True, slots=True)
class Guesses:
    """Right guesses of the held-out prompts' tokens, [N, P].

    `frequent_NP`: which are the training prompts' most frequent token at their place.
    """

    right_NP: Tensor
    frequent_NP: Tensor


class Inverter(nn.Module):
    """One hidden layer over all that is seen, then a vector for each token of the prompt."""

    def __init__(self, seen: int, num_tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.read = nn.Sequential(nn.Linear(seen, HIDDEN), nn.GELU(), nn.Dropout(0.1))
        self.place = nn.Linear(HIDDEN, num_tokens * TOKEN)
        self.tell = nn.Linear(TOKEN, vocabulary)

    def forward(self, seen_NF: Tensor) -> Tensor:
        """Return logits [N, P, V] of the prompt's tokens."""
        vectors_NPH = self.place(self.read(seen_NF)).view(len(seen_NF), self.num_tokens, TOKEN)
        logits: Tensor = self.tell(functional.gelu(vectors_NPH))
        return logits


def invert(
    seen_NF: Tensor,
    prompts_NP: Tensor,
    num_train: int,
    *,
    steps: int,
    seed: int,
    shuffled: bool = False,
    reporter: Reporter = SILENT,
) -> Guesses:
    """Train an inverter on the first `num_train` prompts, and let it guess the others.

    `shuffled`: it learns from prompts that do not belong to what it sees, as a control.
    """
    # Tokens by their number among those that occur: the output layer is the largest part.
    known, flat = torch.unique(prompts_NP, return_inverse=True)
    targets_NP = flat.view_as(prompts_NP)
    train_NP, held_NP = targets_NP[:num_train], targets_NP[num_train:]
    generator = torch.Generator().manual_seed(seed)
    if shuffled:
        train_NP = train_NP[torch.randperm(num_train, generator=generator)]
    mean_F, spread_F = seen_NF[:num_train].mean(0), seen_NF[:num_train].std(0) + 1e-6
    seen_NF = (seen_NF - mean_F) / spread_F
    # Initialisation and dropout draw from the global state, which is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = Inverter(seen_NF.shape[1], prompts_NP.shape[1], len(known))
        optimizer = torch.optim.AdamW(inverter.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(1, steps + 1):
            rows = torch.randint(num_train, (BATCH,), generator=generator)
            logits_NPV = inverter(seen_NF[rows])
            loss = functional.cross_entropy(logits_NPV.flatten(0, 1), train_NP[rows].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            reporter.progress(step, steps, "steps of the inverter")
    inverter.eval()
    with torch.inference_mode():
        guessed_NP = inverter(seen_NF[num_train:]).argmax(-1)
    frequent_P = torch.stack([column_N.bincount().argmax() for column_N in train_NP.T])
    return Guesses(guessed_NP == held_NP, held_NP == frequent_P)
