"""What a drafter is, and what passes between it and the loop.

Suffixes: N nodes of a tree, T tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind

if TYPE_CHECKING:
    from spectool.decode.cache import TreeCache
    from spectool.decode.target import Target


# What a layer reads: states [B, N, D], what each row stands for [B, N] (-1: a token) and the node
# that it belongs to [B, N]; to the states with those of the rows beside the tree put in.
Inject = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a drafter wants of the target's passes; nothing else is captured.

    `layers`: outputs of these decoder layers (negative ones count from the end; -1 is the state
    before the final norm). `final`: the state after the final norm, which the head reads. `top`:
    the ids of the that many likeliest tokens after every node; those after every prompt token are
    computed when the drafter asks for them.
    `probs`: the laws of all verified nodes, not only the verdict. `inject`: what rows beside a
    tree's nodes are at the input of a decoder layer, by its index, -1 for the embeddings.
    """

    layers: tuple[int, ...] = ()
    final: bool = False
    top: int = 0
    probs: bool = False
    inject: Mapping[int, Inject] = field(default_factory=dict)


# By "layer <index as asked>" and "final".
Features = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one row's draft. Features are [N, D] each, one row per node, as is `top`.

    `path` holds the nodes that entered the cache, the root first; `next_token` is the new root.
    Where the row finished, both end with it. `probs_NV` are what the rule judged by: scores when
    greedy. `extra_logits_NV` are the logits of the rows beside the tree.
    """

    row: Request
    draft: Draft
    path: list[int]
    next_token: int
    probs_NV: Tensor | None = None
    extra_logits_NV: Tensor | None = None
    top: list[list[int]] = field(default_factory=list)
    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefilledPrompt:
    """One row after the prompt pass; `row.tokens` already ends with the first new token.

    `logits_V` are those of the last prompt token, `features` [T, D] those of all its tokens, the
    last ones where others were found in a kept cache and not passed again. `top()` computes the
    likeliest ids [T][K] after these: the output matrix reads a whole prompt for that, which a text
    that ends with its first token never needs.
    """

    row: Request
    logits_V: Tensor
    top: Callable[[], list[list[int]]] = list
    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Texts that trained drafters learn from: tokens [B, L] and features [B, L, D] of them all.

    `loss_mask_BL` marks the tokens whose prediction counts; padding at the right never does. Where
    rows hold several texts, `segments_BL` says by numbers which token is of which, padding apart.
    `beside` passes rows beside the texts: `Target.read_extra_rows` of these, for drafters that
    inject some.
    """

    tokens_BL: Tensor
    loss_mask_BL: Tensor
    features: Features
    segments_BL: Tensor | None = None
    beside: Callable[..., Tensor] | None = None


class Drafter(Protocol):
    """Proposes trees of tokens. One object serves many batches, one batch at a time.

    `name` is its row in the table of methods. `combines`: it bears that other drafters add nodes to
    its trees, or tuning leaves some out.
    """

    name: str
    needs: Needs
    combines: bool = True

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        """The kinds of nodes it proposes under these settings; the rule is chosen by them."""

    def attach(self, target: Target) -> None:
        """The model that it will draft for, before any batch. What changes may go to its notes."""

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        """A new batch. What it holds of earlier ones it may keep only as knowledge of text.

        `cache` has the target's rows, those of `propose` then; a pass of the drafter's own may
        write into its tail and must commit nothing.
        """

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        """A tree per row whose node 0 is the row's last token; none deeper than its budget.

        Rows are those of `begin` that are unfinished, in the same order. Deterministic nodes
        stand best first as far as that is known: any beginning of them is a tree.
        """

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the drafts, in the order of the rows proposed for."""

    def close(self) -> None:
        """No more batches: keep on disk what was asked to be kept."""
