"""The interface of drafters, and the data that the decode loop and a drafter exchange.

Suffixes: N nodes of a tree, T tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectool.decode.options import SamplingParams
from spectool.decode.request import Request
from spectool.decode.tree import Draft, Kind

if TYPE_CHECKING:
    from spectool.decode.cache import BatchCache
    from spectool.decode.policy.base import Policy
    from spectool.decode.target.base import Target


# inject(hidden_BND, slot_BN, owner_BN) -> hidden_BND: replace the hidden states of extra rows (slot
# >= 0; a token's is -1). The owner is the node that an extra row belongs to.
Inject = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The features that a drafter needs from the target's passes; nothing else is captured.

    `layers`: outputs of these decoder layers (negative ones count from the end; -1 is the state
    before the final norm). `final`: the state after the final norm, which the lm_head reads. `top`:
    how many of the likeliest ids to return for every node; those after the prompt's tokens are
    computed when the drafter asks for them. `probs`: the probabilities after all verified nodes,
    not only the verdict. `inject`: by the index of a decoder layer, -1 for the embeddings, the
    function that replaces the hidden states of extra rows at its input.
    """

    layers: tuple[int, ...] = ()
    final: bool = False
    top: int = 0
    probs: bool = False
    inject: Mapping[int, Inject] = field(default_factory=dict)


# States by name: "layer <index as in Needs.layers>" and "final".
Features = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of verifying one request's draft. `top` and features have one row per node.

    `path` holds the nodes that entered the cache, the root first; `next_token` is the new root.
    Where the request finished, both end with its last token. `probs_NV` are the probabilities that
    the verifier used, or scores when greedy. `extra_logits_NV` are the logits of the extra rows,
    features are [N, D] each.
    """

    request: Request
    draft: Draft
    path: list[int]
    next_token: int
    probs_NV: Tensor | None = None
    extra_logits_NV: Tensor | None = None
    top: list[list[int]] = field(default_factory=list)
    features: Features = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefilledPrompt:
    """One request after the prompt pass; `request.tokens` already ends with the first new token.

    `logits_V` are those of the last prompt token. `features` [T, D] are those of the prompt's
    tokens; where the cache of the ended request `after` held a prefix, only those of the tokens
    after it. `top()` computes the likeliest ids [T][K] after these tokens: it costs a product of
    the lm_head with the whole prompt, so a drafter that does not need it should not call it.
    """

    request: Request
    logits_V: Tensor
    top: Callable[[], list[list[int]]] = list
    features: Features = field(default_factory=dict)
    after: Request | None = None


class Drafter(ABC):
    """A source of draft trees, for requests that come and go.

    `name` is its entry in the table of methods. `combines`: other drafters may add nodes to its
    trees. `can_be_cut`: policies may drop some of its nodes. `uses_target`: it needs the target
    itself (`attach`). `takes_sources`: it drafts for encoder-decoders too, whose requests have a
    source. `applies_controls`: nodes that it forces follow the request's controls. `draft_model`:
    the smaller model that it drafts with, if any. `policies` size its drafts; the engine asks them
    in this order.
    """

    name: str
    needs: Needs
    combines: bool = True
    can_be_cut: bool = True
    uses_target: bool = False
    takes_sources: bool = False
    applies_controls: bool = False
    draft_model: Target[Any] | None = None
    policies: Sequence[Policy] = ()

    @property
    def parts(self) -> Sequence[Drafter]:
        """Return the drafters that this one combines, or itself."""
        return [self]

    def check_chains(self, target: str) -> None:
        """Check that it can draft for a target of this name, whose state cannot go back.

        Raises:
            InputError: it needs uncut trees, or passes through the target's state.
        """

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        """Return the kinds of nodes proposed under `sampling`; they decide the verifier."""
        return ("deterministic",)

    def attach(self, target: Target[Any]) -> None:
        """Take the model to draft for, before any request.

        A change to the model that users should know of is added to `target.notes`.
        """

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        """Begin to draft for these requests, beside those that were added before.

        `cache` has the target's rows, the same ones as for `propose`. A pass of the drafter's own
        may write into the tail of the cache and must commit nothing. The request that a prompt
        comes `after` is removed next: what is known of their common prefix may be taken over.
        """

    def remove(self, request: Request) -> None:
        """Forget a request, also one that was never added; statistics of text may be kept."""

    @abstractmethod
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        """Return a tree per request: node 0 is its last token, no node is deeper than its budget.

        `requests` are all that were added and not removed, in the same order. Deterministic nodes
        come best first as far as that is known: any first n of them are a tree.
        """

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcomes of the drafts, in the order of the requests of `propose`."""

    def judge(self, drafts: Sequence[Draft], features: Features) -> Sequence[Tensor] | None:
        """Return the nodes [N] of each draft to accept even where the verifier does not.

        `features` [B, N, D] are those of the pass that verifies the drafts. None without a judge;
        only nodes of kind `judged` may be accepted so.
        """
        return None

    def close(self) -> None:
        """Write to disk what the user asked to keep; no request follows."""
