"""Verifiers against exact enumeration of every outcome, in fp64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from spectool.decode import tree, verify
from spectool.decode.sampling import StepRandom
from spectool.decode.tree import Draft
from spectool.decode.verify import Verdict, Verifier, choose_verifier, resolve_paths, walk
from spectool.errors import UsageError

from .trees import path_to, trie

LogProbs = dict[tuple[int, ...], Tensor]


class Branches:
    """A source of randomness that replays one outcome and knows its probability.

    With `late`, the token after a path is not chosen: `pick` returns a number per node, and `probs`
    keep what the token would be drawn from. For verifiers that follow tests, not tokens.
    """

    def __init__(self, choices: Sequence[int], *, late: bool = False) -> None:
        self.choices = list(choices)
        self.sizes: list[int] = []
        self.weight = 1.0
        self.late = late
        self.probs: Tensor | None = None

    def _choose(self, weights: Tensor) -> int:
        at = len(self.sizes)
        self.sizes.append(len(weights))
        if at == len(self.choices):
            self.choices.append(0)
        self.weight *= float(weights[self.choices[at]])
        return self.choices[at]

    def pick(self, probs_MV: Tensor, depths: Sequence[int]) -> Tensor:
        if self.late:
            self.probs = probs_MV / probs_MV.sum(-1, keepdim=True)
            return torch.arange(len(probs_MV))
        return torch.tensor([self._choose(probs / probs.sum()) for probs in probs_MV])

    def below(self, p_M: Tensor, q_M: Tensor, depths: Sequence[int], draw: int = 0) -> Tensor:
        pairs = zip(p_M.tolist(), q_M.tolist(), strict=True)
        keep = [min(1.0, p / q) if q > 0 else 1.0 for p, q in pairs]
        flips = [self._choose(torch.tensor([k, 1 - k], dtype=torch.float64)) for k in keep]
        return torch.tensor([flip == 0 for flip in flips], dtype=torch.bool)


def outcomes(
    verifier: Verifier, draft: Draft, probs_NV: Tensor, *, late: bool = False
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every committed sequence (drafted tokens, then the emitted one) and its weight."""
    choices: list[int] | None = []
    while choices is not None:
        rng = Branches(choices, late=late)
        if (verdict := verifier(draft, probs_NV, rng)) is not None and rng.weight > 0:
            [(path, token)], _ = resolve_paths([draft], [verdict])
            drafted = tuple(draft.tokens[node] for node in path[1:])
            if rng.probs is None:
                yield (*drafted, token), rng.weight
            else:
                for last, share in enumerate(rng.probs[token].tolist()):
                    yield (*drafted, last), rng.weight * share
        choices = rng.choices
        while choices and choices[-1] + 1 == rng.sizes[len(choices) - 1]:
            choices.pop()
        choices = [*choices[:-1], choices[-1] + 1] if choices else None


def random_probs(seed: int, vocab: int, length: int) -> LogProbs:
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for size in range(length):
        for prefix in itertools.product(range(vocab), repeat=size):
            weights = torch.rand(vocab, generator=generator, dtype=torch.float64) ** 3
            table[prefix] = weights / weights.sum()
    return table


def sequence_probs(p: LogProbs, vocab: int, length: int, start: tuple[int, ...] = ()) -> LogProbs:
    """Return the probability of every sequence of `length` tokens that begins with `start`."""
    found = {}
    for rest in itertools.product(range(vocab), repeat=length - len(start)):
        whole, weight = (*start, *rest), torch.tensor(1.0, dtype=torch.float64)
        for at in range(len(start), length):
            weight = weight * p[whole[:at]][whole[at]]
        found[whole] = weight
    return found


def node_probs(p: LogProbs, draft: Draft) -> Tensor:
    rows = [
        p[tuple(draft.tokens[n] for n in path_to(draft, node)[1:])] for node in range(len(draft))
    ]
    return torch.stack(rows)


