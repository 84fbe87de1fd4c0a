"""Rows of consistency distillation: a clean text and its noisy blocks in one pass.

A row holds the prompt, the clean text, a point of each block's trajectory, and the anchor, each at
the positions after the prompt. Shapes: B rows, P tokens of a prompt, T of a text, A of an anchor,
L = P + 2 T + A of a row, R places whose logits are used.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NoisyRow:
    """A text in training: prompt, clean text, and the noisy blocks, of equal length to the text.

    Noisy blocks of one `window`, a number of blocks, see each other. `labels` are learnt in the
    term of -log p: after the tokens of `anchor`, or of the text without one.
    """

    prompt: list[int]
    text: list[int]
    noisy: list[int]
    window: int
    labels: list[int]
    anchor: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Return the number of tokens that pass through the model."""
        return len(self.prompt) + 2 * len(self.text) + len(self.anchor)


def noise(point: Sequence[int], fixed: Sequence[int]) -> float:
    """Return the share of a point that is not yet settled: from its first wrong token on."""
    wrong = (at for at, pair in enumerate(zip(point, fixed, strict=True)) if pair[0] != pair[1])
    return 1 - next(wrong, len(fixed)) / len(fixed)


def correct_half(point: Sequence[int], fixed: Sequence[int], rng: random.Random) -> list[int]:
    """Return a point with half of its wrong tokens corrected, but never the first one."""
    wrong = [at for at, (a, b) in enumerate(zip(point, fixed, strict=True)) if a != b]
    chosen = set(rng.sample(wrong[1:], len(wrong[1:]) // 2))
    return [fixed[at] if at in chosen else token for at, token in enumerate(point)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of a pass: tokens, positions [B, L] and what each token sees [B, L, L].

    `label_rows` are the places whose logits predict `labels_R`, `plain_rows` all places of the
    prompt, the clean text and the anchor; at `noisy_rows` the model learns what it predicts at
    `clean_rows`.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    visible_BLL: Tensor
    label_rows: tuple[Tensor, Tensor]
    labels_R: Tensor
    noisy_rows: tuple[Tensor, Tensor]
    clean_rows: tuple[Tensor, Tensor]
    plain_rows: tuple[Tensor, Tensor]


def lay_out(rows: Sequence[NoisyRow], block: int) -> Layout:
    """Lay out prompt, clean text, noisy blocks and anchor of each row, padded at the right."""
    longest = max(row.size for row in rows)
    tokens_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    positions_BL = torch.zeros_like(tokens_BL)
    # Padding sees itself: a row without anything to see would be NaN.
    visible_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    label_at, noisy_at, clean_at, plain_at = [], [], [], []
    for b, row in enumerate(rows):
        size, length = len(row.prompt), len(row.text)
        whole, end = size + length, size + 2 * length
        tokens_BL[b, : row.size] = torch.tensor([*row.prompt, *row.text, *row.noisy, *row.anchor])
        positions_BL[b, :whole] = torch.arange(whole)
        positions_BL[b, whole:end] = torch.arange(size, whole)
        visible_BLL[b, :whole, :whole] = torch.ones(whole, whole, dtype=torch.bool).tril()
        window_T = torch.arange(length) // (block * row.window)
        visible_BLL[b, whole:end, :size] = True
        visible_BLL[b, whole:end, size:whole] = window_T[:, None] > window_T
        same_TT = window_T[:, None] == window_T
        visible_BLL[b, whole:end, whole:end] = same_TT.tril()
        # What follows a wrong token of its window differs from the clean text; the last token
        # of a text has no successor.
        wrong_T = torch.tensor(row.noisy) != torch.tensor(row.text)
        after_T = (same_TT.tril() & wrong_T).any(-1)
        after_T[-1] = False
        (learnt,) = after_T.nonzero(as_tuple=True)
        labelled = torch.arange(size - 1, whole - 1)
        if row.anchor:
            count = len(row.anchor)
            positions_BL[b, end : row.size] = torch.arange(size, size + count)
            visible_BLL[b, end : row.size, :size] = True
            visible_BLL[b, end : row.size, end : row.size] = torch.ones(count, count).tril() > 0
            labelled = torch.cat([labelled[:1], torch.arange(end, row.size - 1)])
        label_at.append((b, labelled))
        plain_at.append((b, torch.cat([torch.arange(whole), torch.arange(end, row.size)])))
        clean_at.append((b, size + learnt))
        noisy_at.append((b, whole + learnt))
    return Layout(
        tokens_BL,
        positions_BL,
        visible_BLL,
        _indices(label_at),
        torch.tensor([label for row in rows for label in row.labels]),
        _indices(noisy_at),
        _indices(clean_at),
        _indices(plain_at),
    )


def _indices(places: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return batch and column indices of places by row."""
    batch = torch.cat([torch.full_like(at, b) for b, at in places])
    return batch, torch.cat([at for _, at in places])
