"""Calibration text: sequences of token ids drawn from it.

Shapes: S sequences, L tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectool.errors import TextError


def sample_sequences(
    ids: list[int],
    *,
    samples: int,
    length: int,
    bos: int | None,
    generator: torch.Generator,
    option: str = "--calibration",
) -> Tensor:
    """Draw sequences [S, L] of token ids from a text, each from a random position of its S-th.

    Every part of a mixed text is thus sampled in proportion, and no token is drawn twice. S is
    `samples`, or as many as the text holds. `option` is what the error message names.

    Raises:
        TextError: the text is shorter than one sequence.
    """
    # Models expect a start token where the tokenizer has one; statistics without it differ.
    inside = length - (bos is not None)
    if len(ids) < inside:
        raise TextError(
            f"the text of {option} has {len(ids)} tokens, fewer than one sequence of {length}",
            hint="more text, or a smaller --seq-len",
        )
    samples = max(1, min(samples, len(ids) // inside))
    edges = [part * len(ids) // samples for part in range(samples + 1)]
    shares = torch.rand(samples, generator=generator).tolist()
    starts = [
        start + int(share * (end - start - inside + 1))
        for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True)
    ]
    # In random order: some methods use only the first sequences for a statistic.
    order = torch.randperm(samples, generator=generator).tolist()
    text = torch.tensor(ids)
    ids_SL = torch.stack([text[starts[part] : starts[part] + inside] for part in order])
    if bos is None:
        return ids_SL
    return torch.cat([torch.full((samples, 1), bos), ids_SL], 1)
