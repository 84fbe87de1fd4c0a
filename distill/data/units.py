"""Lexical units: runs of tokens of which a model is sure, and the rows that they are learnt in.

A row holds a text and, behind it, the placeholders of its units. A unit of n tokens has n - 1
placeholders, at the positions of its first n - 1 tokens. Each sees the text before the unit and the
unit's placeholders up to itself, so one pass computes what a pass for each unit would.

Shapes: B texts, L tokens of a row, placeholders included, R places whose logits are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The place of a unit's first token in its text, and its number of tokens, two or more.
Unit = tuple[int, int]


@dataclass(frozen=True, slots=True)
class UnitText:
    """A text in training and its units."""

    tokens: list[int]
    loss_mask: list[bool]
    units: list[Unit]

    @property
    def size(self) -> int:
        """Return the number of tokens that pass through the model."""
        return len(self.tokens) + sum(size - 1 for _, size in self.units)


def find_units(sure: Sequence[bool], longest: int) -> list[Unit]:
    """Return the maximal runs of sure tokens, cut into units of `longest` tokens from their start.

    A single token is no unit.
    """
    units, at = [], 0
    for is_sure, run in itertools.groupby(sure):
        end = at + len(list(run))
        if is_sure:
            sizes = [(start, min(longest, end - start)) for start in range(at, end, longest)]
            units += [(start, size) for start, size in sizes if size > 1]
        at = end
    return units


def most_placeholders(length: int, longest: int) -> int:
    """Return how many placeholders a text of `length` tokens has at most."""
    units, rest = divmod(max(0, length - 1), longest)
    return units * (longest - 1) + max(0, rest - 1)


def as_tensors(found: Sequence[Sequence[Unit]]) -> dict[str, Tensor]:
    """Concatenate the units of texts into tensors of starts, sizes, and counts by text."""
    units = [unit for of_text in found for unit in of_text]
    return {
        "starts": torch.tensor([start for start, _ in units], dtype=torch.int32),
        "sizes": torch.tensor([size for _, size in units], dtype=torch.int32),
        "counts": torch.tensor([len(of_text) for of_text in found], dtype=torch.int32),
    }


def as_units(tensors: Mapping[str, Tensor]) -> list[list[Unit]]:
    """Split the tensors of `as_tensors` into the units of each text."""
    units = zip(tensors["starts"].tolist(), tensors["sizes"].tolist(), strict=True)
    return [list(itertools.islice(units, count)) for count in tensors["counts"].tolist()]


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of a pass: tokens, positions [B, L] and what each token sees [B, L, L].

    The logits at `unit_rows` predict the tokens of units, `unit_labels_R`; those at `text_rows` the
    text's tokens in the loss, `text_labels_R`.
    """

    tokens_BL: Tensor
    positions_BL: Tensor
    visible_BLL: Tensor
    unit_rows: tuple[Tensor, Tensor]
    unit_labels_R: Tensor
    text_rows: tuple[Tensor, Tensor]
    text_labels_R: Tensor


def lay_out(texts: Sequence[UnitText], placeholder: int) -> Layout:
    """Lay out each text and the placeholders of its units, padded at the right."""
    longest = max(text.size for text in texts)
    tokens_BL = torch.full((len(texts), longest), placeholder)
    positions_BL = torch.zeros_like(tokens_BL)
    # Padding sees itself: a row without anything to see would be NaN.
    visible_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(texts), 1, 1)
    unit_at: list[tuple[int, int, int]] = []
    text_at: list[tuple[int, int, int]] = []
    for b, text in enumerate(texts):
        length = end = len(text.tokens)
        tokens_BL[b, :length] = torch.tensor(text.tokens)
        positions_BL[b, :length] = torch.arange(length)
        visible_BLL[b, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
        pairs = enumerate(zip(text.tokens[1:], text.loss_mask[1:], strict=True))
        text_at += [(b, at, token) for at, (token, is_taught) in pairs if is_taught]
        for start, size in text.units:
            at, end = end, end + size - 1
            positions_BL[b, at:end] = torch.arange(start, start + size - 1)
            visible_BLL[b, at:end, :start] = True
            visible_BLL[b, at:end, at:end] = torch.ones(size - 1, size - 1, dtype=torch.bool).tril()
            labels = text.tokens[start : start + size]
            unit_at += zip([b] * size, [start - 1, *range(at, end)], labels, strict=True)
    unit_R3, text_R3 = (torch.tensor(at, dtype=torch.long).view(-1, 3) for at in (unit_at, text_at))
    return Layout(
        tokens_BL,
        positions_BL,
        visible_BLL,
        (unit_R3[:, 0], unit_R3[:, 1]),
        unit_R3[:, 2],
        (text_R3[:, 0], text_R3[:, 1]),
        text_R3[:, 2],
    )
