"""Verification rules: which drafted nodes stand, and which token follows.

A rule is a function of (draft, target laws, source of randomness). It decides for all nodes at
once, on the laws' device: whether a node stands should its parent be reached, and which token is
emitted should the path end at a node. `walk` then reads path and next token off on the host, so
a step costs one transfer whatever the rule. Suffixes: N nodes, M nodes with children, A of these
the ones with a child left to test, V vocabulary.

Lossless is a property of the pair (kinds of nodes, rule): `choose_verifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool import methods
from spectool.decode.sampling import StepRandom, not_finite_logits
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Verdict:
    """`emit_N`: the token after the path that ends at a node. `accept_N`: whether a node stands
    if its parent was reached (the root always); None where it stands when it equals its parent's
    `emit`."""

    emit_N: Tensor
    accept_N: Tensor | None = None


Verifier = Callable[[Draft, Tensor, StepRandom], Verdict]


def greedy(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Follow the child equal to the most likely token (Stern et al. 2018). Any scores will do."""
    return Verdict(probs_NV.argmax(-1))


def token_match(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Draw the target's own token once per node and follow the child that equals it.

    Exact for every draft: what is emitted is the target's draw, whatever was proposed. With the
    draws of `sampling.StepDraws` the text is even the one that plain sampling gives under the seed.
    """
    return Verdict(rng.pick(probs_NV, draft.depths))


def rejection(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Test a node's children in the order drawn, each against what the ones before it left over.

    Child x from law q stands with min(1, r(x)/q(x)); where it falls, r becomes Norm[r - q]+; r
    begins as the target's law and ends as the law of the token that is emitted when all fall.
    One child: Leviathan et al. 2023, Chen et al. 2023. Independent children: Miao et al. 2023,
    Yang et al. 2024. Distinct ones, each drawn from q without its predecessors: recursive
    rejection, Jeon et al. 2024 (arXiv:2402.14160), algorithm 1. A deterministic child has a
    one-hot q. A residual that rounds to nothing stands for r = q, and r stays.
    """
    family = _Family.of(draft, probs_NV.device)
    r_MV, q_MV = probs_NV[family.parents], _drawn_from(draft, family.parents, probs_NV)
    for draw, at, drawn in family.rounds():
        r_AV, q_AV = r_MV[at], q_MV[at]
        token_A1 = _tokens(draft, drawn, probs_NV.device)[:, None]
        fixed = [a for a, node in enumerate(drawn) if draft.kinds[node] == "deterministic"]
        if fixed:
            q_AV[fixed] = torch.zeros_like(q_AV[fixed]).scatter_(1, token_A1[fixed], 1.0)
        p_A, q_A = r_AV.gather(1, token_A1)[:, 0], q_AV.gather(1, token_A1)[:, 0]
        family.take(at, drawn, rng.below(p_A, q_A, [draft.depths[n] for n in drawn], draw))
        rest_AV = (r_AV - q_AV).clamp_(min=0)
        sum_A1 = rest_AV.sum(-1, keepdim=True)
        r_MV[at] = torch.where(sum_A1 > 0, rest_AV / sum_A1, r_AV)
        once = [a for a, node in enumerate(drawn) if draft.kinds[node] == "distinct"]
        if once:
            left_AV = q_AV[once].scatter_(1, token_A1[once], 0.0)
            left_AV /= left_AV.sum(-1, keepdim=True).clamp_(min=torch.finfo(left_AV.dtype).tiny)
            q_MV[[at[a] for a in once]] = left_AV
    emit_NV = probs_NV.index_copy(0, family.parents, r_MV)
    return Verdict(rng.pick(emit_NV, draft.depths), family.stands(len(draft)))


# Halvings of K-SEQ's factor: 2**-30 of it is below what fp32 laws resolve.
_HALVINGS = 30


def k_seq(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Test k independent children in turn, each with min(1, p(x) / (rho q(x))).

    Sun et al., SpecTr, 2023 (arXiv:2310.15141): rho in [1, k] is the root of
    1 - (1 - b)^k = rho b with b = sum min(q, p / rho), found by halving; where all fall, emit from
    Norm[p - min(q, p / rho) P / b]+ with P = 1 - (1 - b)^k.
    """
    family = _Family.of(draft, probs_NV.device)
    p_MV = probs_NV[family.parents].double()
    q_MV = _drawn_from(draft, family.parents, probs_NV).double()
    k_M = torch.tensor(
        [len(drawn) for drawn in family.children], dtype=torch.float64, device=probs_NV.device
    )
    low_M, high_M = torch.ones_like(k_M), k_M.clone()
    for _ in range(_HALVINGS):
        rho_M = (low_M + high_M) / 2
        share_M = torch.minimum(q_MV, p_MV / rho_M[:, None]).sum(-1)
        too_low_M = 1 - (1 - share_M) ** k_M > rho_M * share_M
        low_M = torch.where(too_low_M, rho_M, low_M)
        high_M = torch.where(too_low_M, high_M, rho_M)
    # The upper end: there the residual is nowhere negative.
    kept_MV = torch.minimum(q_MV, p_MV / high_M[:, None])
    share_M = kept_MV.sum(-1)
    for draw, at, drawn in family.rounds():
        token_A1 = _tokens(draft, drawn, probs_NV.device)[:, None]
        p_A, q_A = p_MV[at].gather(1, token_A1)[:, 0], q_MV[at].gather(1, token_A1)[:, 0]
        depths = [draft.depths[node] for node in drawn]
        family.take(at, drawn, rng.below(p_A, high_M[at] * q_A, depths, draw))
    all_M = 1 - (1 - share_M) ** k_M
    rest_MV = (p_MV - kept_MV * (all_M / share_M.clamp(min=1e-300))[:, None]).clamp_(min=0)
    rest_MV = torch.where(rest_MV.sum(-1, keepdim=True) > 0, rest_MV, p_MV)
    emit_NV = probs_NV.index_copy(0, family.parents, rest_MV.to(probs_NV.dtype))
    return Verdict(rng.pick(emit_NV, draft.depths), family.stands(len(draft)))


# Medusa's: a token of this probability always stands, or of this share of exp(-entropy).
_TYPICAL, _TYPICAL_SHARE = 0.09, 0.3


def typical(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """Let a node stand that the target finds likely enough: p(x) > min(0.09, 0.3 exp(-H(p))).

    Cai et al., Medusa, 2024 (arXiv:2401.10774), section 2.3.1. Changes the law of the text.
    """
    entropy_N = torch.special.entr(probs_NV).sum(-1)
    bound_N = (_TYPICAL_SHARE * (-entropy_N).exp()).clamp_(max=_TYPICAL)
    nodes = list(range(1, len(draft)))
    token_N = _tokens(draft, nodes, probs_NV.device)
    above = draft.parents[1:]
    stands_N = probs_NV[above, token_N] > bound_N[above]
    accept_N = torch.cat([stands_N.new_ones(1), stands_N])
    return Verdict(rng.pick(probs_NV, draft.depths), accept_N)


@dataclass(slots=True)
class _Family:
    """The nodes with children, their children as drawn, and which child of each stands so far."""

    parents: Tensor
    children: list[list[int]]
    chosen_M: Tensor

    @classmethod
    def of(cls, draft: Draft, device: torch.device) -> _Family:
        drawn = draft.drawn()
        parents = torch.tensor(list(drawn), dtype=torch.long, device=device)
        return cls(parents, list(drawn.values()), torch.zeros_like(parents))

    def rounds(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Draw after draw: its number, the places (of M) that have one, and the child drawn."""
        for draw in range(max(map(len, self.children), default=0)):
            at = [m for m, drawn in enumerate(self.children) if draw < len(drawn)]
            yield draw, at, [self.children[m][draw] for m in at]

    def take(self, at: list[int], drawn: list[int], stands_A: Tensor) -> None:
        """Where no earlier child stands, this one does if its test says so. The root is none's."""
        node_A = torch.tensor(drawn, device=stands_A.device)
        free_A = stands_A & (self.chosen_M[at] == 0)
        self.chosen_M[at] = torch.where(free_A, node_A, self.chosen_M[at])

    def stands(self, num_nodes: int) -> Tensor:
        accept_N = torch.zeros(num_nodes, dtype=torch.bool, device=self.chosen_M.device)
        accept_N[self.chosen_M] = True
        accept_N[0] = True
        return accept_N


def _drawn_from(draft: Draft, parents: Tensor, probs_NV: Tensor) -> Tensor:
    """The laws [M, V] that the children of these nodes were drawn from; zeros where none is."""
    if draft.probs_NV is None:
        return torch.zeros_like(probs_NV[parents])
    q_NV = torch.zeros_like(probs_NV)
    q_NV[: len(draft.probs_NV)] = draft.probs_NV
    return q_NV[parents]


def _tokens(draft: Draft, nodes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([draft.tokens[node] for node in nodes], dtype=torch.long, device=device)


def walk(draft: Draft, emit: Sequence[int], accept: Sequence[int] | None) -> tuple[list[int], int]:
    """The longest path of nodes that stand (root first, earlier siblings on ties); what follows.

    Rules that keep the target's law let at most one sibling stand.
    """
    below, longest = [0] * len(draft), [0] * len(draft)
    for child in range(len(draft) - 1, 0, -1):
        parent = draft.parents[child]
        stands = accept[child] if accept is not None else draft.tokens[child] == emit[parent]
        if stands and longest[child] + 1 >= longest[parent]:
            below[parent], longest[parent] = child, longest[child] + 1
    node, path = 0, [0]
    while below[node]:
        node = below[node]
        path.append(node)
    return path, emit[node]


def resolve_paths(
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict],
    *,
    all_finite: Tensor | None = None,
    top_BNK: Tensor | None = None,
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Path and next token of every row, and `top_BNK` laid out flat, in one transfer to the host.

    Raises:
        SpectoolError: the laws that were judged by are not `sampling.is_finite`.
    """
    flat = [verdict.emit_N for verdict in verdicts]
    flat += [verdict.accept_N.long() for verdict in verdicts if verdict.accept_N is not None]
    num_verdicts = sum(map(len, flat))
    flat += [top_BNK.flatten()] if top_BNK is not None else []
    flat += [all_finite.long()[None]] if all_finite is not None else []
    values = torch.cat(flat).tolist()
    if all_finite is not None and not values.pop():
        raise not_finite_logits("the model")
    resolved, start, tests = [], 0, sum(len(draft) for draft in drafts)
    for draft, verdict in zip(drafts, verdicts, strict=True):
        emit, accept = values[start : start + len(draft)], None
        start += len(draft)
        if verdict.accept_N is not None:
            accept = values[tests : tests + len(draft)]
            tests += len(draft)
        resolved.append(walk(draft, emit, accept))
    return resolved, values[num_verdicts:]


# Kinds of nodes for which a rule keeps the target's law at temperatures above 0.
_EXACT: dict[str, set[Kind]] = {
    "greedy": set(),
    "token-match": {"deterministic", "iid", "distinct"},
    "rejection": {"deterministic", "iid", "distinct"},
    "k-seq": {"iid"},
    "typical": set(),
}


@dataclass(frozen=True, slots=True)
class Verification:
    """A rule chosen for a kind of draft, and whether the pair keeps the target's law."""

    name: str
    verifier: Verifier
    lossless: bool


def choose_verifier(
    kinds: Collection[Kind], name: str | None, *, temperature: float, lossy: bool
) -> Verification:
    """The rule to verify such drafts with; the best exact one if no name is given.

    At temperature 0 the laws are one-hot, every rule is the greedy one, and it is exact.

    Raises:
        UsageError: no such rule, or an inexact pair without `lossy`.
    """
    if name is not None:
        methods.row(name, "verifier")
    if temperature == 0:
        return Verification("greedy", greedy, True)
    if name is None:
        # On deterministic nodes both accept as much, and token-match keeps the plain sampled text.
        name = "rejection" if set(kinds) - {"deterministic"} else "token-match"
    if name == "k-seq" and set(kinds) - {"iid"}:
        raise UsageError(
            "--verify k-seq is for independent draws with a law, and this drafter proposes others",
            hint="leave --verify out for an exact rule",
        )
    lossless = set(kinds) <= _EXACT[name] and bool(_EXACT[name])
    if not lossless and not lossy:
        drawn = " and ".join(sorted(kinds)) or "no"
        raise UsageError(
            f"--verify {name} changes the law of the text for {drawn} drafts at temperature "
            f"{temperature:g}",
            hint="leave --verify out for an exact rule, or add --lossy",
        )
    return Verification(name, methods.resolve(name, "verifier"), lossless)
