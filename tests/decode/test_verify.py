"""Rules against exact enumeration of everything that can happen, in fp64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from spectool.decode import tree, verify
from spectool.decode.sampling import Source
from spectool.decode.tree import Draft
from spectool.decode.verify import Rule, Verdict, rule_for, settle, walk
from spectool.errors import UsageError

Laws = dict[tuple[int, ...], Tensor]


class Branches:
    """A source that replays one way things can go and knows its probability."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.choices = list(choices)
        self.sizes: list[int] = []
        self.weight = 1.0

    def _choose(self, weights: Tensor) -> int:
        at = len(self.sizes)
        self.sizes.append(len(weights))
        if at == len(self.choices):
            self.choices.append(0)
        self.weight *= float(weights[self.choices[at]])
        return self.choices[at]

    def pick(self, laws_MV: Tensor, depths: Sequence[int]) -> Tensor:
        return torch.tensor([self._choose(law / law.sum()) for law in laws_MV])

    def below(self, p_M: Tensor, q_M: Tensor, depths: Sequence[int]) -> Tensor:
        keep = [min(1.0, float(p) / float(q)) for p, q in zip(p_M, q_M, strict=True)]
        flips = [self._choose(torch.tensor([k, 1 - k], dtype=torch.float64)) for k in keep]
        return torch.tensor([flip == 0 for flip in flips], dtype=torch.bool)