def worst_error(
    verifier: Verifier,
    drafts: list[tuple[Draft, float]],
    p: LogProbs,
    vocab: int,
    length: int,
    *,
    late: bool = False,
) -> float:
    """Return the largest error of a sequence's probability after one step and plain sampling."""
    total = dict.fromkeys(itertools.product(range(vocab), repeat=length), 0.0)
    for draft, draft_weight in drafts:
        for committed, weight in outcomes(verifier, draft, node_probs(p, draft), late=late):
            for whole, rest in sequence_probs(p, vocab, length, committed).items():
                total[whole] += draft_weight * weight * float(rest)
    exact = sequence_probs(p, vocab, length)
    return max(abs(total[whole] - float(exact[whole])) for whole in total)


def sampled_chains(
    q: LogProbs, vocab: int, depth: int, report: Callable[[LogProbs, tuple[int, ...]], Tensor]
) -> list[tuple[Draft, float]]:
    """Return all chains and their weights; `report` gives the probabilities claimed for them."""
    drafts = []
    for tokens, weight in sequence_probs(q, vocab, depth).items():
        probs = torch.stack([report(q, tokens[:at]) for at in range(depth)])
        drafts.append((tree.chain([0, *tokens], kind="iid", probs_NV=probs), float(weight)))
    return drafts


def truthful(q: LogProbs, prefix: tuple[int, ...]) -> Tensor:
    return q[prefix]


@pytest.mark.parametrize("verifier", [verify.rejection, verify.k_seq])
@pytest.mark.parametrize(("vocab", "depth"), [(2, 2), (3, 2), (5, 1)])
def test_verifiers_are_exact_for_sampled_chains(verifier: Verifier, vocab: int, depth: int) -> None:
    for seed in range(3):
        p, q = random_probs(seed, vocab, depth + 1), random_probs(50 + seed, vocab, depth)
        drafts = sampled_chains(q, vocab, depth, truthful)
        # rho is only as exact as its bisection, but K-SEQ is lossless for any rho.
        assert worst_error(verifier, drafts, p, vocab, depth + 1, late=True) < 1e-12


def test_rejection_is_exact_where_the_draft_is_right_and_where_it_has_no_probs() -> None:
    p = random_probs(1, 3, 3)
    drafts = sampled_chains(p, 3, 2, truthful)
    assert worst_error(verify.rejection, drafts, p, 3, 3) < 1e-12
    fixed = [(tree.chain([0, 2, 1], kind="deterministic"), 1.0)]
    assert worst_error(verify.rejection, fixed, p, 3, 3) < 1e-12


Grow = Callable[[Tensor, int], Iterator[tuple[tuple[int, ...], float]]]


