"""Verification rules: which drafted nodes stand, and which token follows.

A rule is a function of (draft, target laws, source of randomness). It decides for all nodes at
once, on the laws' device: whether a node stands should its parent be reached, and which token is
emitted should the path end at a node. `walk` then reads path and next token off on the host, so
a step costs one transfer whatever the rule. Suffixes: N nodes, V vocabulary.

Lossless is a property of the pair (kind of draft, rule): `rule_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool import methods
from spectool.decode.sampling import Source, unsound
from spectool.decode.tree import Draft, Kind
from spectool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Verdict:
    """`emit_N`: the token after the path that ends at a node. `accept_N`: whether a node stands
    if its parent was reached; None where a node stands when it equals its parent's `emit`."""

    emit_N: Tensor
    accept_N: Tensor | None = None


Rule = Callable[[Draft, Tensor, Source], Verdict]


def greedy(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    """Follow the child equal to the most likely token (Stern et al. 2018). Any scores will do."""
    return Verdict(laws_NV.argmax(-1))


def token_match(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    """Draw the target's own token once per node and follow the child that equals it.

    Exact for every draft: what is emitted is the target's draw, whatever was proposed. With the
    draws of `sampling.Turn` the text is even the one that plain sampling gives under the seed.
    """
    return Verdict(source.pick(laws_NV, draft.depths))


def chain(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    """Accept x with min(1, p(x)/q(x)); at the first rejection draw from Norm[p - q]+.

    Leviathan et al. 2023, Chen et al. 2023. Exact if each x was drawn from the q given with it; a
    chain without laws is taken as drawn from one-hot laws. A residual that rounds to nothing
    stands for p = q: then p.
    """
    assert draft.is_chain, "the chain rule knows no siblings"
    p_NV, p_last_1V = laws_NV[:-1], laws_NV[-1:]
    tokens_N1 = torch.tensor(draft.tokens[1:], device=laws_NV.device)[:, None]
    if draft.laws_NV is None:
        q_NV = torch.zeros_like(p_NV).scatter_(1, tokens_N1.long(), 1.0)
    else:
        q_NV = draft.laws_NV
    p_x_N = p_NV.gather(1, tokens_N1.long())[:, 0]
    q_x_N = q_NV.gather(1, tokens_N1.long())[:, 0]
    accept_N = source.below(p_x_N, q_x_N, draft.depths[1:])
    rest_NV = (p_NV - q_NV).clamp_(min=0)
    rest_NV = torch.where(rest_NV.sum(-1, keepdim=True) > 0, rest_NV, p_NV)
    emit_N = source.pick(torch.cat([rest_NV, p_last_1V]), draft.depths)
    return Verdict(emit_N, torch.cat([accept_N.new_ones(1), accept_N]))


def walk(draft: Draft, emit: Sequence[int], accept: Sequence[int] | None) -> tuple[list[int], int]:
    """The accepted path (nodes, root first) and the token after it."""
    node, path = 0, [0]
    for child in range(1, len(draft)):
        if draft.parents[child] != node:
            continue
        stands = accept[child] if accept is not None else draft.tokens[child] == emit[node]
        if stands:
            node = child
            path.append(child)
    return path, emit[node]


def settle(
    drafts: Sequence[Draft], verdicts: Sequence[Verdict], is_sound: Tensor | None = None
) -> list[tuple[list[int], int]]:
    """Path and next token of every row, after a single transfer to the host.

    Raises:
        SpectoolError: the laws that were judged by are not `sampling.sound`.
    """
    flat = [verdict.emit_N for verdict in verdicts]
    flat += [verdict.accept_N.long() for verdict in verdicts if verdict.accept_N is not None]
    flat += [is_sound.long()[None]] if is_sound is not None else []
    values = torch.cat(flat).tolist()
    if is_sound is not None and not values.pop():
        raise unsound("the model")
    settled, start, tests = [], 0, sum(len(draft) for draft in drafts)
    for draft, verdict in zip(drafts, verdicts, strict=True):
        emit, accept = values[start : start + len(draft)], None
        start += len(draft)
        if verdict.accept_N is not None:
            accept = values[tests : tests + len(draft)]
            tests += len(draft)
        settled.append(walk(draft, emit, accept))
    return settled


# Kinds of nodes for which a rule keeps the target's law at temperatures above 0.
_EXACT: dict[str, set[Kind]] = {
    "greedy": set(),
    "token-match": {"deterministic", "sampled"},
    "chain": {"sampled"},
}


@dataclass(frozen=True, slots=True)
class Pairing:
    """A rule chosen for a kind of draft, and whether the pair keeps the target's law."""

    name: str
    rule: Rule
    lossless: bool


def rule_for(
    kinds: Collection[Kind],
    name: str | None,
    *,
    temperature: float,
    lossy: bool,
    branches: bool = False,
) -> Pairing:
    """The rule to verify such drafts with; the best exact one if no name is given.

    `branches`: whether a node may have siblings. At temperature 0 the laws are one-hot, every rule
    is the greedy one, and it is exact.

    Raises:
        UsageError: no such rule, one that has no law for siblings, or an inexact pair without
            `lossy`.
    """
    if name is not None:
        methods.row(name, "rule")
    if temperature == 0:
        return Pairing("greedy", greedy, True)
    if name is None:
        name = "chain" if set(kinds) == {"sampled"} and not branches else "token-match"
    if branches and name == "chain":
        raise UsageError(
            "--verify chain has no law for siblings, and this drafter proposes trees",
            hint="leave --verify out for an exact rule",
        )
    lossless = set(kinds) <= _EXACT[name]
    if name == "greedy":
        lossless = False
    if not lossless and not lossy:
        drawn = " and ".join(sorted(kinds)) or "no"
        raise UsageError(
            f"--verify {name} changes the law of the text for {drawn} drafts at temperature "
            f"{temperature:g}",
            hint="leave --verify out for an exact rule, or add --lossy",
        )
    return Pairing(name, methods.resolve(name, "rule"), lossless)