def outcomes(rule: Rule, draft: Draft, laws_NV: Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every committed sequence (the path's drafted tokens, then the emitted one), its weight."""
    choices: list[int] | None = []
    while choices is not None:
        source = Branches(choices)
        if (verdict := rule(draft, laws_NV, source)) is not None and source.weight > 0:
            [(path, token)] = settle([draft], [verdict])
            yield (*(draft.tokens[node] for node in path[1:]), token), source.weight
        choices = source.choices
        while choices and choices[-1] + 1 == source.sizes[len(choices) - 1]:
            choices.pop()
        choices = [*choices[:-1], choices[-1] + 1] if choices else None


def random_laws(seed: int, vocab: int, length: int) -> Laws:
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for size in range(length):
        for prefix in itertools.product(range(vocab), repeat=size):
            weights = torch.rand(vocab, generator=generator, dtype=torch.float64) ** 3
            table[prefix] = weights / weights.sum()
    return table


def sequence_law(p: Laws, vocab: int, length: int, start: tuple[int, ...] = ()) -> Laws:
    """The law of every sequence of `length` tokens that goes on from `start`."""
    found = {}
    for rest in itertools.product(range(vocab), repeat=length - len(start)):
        whole, weight = (*start, *rest), torch.tensor(1.0, dtype=torch.float64)
        for at in range(len(start), length):
            weight = weight * p[whole[:at]][whole[at]]
        found[whole] = weight
    return found


def node_laws(p: Laws, draft: Draft) -> Tensor:
    rows = [p[tuple(draft.tokens[n] for n in draft.path(node)[1:])] for node in range(len(draft))]
    return torch.stack(rows)


def worst_error(
    rule: Rule, drafts: list[tuple[Draft, float]], p: Laws, vocab: int, length: int
) -> float:
    """Largest error of a sequence's probability after one step and plain sampling from there."""
    total = dict.fromkeys(itertools.product(range(vocab), repeat=length), 0.0)
    for draft, draft_weight in drafts:
        for committed, weight in outcomes(rule, draft, node_laws(p, draft)):
            for whole, rest in sequence_law(p, vocab, length, committed).items():
                total[whole] += draft_weight * weight * float(rest)
    exact = sequence_law(p, vocab, length)
    return max(abs(total[whole] - float(exact[whole])) for whole in total)


def sampled_chains(
    q: Laws, vocab: int, depth: int, report: Callable[[Laws, tuple[int, ...]], Tensor]
) -> list[tuple[Draft, float]]:
    """All chains with their probabilities; `report` gives the law that is said to be theirs."""
    drafts = []
    for tokens, weight in sequence_law(q, vocab, depth).items():
        laws = torch.stack([report(q, tokens[:at]) for at in range(depth)])
        drafts.append((tree.chain([0, *tokens], kind="sampled", laws_NV=laws), float(weight)))
    return drafts


def truthful(q: Laws, prefix: tuple[int, ...]) -> Tensor:
    return q[prefix]


@pytest.mark.parametrize(("vocab", "depth"), [(2, 2), (3, 2), (5, 1)])
def test_chain_is_exact_for_sampled_chains(vocab: int, depth: int) -> None:
    for seed in range(3):
        p, q = random_laws(seed, vocab, depth + 1), random_laws(50 + seed, vocab, depth)
        drafts = sampled_chains(q, vocab, depth, truthful)
        assert worst_error(verify.chain, drafts, p, vocab, depth + 1) < 1e-12


def test_chain_is_exact_where_the_draft_is_right_and_where_it_has_no_laws() -> None:
    p = random_laws(1, 3, 3)
    drafts = sampled_chains(p, 3, 2, truthful)
    assert worst_error(verify.chain, drafts, p, 3, 3) < 1e-12
    fixed = [(tree.chain([0, 2, 1], kind="deterministic"), 1.0)]
    assert worst_error(verify.chain, fixed, p, 3, 3) < 1e-12


def random_tree(seed: int, vocab: int, depth: int, paths: int) -> Draft:
    noise = random.Random(seed)
    found = [[noise.randrange(vocab) for _ in range(depth)] for _ in range(paths)]
    return tree.trie(0, found, nodes=5)


@pytest.mark.parametrize("seed", range(4))
def test_token_match_is_exact_for_any_tree(seed: int) -> None:
    p = random_laws(seed, 3, 3)
    drafts = [(random_tree(seed, 3, 2, 3), 1.0)]
    assert worst_error(verify.token_match, drafts, p, 3, 3) < 1e-12


def test_token_match_is_exact_for_sampled_chains() -> None:
    p, q = random_laws(0, 3, 3), random_laws(50, 3, 2)
    assert worst_error(verify.token_match, sampled_chains(q, 3, 2, truthful), p, 3, 3) < 1e-12


def without_residual(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    assert draft.laws_NV is not None
    x = torch.tensor(draft.tokens[1:])[:, None]
    p_x, q_x = laws_NV[:-1].gather(1, x)[:, 0], draft.laws_NV.gather(1, x)[:, 0]
    accept = source.below(p_x, q_x, draft.depths[1:])
    emit = source.pick(laws_NV, draft.depths)
    return Verdict(emit, torch.cat([torch.ones(1, dtype=torch.bool), accept]))


def drawn_per_child(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    """The fault of path-wise verification: a node's children are tested with draws of their own."""
    emit_N = source.pick(laws_NV, draft.depths)
    accept = [True]
    for node in range(1, len(draft)):
        parent = draft.parents[node]
        own = source.pick(laws_NV[parent : parent + 1], [draft.depths[parent]])
        accept.append(int(own) == draft.tokens[node])
    return Verdict(emit_N, torch.tensor(accept))


def test_planted_faults_are_found() -> None:
    """The same check must fail each of these, or it proves nothing."""
    p, q = random_laws(0, 3, 3), random_laws(50, 3, 2)
    swapped = sampled_chains(q, 3, 2, lambda q, prefix: q[prefix].flip(0))
    stale = sampled_chains(q, 3, 2, lambda q, prefix: q[()])
    best = {prefix: int(law.argmax()) for prefix, law in q.items()}
    top = (best[()], best[(best[()],)])
    topk = tree.chain([0, *top], kind="deterministic", laws_NV=torch.stack([q[()], q[top[:1]]]))
    faulty: list[tuple[Rule, list[tuple[Draft, float]]]] = [
        (without_residual, sampled_chains(q, 3, 2, truthful)),
        (verify.chain, swapped),
        (verify.chain, stale),
        (verify.chain, [(topk, 1.0)]),
        (verify.greedy, [(topk, 1.0)]),
        (drawn_per_child, [(tree.trie(0, [[0], [1]], nodes=2), 1.0)]),
    ]
    for rule, drafts in faulty:
        assert worst_error(rule, drafts, p, 3, 3) > 1e-2


def test_walk_follows_the_accepted_children_only() -> None:
    draft = tree.trie(0, [[1, 2], [3, 4], [3, 5, 6]], nodes=9)
    # tokens: 0 | 1 2 | 3 4 | 5 6 at nodes 0..6
    emit = [3, 9, 9, 5, 9, 7, 9]
    assert walk(draft, emit, None) == ([0, 3, 5], 7)
    assert walk(draft, emit, [1, 1, 0, 1, 1, 1, 1]) == ([0, 1], 9)
    assert walk(tree.root(4), [8], None) == ([0], 8)


def test_settle_takes_rows_of_both_sorts() -> None:
    one, two = tree.chain([0, 1], kind="deterministic"), tree.chain([0, 1], kind="sampled")
    verdicts = [
        Verdict(torch.tensor([1, 5])),
        Verdict(torch.tensor([6, 7]), torch.tensor([True, False])),
    ]
    assert settle([one, two], verdicts) == [([0, 1], 5), ([0], 6)]


def test_default_rules_are_exact() -> None:
    assert rule_for(("sampled",), None, temperature=1, lossy=False).name == "chain"
    assert rule_for(("deterministic",), None, temperature=1, lossy=False).name == "token-match"
    assert rule_for((), None, temperature=1, lossy=False).lossless
    for name in (None, "greedy", "token-match", "chain"):
        pairing = rule_for(("deterministic",), name, temperature=0, lossy=False)
        assert pairing.rule is verify.greedy
        assert pairing.lossless


@pytest.mark.parametrize(
    ("kinds", "name"),
    [(("deterministic",), "chain"), (("deterministic",), "greedy"), (("sampled",), "greedy")],
)
def test_inexact_pairs_are_refused_or_said(kinds: tuple[tree.Kind, ...], name: str) -> None:
    with pytest.raises(UsageError, match="changes the law") as refusal:
        rule_for(kinds, name, temperature=0.7, lossy=False)
    assert "--lossy" in str(refusal.value.hint)
    assert not rule_for(kinds, name, temperature=0.7, lossy=True).lossless


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("kinds", [("deterministic",), ("sampled",)])
def test_trees_are_not_for_the_chain_rule(kinds: tuple[tree.Kind, ...], lossy: bool) -> None:
    with pytest.raises(UsageError, match="no law for siblings") as refusal:
        rule_for(kinds, "chain", temperature=1, lossy=lossy, branches=True)
    assert "--lossy" not in str(refusal.value.hint)
    assert rule_for(kinds, None, temperature=1, lossy=lossy, branches=True).name == "token-match"
    assert rule_for(kinds, "chain", temperature=0, lossy=lossy, branches=True).lossless


def test_lossy_does_not_spoil_an_exact_pair() -> None:
    assert rule_for(("sampled",), "token-match", temperature=1, lossy=True).lossless


def test_unknown_rule() -> None:
    with pytest.raises(UsageError, match="no rule is called 'chian'"):
        rule_for((), "chian", temperature=0, lossy=False)
