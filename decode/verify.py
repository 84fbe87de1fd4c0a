"""Verifiers: which drafted nodes are accepted, and which token follows.

A verifier is a function of (draft, target probabilities, source of randomness). It decides for all
nodes at once, on the device of the probabilities: whether a node is accepted should its parent be
reached, and which token is emitted should the path end at a node. `walk` then reads path and next
token on the host, so a step costs one transfer whatever the verifier. Suffixes: N nodes, M nodes
with children, A of these the ones with a child left to test, V vocabulary.

Lossless is a property of the pair (kinds of nodes, verifier): see `choose_verifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool import methods
from spectool.decode.sampling import StepRandom
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decisions of a verifier about all nodes of a draft.

    `emit_N`: the token after the path that ends at a node. `accept_N`: whether a node is accepted
    if its parent was reached (always true for the root); None where a node is accepted when it
    equals its parent's `emit_N`.
    """

    emit_N: Tensor
    accept_N: Tensor | None = None


Verifier = Callable[[Draft, Tensor, StepRandom], Verdict]


def greedy(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Accept the child equal to the most likely token (Stern et al. 2018). Takes scores too."""
    return Verdict(probs_NV.argmax(-1))


def token_match(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Draw the target's own token once per node and accept the child that equals it.

    Exact for every draft: the emitted token is the target's draw, whatever was proposed. With the
    draws of `sampling.StepDraws` the text even equals that of plain sampling under the same seed.
    """
    return Verdict(rng.pick(probs_NV, draft.depths))


def rejection(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Test a node's children in the order drawn, each against the residual that earlier ones left.

    A child x drawn from q is accepted with min(1, r(x)/q(x)); where it is rejected, r becomes
    Norm[r - q]+. r starts as the target's distribution; when all children are rejected, the token
    is emitted from r. One child: Leviathan et al. 2023, Chen et al. 2023. Independent children:
    Miao et al. 2023, Yang et al. 2024. Distinct ones, each drawn from q without its predecessors:
    recursive rejection, Jeon et al. 2024 (arXiv:2402.14160), algorithm 1. A deterministic child has
    a one-hot q.
    """
    siblings = _Siblings.of(draft, probs_NV.device)
    r_MV, q_MV = probs_NV[siblings.parents], _proposal_probs(draft, siblings.parents, probs_NV)
    for draw, at, drawn in siblings.rounds():
        r_AV, q_AV = r_MV[at], q_MV[at]
        token_A1 = _node_tokens(draft, drawn, probs_NV.device)[:, None]
        fixed = [a for a, node in enumerate(drawn) if draft.kinds[node] == "deterministic"]
        if fixed:
            q_AV[fixed] = torch.zeros_like(q_AV[fixed]).scatter_(1, token_A1[fixed], 1.0)
        p_A, q_A = r_AV.gather(1, token_A1)[:, 0], q_AV.gather(1, token_A1)[:, 0]
        siblings.accept(at, drawn, rng.below(p_A, q_A, [draft.depths[n] for n in drawn], draw))
        rest_AV = (r_AV - q_AV).clamp_(min=0)
        # A residual that rounds to zero everywhere means r = q: r stays.
        sum_A1 = rest_AV.sum(-1, keepdim=True)
        r_MV[at] = torch.where(sum_A1 > 0, rest_AV / sum_A1, r_AV)
        # Distinct siblings: q without the token just tested, renormalised.
        once = [a for a, node in enumerate(drawn) if draft.kinds[node] == "distinct"]
        if once:
            left_AV = q_AV[once].scatter_(1, token_A1[once], 0.0)
            left_AV /= left_AV.sum(-1, keepdim=True).clamp_(min=torch.finfo(left_AV.dtype).tiny)
            q_MV[[at[a] for a in once]] = left_AV
    emit_NV = probs_NV.index_copy(0, siblings.parents, r_MV)
    return Verdict(rng.pick(emit_NV, draft.depths), siblings.accept_mask(len(draft)))


# Bisection steps for K-SEQ's rho: 2**-30 of it is below the resolution of fp32 probabilities.
_BISECTIONS = 30


def k_seq(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Test k independent children in turn, each with min(1, p(x) / (rho q(x))).

    Sun et al., SpecTr, 2023 (arXiv:2310.15141): rho in [1, k] is the root of 1 - (1 - b)^k = rho b
    with b = sum min(q, p / rho), found by bisection. Where all children are rejected, emit from
    Norm[p - min(q, p / rho) P / b]+ with P = 1 - (1 - b)^k.
    """
    siblings = _Siblings.of(draft, probs_NV.device)
    p_MV = probs_NV[siblings.parents].double()
    q_MV = _proposal_probs(draft, siblings.parents, probs_NV).double()
    k_M = torch.tensor(
        [len(drawn) for drawn in siblings.children], dtype=torch.float64, device=probs_NV.device
    )
    low_M, high_M = torch.ones_like(k_M), k_M.clone()
    for _ in range(_BISECTIONS):
        rho_M = (low_M + high_M) / 2
        share_M = torch.minimum(q_MV, p_MV / rho_M[:, None]).sum(-1)
        too_low_M = 1 - (1 - share_M) ** k_M > rho_M * share_M
        low_M = torch.where(too_low_M, rho_M, low_M)
        high_M = torch.where(too_low_M, high_M, rho_M)
    # The upper end of the bracket: there the residual is nowhere negative.
    kept_MV = torch.minimum(q_MV, p_MV / high_M[:, None])
    share_M = kept_MV.sum(-1)
    for draw, at, drawn in siblings.rounds():
        token_A1 = _node_tokens(draft, drawn, probs_NV.device)[:, None]
        p_A, q_A = p_MV[at].gather(1, token_A1)[:, 0], q_MV[at].gather(1, token_A1)[:, 0]
        depths = [draft.depths[node] for node in drawn]
        siblings.accept(at, drawn, rng.below(p_A, high_M[at] * q_A, depths, draw))
    # P, the probability that any child is accepted.
    all_M = 1 - (1 - share_M) ** k_M
    rest_MV = (p_MV - kept_MV * (all_M / share_M.clamp(min=1e-300))[:, None]).clamp_(min=0)
    rest_MV = torch.where(rest_MV.sum(-1, keepdim=True) > 0, rest_MV, p_MV)
    emit_NV = probs_NV.index_copy(0, siblings.parents, rest_MV.to(probs_NV.dtype))
    return Verdict(rng.pick(emit_NV, draft.depths), siblings.accept_mask(len(draft)))


# Medusa's epsilon and delta: a token is accepted above this probability, or above this share of
# exp(-entropy).
_EPSILON, _DELTA = 0.09, 0.3


def typical(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Accept a node that is likely enough for the target: p(x) > min(0.09, 0.3 exp(-H(p))).

    Cai et al., Medusa, 2024 (arXiv:2401.10774), section 2.3.1. Changes the distribution of the
    text.
    """
    entropy_N = torch.special.entr(probs_NV).sum(-1)
    bound_N = (_DELTA * (-entropy_N).exp()).clamp_(max=_EPSILON)
    nodes = list(range(1, len(draft)))
    token_N = _node_tokens(draft, nodes, probs_NV.device)
    above = draft.parents[1:]
    passes_N = probs_NV[above, token_N] > bound_N[above]
    accept_N = torch.cat([passes_N.new_ones(1), passes_N])
    return Verdict(rng.pick(probs_NV, draft.depths), accept_N)


def accept_judged(draft: Draft, verdict: Verdict, judged_N: Tensor) -> Verdict:
    """Accept, besides what a verifier accepts, the nodes that a judge accepts."""
    accept_N = verdict.accept_N
    if accept_N is None:
        nodes = list(range(1, len(draft)))
        token_N = _node_tokens(draft, nodes, verdict.emit_N.device)
        equal_N = token_N == verdict.emit_N[draft.parents[1:]]
        accept_N = torch.cat([equal_N.new_ones(1), equal_N])
    return Verdict(verdict.emit_N, accept_N | judged_N)


@dataclass(slots=True)
class _Siblings:
    """The nodes with children, their children as drawn, and the accepted child of each so far.

    `chosen_M` is 0 where no child was accepted yet: the root is the child of no node.
    """

    parents: Tensor
    children: list[list[int]]
    chosen_M: Tensor

    @classmethod
    def of(cls, draft: Draft, device: torch.device) -> _Siblings:
        """List the nodes of a draft that have children."""
        drawn = draft.drawn()
        parents = torch.tensor(list(drawn), dtype=torch.long, device=device)
        return cls(parents, list(drawn.values()), torch.zeros_like(parents))

    def rounds(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yield each draw's number, the indices (of M) of its parents, and its children."""
        for draw in range(max(map(len, self.children), default=0)):
            at = [m for m, drawn in enumerate(self.children) if draw < len(drawn)]
            yield draw, at, [self.children[m][draw] for m in at]

    def accept(self, at: list[int], drawn: list[int], passes_A: Tensor) -> None:
        """Accept the children that pass their test where no earlier sibling was accepted."""
        node_A = torch.tensor(drawn, device=passes_A.device)
        free_A = passes_A & (self.chosen_M[at] == 0)
        self.chosen_M[at] = torch.where(free_A, node_A, self.chosen_M[at])

    def accept_mask(self, num_nodes: int) -> Tensor:
        """Return which nodes are accepted if their parent was reached, [N]."""
        accept_N = torch.zeros(num_nodes, dtype=torch.bool, device=self.chosen_M.device)
        accept_N[self.chosen_M] = True
        accept_N[0] = True
        return accept_N


def _proposal_probs(draft: Draft, parents: Tensor, probs_NV: Tensor) -> Tensor:
    """Return the probabilities [M, V] that the children of these nodes were drawn from.

    Rows are zero for nodes whose children were not drawn.
    """
    if draft.probs_NV is None:
        return torch.zeros_like(probs_NV[parents])
    q_NV = torch.zeros_like(probs_NV)
    q_NV[: len(draft.probs_NV)] = draft.probs_NV
    return q_NV[parents]


def _node_tokens(draft: Draft, nodes: Sequence[int], device: torch.device) -> Tensor:
    """Return the tokens of these nodes as a tensor."""
    return torch.tensor([draft.tokens[node] for node in nodes], dtype=torch.long, device=device)


def walk(draft: Draft, emit: Sequence[int], accept: Sequence[int] | None) -> tuple[list[int], int]:
    """Return the longest path of accepted nodes, the root first, and the token that follows.

    The earlier sibling wins ties. Exact verifiers accept at most one of several siblings.
    """
    below, longest = [0] * len(draft), [0] * len(draft)
    for child in range(len(draft) - 1, 0, -1):
        parent = draft.parents[child]
        accepted = accept[child] if accept is not None else draft.tokens[child] == emit[parent]
        accepted = accepted or draft.kinds[child] == "forced"
        if accepted and longest[child] + 1 >= longest[parent]:
            below[parent], longest[parent] = child, longest[child] + 1
    node, path = 0, [0]
    while below[node]:
        node = below[node]
        path.append(node)
    return path, emit[node]


def resolve_paths(
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict],
    extra: Tensor | None = None,
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Return each request's path and next token, and the integers of `extra`, a flat tensor.

    Costs one transfer to the host.
    """
    flat = [verdict.emit_N for verdict in verdicts]
    flat += [verdict.accept_N.long() for verdict in verdicts if verdict.accept_N is not None]
    num_verdicts = sum(map(len, flat))
    values = torch.cat(flat if extra is None else [*flat, extra]).tolist()
    resolved, start, tests = [], 0, sum(len(draft) for draft in drafts)
    for draft, verdict in zip(drafts, verdicts, strict=True):
        emit, accept = values[start : start + len(draft)], None
        start += len(draft)
        if verdict.accept_N is not None:
            accept = values[tests : tests + len(draft)]
            tests += len(draft)
        resolved.append(walk(draft, emit, accept))
    return resolved, values[num_verdicts:]


# Kinds of nodes for which a verifier keeps the target's distribution at temperatures above 0.
_EXACT: dict[str, set[Kind]] = {
    "greedy": set(),
    "token-match": {"deterministic", "iid", "distinct"},
    "rejection": {"deterministic", "iid", "distinct"},
    "k-seq": {"iid"},
    "typical": set(),
}


@dataclass(frozen=True, slots=True)
class Verification:
    """A chosen verifier, and whether it keeps the target's distribution for this drafter."""

    name: str
    verifier: Verifier
    lossless: bool


GREEDY = Verification("greedy", greedy, True)


def choose_verifier(
    kinds: Collection[Kind], name: str | None, *, temperature: float, lossy: bool
) -> Verification:
    """Choose the verifier for drafts of these kinds; the best exact one if no name is given.

    At temperature 0 every verifier is the greedy one, which is exact unless nodes are forced or
    judged.

    Raises:
        UsageError: no such verifier, or an inexact pair without `lossy`.
    """
    if name is not None:
        methods.get_method(name, "verifier")
    if "forced" in kinds and not lossy:
        raise UsageError(
            "the drafter accepts some of its tokens untested, which changes the text",
            hint="leave its cap or beta out, or add --lossy",
        )
    if "judged" in kinds and not lossy:
        raise UsageError(
            "the judge head accepts tokens that the target would not choose, which changes the "
            "text",
            hint="leave judge out, or add --lossy",
        )
    if temperature == 0:
        return Verification("greedy", greedy, not {"forced", "judged"} & set(kinds))
    if name is None:
        # On deterministic nodes both accept as much, and token-match keeps the plain sampled text.
        name = "rejection" if set(kinds) - {"deterministic", "forced"} else "token-match"
    if name == "k-seq" and set(kinds) - {"iid"}:
        raise UsageError(
            "--verify k-seq needs nodes drawn independently, and this drafter proposes others",
            hint="leave --verify out for an exact verifier",
        )
    lossless = set(kinds) <= _EXACT[name] and bool(_EXACT[name])
    if not lossless and not lossy:
        drawn = " and ".join(sorted(kinds)) or "no"
        raise UsageError(
            f"--verify {name} changes the distribution of the text for {drawn} drafts at "
            f"temperature {temperature:g}",
            hint="leave --verify out for an exact verifier, or add --lossy",
        )
    return Verification(name, methods.import_method(name, "verifier"), lossless)