def drawn_iid(probs: Tensor, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    for tokens in itertools.product(range(len(probs)), repeat=count):
        yield tokens, float(probs[list(tokens)].prod())


def drawn_distinct(probs: Tensor, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    for tokens in itertools.permutations(range(len(probs)), count):
        weight, left = 1.0, 1.0
        for token in tokens:
            weight *= float(probs[token]) / left
            left -= float(probs[token])
        yield tokens, weight


def sampled_trees(
    q: LogProbs, kind: tree.Kind, counts: Sequence[Sequence[int]]
) -> Iterator[tuple[Draft, float]]:
    """Yield all trees of two levels with their probabilities.

    `counts[0][0]` tokens are drawn after the root, `counts[1][i]` after the i-th distinct one.
    """
    grow: Grow = drawn_iid if kind == "iid" else drawn_distinct
    for first, weight in grow(q[()], counts[0][0]):
        distinct = list(dict.fromkeys(first))
        wanted = counts[1][: len(distinct)]
        for seconds in itertools.product(
            *(list(grow(q[(token,)], n)) for token, n in zip(distinct, wanted, strict=False))
        ):
            tokens, parents = [0, *distinct], [-1, *(0 for _ in distinct)]
            draws = {0: [1 + distinct.index(token) for token in first]}
            probs, share = [q[()]], weight
            for child, (drawn, prob) in enumerate(seconds, start=1):
                start = len(tokens)
                unique = list(dict.fromkeys(drawn))
                tokens += unique
                parents += [child] * len(unique)
                if drawn:
                    draws[child] = [start + unique.index(token) for token in drawn]
                probs.append(q[(distinct[child - 1],)])
                share *= prob
            kinds: list[tree.Kind] = [kind] * len(tokens)
            yield Draft(tokens, parents, kinds, torch.stack(probs), draws=draws), share


SIBLINGS = [
    ("rejection", "iid", 3, [[2], []]),
    ("rejection", "iid", 2, [[2], [2, 1]]),
    ("rejection", "distinct", 3, [[3], []]),
    pytest.param("rejection", "distinct", 3, [[2], [2, 1]], marks=pytest.mark.slow),
    ("rejection", "distinct", 3, [[2], [2]]),
    ("k-seq", "iid", 3, [[2], []]),
    ("k-seq", "iid", 2, [[3], []]),
    ("k-seq", "iid", 2, [[2], [2]]),
]


@pytest.mark.parametrize(("name", "kind", "vocab", "counts"), SIBLINGS)
def test_verifiers_are_exact_for_sampled_siblings(
    name: str, kind: tree.Kind, vocab: int, counts: list[list[int]]
) -> None:
    verifier: Verifier = {"rejection": verify.rejection, "k-seq": verify.k_seq}[name]
    length = 3 if counts[1] else 2
    for seed in range(1 if counts[1] else 2):
        p, q = random_probs(seed, vocab, length), random_probs(50 + seed, vocab, length - 1)
        drafts = list(sampled_trees(q, kind, counts))
        assert sum(weight for _, weight in drafts) == pytest.approx(1)
        assert worst_error(verifier, drafts, p, vocab, length, late=True) < 1e-9


def test_rejection_is_exact_for_fixed_trees_and_mixed_ones() -> None:
    p, q = random_probs(3, 3, 3), random_probs(53, 3, 2)
    fixed = [(random_tree(2, 3, 2, 3), 1.0)]
    assert worst_error(verify.rejection, fixed, p, 3, 3, late=True) < 1e-12
    mixed = []
    for token, weight in enumerate(q[()].tolist()):
        # After a drawn child a looked-up one, which may be the same token; below it another.
        draft = Draft(
            [0, token, 1, 2], [-1, 0, 0, 1], ["deterministic", "iid", *["deterministic"] * 2]
        )
        draft.probs_NV = q[()][None]
        mixed.append((draft, weight))
    assert worst_error(verify.rejection, mixed, p, 3, 3, late=True) < 1e-12


def test_siblings_are_worth_their_nodes() -> None:
    """More draws are accepted more often, and distinct ones and K-SEQ's most."""

    def share(verifier: Verifier, kind: tree.Kind, count: int) -> float:
        p, q = random_probs(5, 4, 2), random_probs(55, 4, 1)
        total = 0.0
        for draft, weight in sampled_trees(q, kind, [[count], []]):
            for committed, prob in outcomes(verifier, draft, node_probs(p, draft), late=True):
                total += weight * prob * (len(committed) > 1)
        return total

    one = share(verify.rejection, "iid", 1)
    assert one == pytest.approx(
        float(torch.minimum(random_probs(5, 4, 2)[()], random_probs(55, 4, 1)[()]).sum())
    )
    two, apart = share(verify.rejection, "iid", 2), share(verify.rejection, "distinct", 2)
    assert one < two < apart
    assert two <= share(verify.k_seq, "iid", 2)
    # SpecTr's bound: at least 1 - (1 - 1/k)^k of what any verifier can accept, which is at most 1.
    assert share(verify.k_seq, "iid", 2) >= 0.75 * two


def test_typical_takes_the_longest_path_of_likely_tokens() -> None:
    draft = trie(0, [[1], [2, 3]], nodes=3)
    flat, sharp = torch.full((8,), 0.125), torch.tensor([0.0, 0.0, 0.02, 0.98, 0, 0, 0, 0])
    probs = torch.stack([flat, flat, sharp, sharp])
    [(path, _)], _ = resolve_paths([draft], [verify.typical(draft, probs, Branches([]))])
    assert [draft.tokens[node] for node in path] == [0, 2, 3]
    probs[2] = sharp.flip(0)
    [(path, _)], _ = resolve_paths([draft], [verify.typical(draft, probs, Branches([]))])
    assert [draft.tokens[node] for node in path] == [0, 1]


def random_tree(seed: int, vocab: int, depth: int, paths: int) -> Draft:
    noise = random.Random(seed)
    found = [[noise.randrange(vocab) for _ in range(depth)] for _ in range(paths)]
    return trie(0, found, nodes=5)


@pytest.mark.parametrize("seed", range(4))
def test_token_match_is_exact_for_any_tree(seed: int) -> None:
    p = random_probs(seed, 3, 3)
    drafts = [(random_tree(seed, 3, 2, 3), 1.0)]
    assert worst_error(verify.token_match, drafts, p, 3, 3) < 1e-12


def test_token_match_is_exact_for_sampled_chains() -> None:
    p, q = random_probs(0, 3, 3), random_probs(50, 3, 2)
    assert worst_error(verify.token_match, sampled_chains(q, 3, 2, truthful), p, 3, 3) < 1e-12


def without_residual(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    assert draft.probs_NV is not None
    x = torch.tensor(draft.tokens[1:])[:, None]
    p_x, q_x = probs_NV[:-1].gather(1, x)[:, 0], draft.probs_NV.gather(1, x)[:, 0]
    accept = rng.below(p_x, q_x, draft.depths[1:])
    emit = rng.pick(probs_NV, draft.depths)
    return Verdict(emit, torch.cat([torch.ones(1, dtype=torch.bool), accept]))


def drawn_per_child(draft: Draft, probs_NV: Tensor, rng: StepRandom) -> Verdict:
    """A verifier that draws anew for each child, a fault of path-wise verification."""
    emit_N = rng.pick(probs_NV, draft.depths)
    accept = [True]
    for node in range(1, len(draft)):
        parent = draft.parents[node]
        drawn = rng.pick(probs_NV[parent : parent + 1], [draft.depths[parent]])
        accept.append(int(drawn) == draft.tokens[node])
    return Verdict(emit_N, torch.tensor(accept))


def test_planted_faults_are_found() -> None:
    """The same check must fail for each of these, or it proves nothing."""
    p, q = random_probs(0, 3, 3), random_probs(50, 3, 2)
    swapped = sampled_chains(q, 3, 2, lambda q, prefix: q[prefix].flip(0))
    stale = sampled_chains(q, 3, 2, lambda q, prefix: q[()])
    best = {prefix: int(probs.argmax()) for prefix, probs in q.items()}
    top = (best[()], best[(best[()],)])
    topk = tree.chain([0, *top], kind="deterministic", probs_NV=torch.stack([q[()], q[top[:1]]]))
    as_if_drawn = tree.chain(topk.tokens, kind="iid", probs_NV=topk.probs_NV)
    faulty: list[tuple[Verifier, list[tuple[Draft, float]]]] = [
        (without_residual, sampled_chains(q, 3, 2, truthful)),
        (verify.rejection, swapped),
        (verify.rejection, stale),
        (verify.rejection, [(as_if_drawn, 1.0)]),
        (verify.greedy, [(topk, 1.0)]),
        (drawn_per_child, [(trie(0, [[0], [1]], nodes=2), 1.0)]),
    ]
    for verifier, drafts in faulty:
        assert worst_error(verifier, drafts, p, 3, 3) > 1e-2


def test_walk_follows_the_longest_accepted_path() -> None:
    draft = trie(0, [[1, 2], [3, 4], [3, 5, 6]], nodes=9)
    # tokens: 0 | 1 2 | 3 4 | 5 6 at nodes 0..6
    emit = [3, 9, 9, 5, 9, 7, 9]
    assert walk(draft, emit, None) == ([0, 3, 5], 7)
    assert walk(draft, emit, [1, 1, 0, 0, 1, 1, 1]) == ([0, 1], 9)
    assert walk(draft, emit, [1, 1, 0, 1, 1, 1, 1]) == ([0, 3, 5, 6], 9)
    assert walk(draft, emit, [1, 1, 0, 1, 1, 0, 1]) == ([0, 3, 4], 9)
    assert walk(tree.root(4), [8], None) == ([0], 8)


def test_resolve_paths_takes_verdicts_of_both_sorts() -> None:
    one, two = tree.chain([0, 1], kind="deterministic"), tree.chain([0, 1], kind="iid")
    verdicts = [
        Verdict(torch.tensor([1, 5])),
        Verdict(torch.tensor([6, 7]), torch.tensor([True, False])),
    ]
    assert resolve_paths([one, two], verdicts, torch.tensor([8, 9, 3, 4])) == (
        [([0, 1], 5), ([0], 6)],
        [8, 9, 3, 4],
    )


def sibling_faults() -> Iterator[tuple[str, Verifier, list[tuple[Draft, float]]]]:
    """Yield faults seen in real code, each with the verifier that it affects."""
    q = {(): torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)}
    distinct = list(sampled_trees(q, "distinct", [[2], []]))
    as_iid = [
        (Draft(d.tokens, d.parents, ["iid"] * len(d), d.probs_NV, draws=d.draws), weight)
        for d, weight in distinct
    ]
    yield "distinct children tested with unchanged probabilities", verify.rejection, as_iid
    merged = [
        (Draft(d.tokens, d.parents, d.kinds, d.probs_NV), weight)
        for d, weight in sampled_trees(q, "iid", [[2], []])
    ]
    yield "a token that was drawn twice tested once", verify.k_seq, merged
    pruned = [
        (d if d.tokens[1] else tree.root(0), weight)
        for d, weight in sampled_trees(q, "iid", [[1], []])
    ]
    yield "a sampled node dropped for its token", verify.rejection, pruned
    by_probs = []
    for d, weight in distinct:
        first = sorted(d.draws[0], key=lambda node: -float(q[()][d.tokens[node]]))  # type: ignore[index]
        by_probs.append((Draft(d.tokens, d.parents, d.kinds, d.probs_NV, draws={0: first}), weight))
    yield "children tested in the order of their probabilities", verify.rejection, by_probs


@pytest.mark.parametrize(("name", "verifier", "drafts"), list(sibling_faults()))
def test_planted_faults_among_siblings_are_found(
    name: str, verifier: Verifier, drafts: list[tuple[Draft, float]]
) -> None:
    worst = max(
        worst_error(verifier, drafts, random_probs(seed, 3, 2), 3, 2, late=True)
        for seed in range(4)
    )
    assert worst > 1e-2, name


def test_default_verifiers_are_exact() -> None:
    assert choose_verifier(("iid",), None, temperature=1, lossy=False).name == "rejection"
    assert choose_verifier(("distinct",), None, temperature=1, lossy=False).name == "rejection"
    assert (
        choose_verifier(("deterministic",), None, temperature=1, lossy=False).name == "token-match"
    )
    assert choose_verifier((), None, temperature=1, lossy=False).lossless
    for name in (None, "greedy", "token-match", "rejection", "k-seq", "typical"):
        verification = choose_verifier(("deterministic",), name, temperature=0, lossy=False)
        assert verification.verifier is verify.greedy
        assert verification.lossless


@pytest.mark.parametrize(
    ("kinds", "name"),
    [(("deterministic",), "greedy"), (("iid",), "greedy"), (("iid",), "typical"), ((), "typical")],
)
def test_inexact_pairs_are_refused_or_reported(kinds: tuple[tree.Kind, ...], name: str) -> None:
    with pytest.raises(UsageError, match="changes the distribution") as refusal:
        choose_verifier(kinds, name, temperature=0.7, lossy=False)
    assert "--lossy" in str(refusal.value.hint)
    assert not choose_verifier(kinds, name, temperature=0.7, lossy=True).lossless


@pytest.mark.parametrize("kinds", [("deterministic",), ("distinct",), ("iid", "deterministic")])
def test_k_seq_is_for_independent_draws(kinds: tuple[tree.Kind, ...]) -> None:
    with pytest.raises(UsageError, match="drawn independently"):
        choose_verifier(kinds, "k-seq", temperature=1, lossy=True)
    assert choose_verifier(("iid",), "k-seq", temperature=1, lossy=False).lossless


def test_lossy_does_not_spoil_an_exact_pair() -> None:
    assert choose_verifier(("iid",), "token-match", temperature=1, lossy=True).lossless


def test_unknown_verifier() -> None:
    with pytest.raises(UsageError, match="no verifier is called 'chian'"):
        choose_verifier((), "chian", temperature=0, lossy=False)
