"""Rows of consistency distillation: a clean text and noisy versions of its blocks in one pass.

A row holds the prompt, the clean text, the anchor and the noisy versions of the text, each made of
a point of every block's trajectory, and each at the positions after the prompt. Shapes: B rows, P
tokens of a prompt, T of a text, A of an anchor, N versions, L = P + T + A + N T of a row, R places
whose logits are used.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NoisyRow:
    """A text in training: prompt, clean text, and noisy versions of equal length.

    Noisy blocks of one version see each other within its window, `windows` blocks. `labels` are
    learnt in the term of -log p: after the tokens of `anchor`, or of the text without one.
    """

    prompt: list[int]
    text: list[int]
    noisy: list[list[int]]
    windows: list[int]
    labels: list[int]
    anchor: list[int] = field(default_factory=list)

    @property
    def plain_size(self) -> int:
        """Return the number of tokens before the noisy ones."""
        return len(self.prompt) + len(self.text) + len(self.anchor)

    @property
    def size(self) -> int:
        """Return the number of tokens that pass through the model."""
        return self.plain_size + len(self.noisy) * len(self.text)


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
    prompt, the clean text and the anchor, which are among the first `plain` columns; at
    `noisy_rows` the model learns what it predicts at `clean_rows`. `distances_R` counts the tokens
    of the block from the first wrong one of its window on: 1 at that one itself, and at the first
    token of a block after it.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    visible_BLL: Tensor
    plain: int
    label_rows: tuple[Tensor, Tensor]
    labels_R: Tensor
    noisy_rows: tuple[Tensor, Tensor]
    clean_rows: tuple[Tensor, Tensor]
    distances_R: Tensor
    plain_rows: tuple[Tensor, Tensor]


def lay_out(rows: Sequence[NoisyRow], block: int) -> Layout:
    """Lay out prompt, clean text, anchor and noisy versions of each row, padded at the right."""
    longest = max(row.size for row in rows)
    tokens_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    positions_BL = torch.zeros_like(tokens_BL)
    # Padding sees itself: a row without anything to see would be NaN.
    visible_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    label_at, noisy_at, clean_at, plain_at, distances = [], [], [], [], []
    for b, row in enumerate(rows):
        size, length, anchored = len(row.prompt), len(row.text), len(row.anchor)
        whole, plain = size + length, row.plain_size
        noisy = itertools.chain.from_iterable(row.noisy)
        tokens_BL[b, : row.size] = torch.tensor([*row.prompt, *row.text, *row.anchor, *noisy])
        positions_BL[b, :whole] = torch.arange(whole)
        visible_BLL[b, :whole, :whole] = torch.ones(whole, whole, dtype=torch.bool).tril()
        labelled = torch.arange(size - 1, whole - 1)
        if row.anchor:
            positions_BL[b, whole:plain] = torch.arange(size, size + anchored)
            visible_BLL[b, whole:plain, :size] = True
            visible_BLL[b, whole:plain, whole:plain] = torch.ones(anchored, anchored).tril() > 0
            labelled = torch.cat([labelled[:1], torch.arange(whole, plain - 1)])
        label_at.append((b, labelled))
        plain_at.append((b, torch.arange(plain)))
        starts = range(plain, row.size, length)
        for start, noisy_T, window in zip(starts, row.noisy, row.windows, strict=True):
            end = start + length
            positions_BL[b, start:end] = torch.arange(size, whole)
            window_T = torch.arange(length) // (block * window)
            same_TT = (window_T[:, None] == window_T).tril()
            visible_BLL[b, start:end, :size] = True
            visible_BLL[b, start:end, size:whole] = window_T[:, None] > window_T
            visible_BLL[b, start:end, start:end] = same_TT
            distance_T = _count_after_wrong(noisy_T, row.text, same_TT, block)
            # The last token of a text has no successor.
            (learnt,) = distance_T[:-1].nonzero(as_tuple=True)
            clean_at.append((b, size + learnt))
            noisy_at.append((b, start + learnt))
            distances.append(distance_T[learnt])
    return Layout(
        tokens_BL,
        positions_BL,
        visible_BLL,
        max(row.plain_size for row in rows),
        _indices(label_at),
        torch.tensor([label for row in rows for label in row.labels]),
        _indices(noisy_at),
        _indices(clean_at),
        torch.cat(distances),
        _indices(plain_at),
    )


def _count_after_wrong(
    noisy: Sequence[int], text: Sequence[int], same_TT: Tensor, block: int
) -> Tensor:
    """Count the tokens [T] of a token's block from the first wrong one on that its window has.

    It is 0 where none is wrong up to there: what follows does not differ from the clean text.
    """
    wrong_T = torch.tensor(noisy) != torch.tensor(text)
    after_T = (same_TT & wrong_T).any(-1)
    block_T = torch.arange(len(text)) // block
    return ((block_T[:, None] == block_T).tril() & after_T).sum(-1)


def _indices(places: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return batch and column indices of places by row."""
    batch = torch.cat([torch.full_like(at, b) for b, at in places])
    return batch, torch.cat([at for _, at in places])
