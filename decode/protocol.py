"""What a drafter is, and what passes between it and the loop.

Suffixes: N nodes of a tree, T tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from spectool.decode.row import Row
from spectool.decode.sampling import Control
from spectool.decode.tree import Draft, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a drafter wants of the target's passes; nothing else is captured.

    `layers`: outputs of these decoder layers (negative ones count from the end; -1 is the state
    before the final norm). `final`: the state after the final norm, which the head reads.
    `logits`: the logits of all verified nodes, not only the verdict.
    """

    layers: tuple[int, ...] = ()
    final: bool = False
    logits: bool = False


# By "layer <index as asked>" and "final".
Features = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one row's draft. Features are [N, D] each, one row per node.

    `path` holds the nodes that entered the cache, the root first; `next_token` is the new root.
    Where the row finished, both end with it.
    """

    row: Row
    draft: Draft
    path: list[int]
    next_token: int
    logits_NV: Tensor | None = None
    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row after the prompt pass; `row.tokens` already ends with the first new token.

    `logits_V` are those of the last prompt token, `features` [T, D] of all its tokens. Tokens
    found in a kept cache were not passed again and have none.
    """

    row: Row
    logits_V: Tensor
    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Texts that trained drafters learn from: tokens [B, L] and features [B, L, D] of them all.

    `taught_BL` marks the tokens whose prediction counts; padding at the right never does.
    """

    tokens_BL: Tensor
    taught_BL: Tensor
    features: Features


class Drafter(Protocol):
    """Proposes trees of tokens. One object serves many batches, one batch at a time.

    `name` is its row in the table of methods. `branches`: whether its nodes may have siblings.
    """

    name: str
    needs: Needs
    branches: bool

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        """The kinds of nodes it proposes under these settings; the rule is chosen by them."""

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """A new batch. What it holds of earlier ones it may keep only as knowledge of text."""

    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        """A tree per row whose node 0 is the row's last token; none deeper than its budget.

        Rows are those of `begin` that are unfinished, in the same order.
        """

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the drafts, in the order of the rows proposed for."""
