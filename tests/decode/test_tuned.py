"""The acceptance rates of nodes, and trees that bring the most tokens per second.

No test reads a real clock.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from spectool.decode import tree
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.policy import curve as curves
from spectool.decode.policy import tuned as tuned_module
from spectool.decode.policy.costs import Costs
from spectool.decode.policy.curve import SIZES, Curve, Experts
from spectool.decode.policy.tuned import Rates, Tuned
from spectool.decode.protocol import Drafter, Needs, Outcome
from spectool.decode.request import Request
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import Draft, Kind

from .conftest import plain_text, request_of
from .trees import path_to

Tiny = Callable[..., PreTrainedModel]
NONE: Any = None


def line(slope: float) -> Curve:
    """Return the curve of a step of n rows in 1 + slope (n - 1) seconds."""
    return Curve({1: {1: 1.0, 64: 1.0 + 63 * slope}, 2: {1: 1.0 + slope, 64: 1.0 + 127 * slope}})


def costs_of(curve: Curve, target: Any = NONE) -> Costs:
    """Return the costs that a curve tells, with one number of threads."""
    return Costs(target, curves={1: curve})


class Known(Rates):
    """Rates that are given."""

    def __init__(self, rates: dict[Any, float]) -> None:
        super().__init__()
        self.rates = rates

    def estimate(self, key: Any, now: int, prior: float = 0.0) -> float:
        return self.rates[key]


class Fixed(Drafter):
    """A drafter of given trees, a level of which takes `seconds`; records its calls."""

    name = "fixed"
    needs = Needs()

    def __init__(
        self,
        draft: Callable[[int], Draft],
        clock: Any,
        *,
        seconds: float = 0.0,
        can_be_cut: bool = True,
    ) -> None:
        self.draft, self.clock, self.seconds, self.can_be_cut = draft, clock, seconds, can_be_cut
        self.budgets: list[int] = []

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        self.budgets.append(budget[0])
        drafts = [self.draft(limit) for limit in budget]
        self.clock.now += self.seconds * max(max(draft.depths) for draft in drafts)
        return drafts


def tune(drafter: Fixed, curve: Curve, *, credit: float = 1.0) -> Tuned:
    """Return the policy that tunes a drafter, with so much credit for each batch size."""
    tuned = Tuned(costs_of(curve), cuts=drafter.can_be_cut)
    tuned._accounts = defaultdict(lambda: tuned_module._Account(credit=credit))
    drafter.policies = [tuned]
    return tuned


def propose(drafter: Fixed, budgets: Sequence[int]) -> Sequence[Draft]:
    """Return drafts as the engine asks for them, for one request a budget."""
    (policy,) = drafter.policies
    requests = [request_of([5], index) for index in range(len(budgets))]
    limits = policy.limit(requests, budgets, NONE)
    drafts: Sequence[Draft] = [tree.root(5) for _ in requests]
    return policy.shape(drafter.propose(requests, limits) if any(limits) else drafts)


def play(drafter: Fixed, stands: Callable[[Draft], list[int]], passes: Curve, clock: Any) -> Draft:
    """Run one round of one request: its draft is fed for as long as `passes` says."""
    (draft,) = propose(drafter, [99])
    seconds = passes.seconds(len(draft))
    clock.now += seconds
    outcome = Outcome(request=request_of([5]), draft=draft, path=stands(draft), next_token=0)
    drafter.policies[0].learn([outcome], seconds)
    return draft


def accept_none(draft: Draft) -> list[int]:
    return [0]


def accept_all(draft: Draft) -> list[int]:
    return path_to(draft, len(draft) - 1)


def chain_of(limit: int) -> Draft:
    return tree.chain([5] * (1 + min(limit, 8)), kind="deterministic")


def random_draft(noise: random.Random, size: int) -> Draft:
    """Return a tree of `size` nodes of different tokens, the root included, of a few sources."""
    return Draft(
        noise.sample(range(320), size),
        [-1, *(noise.randrange(node) for node in range(1, size))],
        ["deterministic"] * size,
        sources=[(), *(noise.randrange(5) for _ in range(1, size))],
    )


# --- Rates ---


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_a_rate_comes_to_how_often_nodes_stand(share: float) -> None:
    noise, rates = random.Random(1), Rates()
    for now in range(1500):
        rates.update("a", noise.random() < share, now)
    assert rates.estimate("a", 1500) == pytest.approx(share, abs=0.06)
    assert rates.estimate("b", 1500) == 0.4
    assert rates.estimate("b", 1500, prior=0.7) == 0.7


def test_a_rate_is_its_definition() -> None:
    """Each trial weighs half after 400 rounds, and the prior as much as two new trials."""
    noise, rates = random.Random(2), Rates()
    trials: list[tuple[int, bool]] = []
    now = 0
    for _ in range(40):
        now += noise.randrange(150)
        trials.append((now, noise.random() < 0.6))
        rates.update("a", trials[-1][1], now)
    now += 77
    weights = [0.5 ** ((now - then) / 400) for then, _ in trials]
    hits = sum(w for w, (_, stood) in zip(weights, trials, strict=True) if stood)
    assert rates.estimate("a", now) == pytest.approx((hits + 2 * 0.4) / (sum(weights) + 2))


def test_a_rate_is_forgotten_with_age() -> None:
    rates = Rates()
    for now in range(100):
        rates.update("a", False, now)
    found = [rates.estimate("a", 100 + age) for age in (0, 400, 800, 4000, 40000)]
    assert found == sorted(found)
    assert found[0] < 0.01
    assert found[-1] == pytest.approx(0.4)


# --- Which nodes are fed ---


def test_where_passes_cost_the_same_the_whole_tree_is_fed(clock: Any) -> None:
    noise = random.Random(0)
    for size in (1, 2, 5, 33, 64):
        whole = random_draft(noise, size)
        inner = Fixed(lambda limit, whole=whole: whole, clock)
        tune(inner, line(0))
        for _ in range(3):
            draft = play(inner, accept_none, line(0), clock)
            assert (draft.tokens, draft.parents) == (whole.tokens, whole.parents)
            assert draft.kinds == whole.kinds
            assert draft.sources == whole.sources


def test_where_a_token_costs_a_pass_nothing_is_fed(clock: Any) -> None:
    inner = Fixed(chain_of, clock)
    tune(inner, line(1))
    sizes = [len(play(inner, accept_all, line(1), clock)) for _ in range(100)]
    # Three probes, and no more.
    assert sum(size > 1 for size in sizes) <= 3


def test_what_never_stands_is_fed_no_longer(clock: Any) -> None:
    """Drafting is tried again now and then, once the rates are old."""
    inner = Fixed(chain_of, clock)
    tune(inner, line(0.1))
    sizes = [len(play(inner, accept_none, line(0.1), clock)) for _ in range(1500)]
    assert sizes[0] > 1
    assert sum(size > 1 for size in sizes[30:130]) <= 4
    assert 1 <= sum(size > 1 for size in sizes[130:]) < 70


def test_what_always_stands_is_fed_whole(clock: Any) -> None:
    """9 tokens in 1.8 seconds are more than 4 in 1.3, a local optimum on the way."""
    inner = Fixed(chain_of, clock)
    tune(inner, line(0.1))
    sizes = [len(play(inner, accept_all, line(0.1), clock)) for _ in range(60)]
    assert sizes[-20:] == [9] * 20


def node_probs(rates: dict[Any, float], draft: Draft) -> list[float]:
    assert draft.sources is not None
    found = [1.0]
    for node in range(1, len(draft)):
        rate = rates[draft.sources[node], draft.depths[node]]
        found.append(found[draft.parents[node]] * rate)
    return found


def closed_sets(draft: Draft) -> list[tuple[int, ...]]:
    """Return all sets of nodes that are trees: with the root, and each with its parent."""
    nodes = range(1, len(draft))
    return [
        (0, *chosen)
        for size in range(len(draft))
        for chosen in itertools.combinations(nodes, size)
        if all(draft.parents[node] in (0, *chosen) for node in chosen)
    ]


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("num_requests", [1, 2])
def test_the_fed_trees_bring_the_most_tokens_a_second(
    clock: Any, num_requests: int, slope: float
) -> None:
    """Against all trees that can be cut from small ones, for each size that is chosen among."""
    noise, fed = random.Random(num_requests), set()
    for _ in range(25):
        drafts = [random_draft(noise, noise.randint(1, 9)) for _ in range(num_requests)]
        left = iter(drafts)
        inner = Fixed(lambda limit, left=left: next(left), clock)
        tuned = tune(inner, line(slope), credit=99)
        known = {key: noise.random() for key in itertools.product(range(5), range(1, 9))}
        tuned.rates = Known(known)
        each = [node_probs(known, draft) for draft in drafts]
        largest = max(map(len, drafts))
        rates = {}
        for size in {*SIZES[:6], largest}:
            best = [
                max(
                    sum(probs[node] for node in chosen)
                    for chosen in closed_sets(draft)
                    if len(chosen) <= size
                )
                for draft, probs in zip(drafts, each, strict=True)
            ]
            rates[size] = sum(best) / line(slope).seconds(num_requests * size)
        # Plain decoding wins where drafting is better by less than 3 %.
        rates[1] *= 1.03
        kept = propose(inner, [99] * num_requests)
        size = max(map(len, kept))
        kept_nodes = [
            [whole.tokens.index(token) for token in cut.tokens]
            for whole, cut in zip(drafts, kept, strict=True)
        ]
        tokens = sum(
            sum(probs[node] for node in nodes)
            for probs, nodes in zip(each, kept_nodes, strict=True)
        )
        rate = tokens / line(slope).seconds(num_requests * size) * (1.03 if size == 1 else 1)
        assert rate == pytest.approx(max(rates.values()))
        for whole, cut, nodes in zip(drafts, kept, kept_nodes, strict=True):
            assert nodes == sorted(nodes)
            assert nodes[0] == 0
            assert cut.sources is not None and whole.sources is not None
            assert cut.sources == [whole.sources[node] for node in nodes]
            above = [nodes[parent] for parent in cut.parents[1:]]
            assert above == [whole.parents[node] for node in nodes[1:]]
        fed.add(size)
    assert len(fed) > 1


def test_the_time_of_drafting_counts(clock: Any) -> None:
    """If a draft was expensive to make, more of it is worth feeding."""
    sizes = []
    for seconds in (0.0, 0.5, 5.0):
        inner = Fixed(chain_of, clock, seconds=seconds)
        tune(inner, line(0.3), credit=99)
        sizes.append(len(propose(inner, [99])[0]))
    assert sizes == sorted(set(sizes))


def test_tokens_are_never_looked_at(clock: Any) -> None:
    noise = random.Random(3)
    fed = set()
    for _ in range(30):
        draft = random_draft(noise, 30)
        draft.sources = list(range(30))
        shuffled = copy.deepcopy(draft)
        noise.shuffle(shuffled.tokens)
        left = iter([draft, shuffled])
        inner = Fixed(lambda limit, left=left: next(left), clock)
        tuned = tune(inner, line(0.05), credit=99)
        keys = itertools.product(range(30), range(1, 30))
        tuned.rates = Known({key: noise.random() for key in keys})
        one, two = propose(inner, [99, 99])
        assert one.sources == two.sources
        assert one.parents == two.parents
        fed.add(len(one))
    assert fed - {1, 30}


def test_nodes_count_where_their_parent_stood(clock: Any) -> None:
    """Of 0 - 1 - 3 and 0 - 2 - 4, path 0 1: 1 was accepted, 2 and 3 not, 4 was not tested."""
    kinds: list[Kind] = ["deterministic"] * 5
    whole = Draft([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2], kinds, sources=[(), "a", "b", "c", "d"])
    inner = Fixed(lambda limit: whole, clock)
    tuned = tune(inner, line(0))
    for _ in range(50):
        play(inner, lambda draft: [0, 1], line(0), clock)
    found = [tuned.rates.estimate(key, 50) for key in [("a", 1), ("b", 1), ("c", 2), ("d", 2)]]
    assert found == pytest.approx([1.0, 0.0, 0.0, 0.4], abs=0.03)


# --- Rests ---


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.3, 4.0])
@pytest.mark.parametrize("slope", [0.02, 0.3])
@pytest.mark.parametrize("can_be_cut", [True, False])
def test_drafting_that_never_pays_costs_little(
    clock: Any, slope: float, seconds: float, can_be_cut: bool
) -> None:
    """At most a plain step, two rounds that overdraw the credit, and 1 % of all steps."""
    inner = Fixed(chain_of, clock, seconds=seconds, can_be_cut=can_be_cut)
    tune(inner, line(slope))
    dearest, rounds = 0.0, 3000
    for _ in range(rounds):
        before = clock.now
        play(inner, accept_none, line(slope), clock)
        dearest = max(dearest, clock.now - before)
    assert clock.now <= rounds * 1.01 + 1 + 2 * dearest
    # It is not given up either, unless a draft takes as long as 32 steps.
    assert len(inner.budgets) >= 5 or seconds == 4


def test_drafting_that_pays_never_rests(clock: Any) -> None:
    inner = Fixed(chain_of, clock, seconds=0.1)
    tune(inner, line(0.1))
    for _ in range(200):
        play(inner, accept_all, line(0.1), clock)
    # Rounds 4, 16 and 64 are plain.
    assert len(inner.budgets) == 197


def test_a_bad_spell_is_outlived_by_what_was_gained(clock: Any) -> None:
    """Drafting lasts longer than in a bad start, and resumes as soon as it pays."""
    lengths = []
    for good in (0, 100):
        inner = Fixed(chain_of, clock, seconds=0.05)
        tuned = tune(inner, line(0.1))
        for _ in range(good):
            play(inner, accept_all, line(0.1), clock)
        before = len(inner.budgets)
        while not tuned._accounts[1].resting:
            play(inner, accept_none, line(0.1), clock)
        lengths.append(len(inner.budgets) - before)
        for _ in range(400):
            play(inner, accept_all, line(0.1), clock)
        before = len(inner.budgets)
        for _ in range(100):
            assert len(play(inner, accept_all, line(0.1), clock)) > 1
        assert len(inner.budgets) == before + 100
    assert 1 < lengths[0] < lengths[1] / 2


@pytest.mark.parametrize("can_be_cut", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_early_disturbance_is_outlived(clock: Any, can_be_cut: bool, at: int) -> None:
    """A draft that took as long as 500 steps, once, on a model of which a step takes no time."""
    inner = Fixed(chain_of, clock, can_be_cut=can_be_cut)
    tune(inner, line(0.1))
    for number in range(1, 300):
        inner.seconds = 62.5 if number == at else 0.01
        play(inner, accept_all, line(0.1), clock)
    # A level's cost is measured anew after 32 rounds.
    assert len(inner.budgets) > 260


def test_a_debt_has_a_limit(clock: Any) -> None:
    """Drafts that cost 1000 steps each for a while, and then little, are made again."""
    inner = Fixed(chain_of, clock, seconds=125.0)
    tune(inner, line(0.1))
    for _ in range(20):
        play(inner, accept_all, line(0.1), clock)
    inner.seconds = 0.0
    for _ in range(3600):
        play(inner, accept_all, line(0.1), clock)
    assert len(inner.budgets) > 300


# --- In company ---


def costs_of_rows(kind: str, rows: int) -> float:
    """Return what a step of some rows takes on a machine of some kind, in steps of one row."""
    if kind == "reading":
        # Weights are read once for up to 8 rows.
        return 1 + 0.01 * rows + 0.1 * max(0, rows - 8)
    if kind == "computing":
        return rows
    return Experts(count=16, chosen=2, share=0.8).reads(rows) + 0.05 * rows


def decode_together(
    clock: Any, batch: int, kind: str, share: float, tuned: Tuned | None, inner: Fixed, tokens: int
) -> float:
    """Return the seconds until each of `batch` requests has its tokens, `share` of nodes stand."""
    noise, began = random.Random(5), clock.now
    requests = [request_of([5], index) for index in range(batch)]
    brought = 0
    while brought < batch * tokens:
        limits: Sequence[int] = [0] * batch
        drafts: Sequence[Draft] = [tree.root(5)] * batch
        if tuned is not None:
            limits = tuned.limit(requests, [99] * batch, NONE)
            drafts = tuned.shape(inner.propose(requests, limits) if any(limits) else drafts)
        seconds = costs_of_rows(kind, batch * max(map(len, drafts)))
        clock.now += seconds
        outcomes = []
        for request, draft in zip(requests, drafts, strict=True):
            path = [0]
            while len(path) < len(draft) and noise.random() < share:
                path.append(len(path))
            brought += len(path)
            outcomes.append(Outcome(request=request, draft=draft, path=path, next_token=0))
        if tuned is not None:
            tuned.learn(outcomes, seconds)
    return float(clock.now - began)


@pytest.mark.parametrize("can_be_cut", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", ["reading", "computing", "experts"])
def test_drafting_never_loses_in_company(
    clock: Any, kind: str, share: float, can_be_cut: bool
) -> None:
    """At most 3 % of 128 tokens, at any batch size, with nothing known of costs at first."""
    for batch in (1, 2, 3, 4, 5, 8, 11, 16):
        inner = Fixed(chain_of, clock, seconds=0.001, can_be_cut=can_be_cut)
        experts = Experts(count=16, chosen=2, share=0.8) if kind == "experts" else None
        tuned = Tuned(costs_of(Curve(experts=experts)), cuts=can_be_cut)
        plain = decode_together(clock, batch, kind, share, None, inner, 128)
        drafted = decode_together(clock, batch, kind, share, tuned, inner, 128)
        assert plain / drafted >= 0.97
        if kind == "reading" and share >= 0.7 and batch <= 2:
            assert plain / drafted > 1.4


def test_larger_batches_never_feed_more_nodes(clock: Any) -> None:
    """At equal acceptance, where a row costs as much beside few rows as beside many."""
    for slope in (0.03, 0.1, 0.3):
        fed = []
        for batch in range(1, 17):
            inner = Fixed(chain_of, clock)
            points = {1: 1 + slope * (batch - 1), 64: 1 + slope * (64 * batch - 1)}
            tuned = tune(inner, Curve({batch: points}), credit=99)
            tuned.rates = Known({(None, depth): 0.8 for depth in range(1, 9)})
            fed.append(len(propose(inner, [99] * batch)[0]))
        assert fed == sorted(fed, reverse=True)
        assert fed[0] > fed[-1]


def test_where_the_curve_says_so_decoding_is_plain(clock: Any) -> None:
    """A batch size of which each node costs a step, beside one of which nodes cost little."""
    inner = Fixed(chain_of, clock)
    steep = {size: float(size) for size in SIZES}
    curve = Curve({1: {1: 1.0, 64: 1.1}, 8: steep})
    tune(inner, curve, credit=99)
    assert min(len(propose(inner, [99])[0]) for _ in range(3)) > 4
    assert {len(propose(inner, [99] * 8)[0]) for _ in range(20)} == {1}


def test_no_tree_could_lose_more_than_the_credit(clock: Any) -> None:
    """Nor is one fed that is more than twice as large as those of which the cost was seen."""
    for credit, nodes in ((0.0, 1), (0.35, 4), (99.0, 9)):
        inner = Fixed(chain_of, clock)
        tuned = tune(inner, line(0.1), credit=credit)
        tuned.rates = Known({(None, depth): 1.0 for depth in range(1, 9)})
        assert len(propose(inner, [99])[0]) == nodes
    inner = Fixed(chain_of, clock)
    tuned = tune(inner, Curve({1: {1: 1.0, 2: 1.0}}), credit=99)
    tuned.rates = Known({(None, depth): 1.0 for depth in range(1, 9)})
    assert len(propose(inner, [99])[0]) == 4


def test_what_pays_alone_is_no_credit_in_company(clock: Any) -> None:
    inner = Fixed(chain_of, clock)
    tuned = tune(inner, line(0.1))
    for _ in range(50):
        play(inner, accept_all, line(0.1), clock)
    assert tuned._accounts[1].credit == 16
    assert tuned._accounts[(8).bit_length()].credit == 1


# --- Depths, where trees may not be cut ---


def test_the_depth_is_where_tokens_stop_standing(clock: Any) -> None:
    """One token more is tried now and then."""
    inner = Fixed(chain_of, clock, can_be_cut=False)
    tune(inner, line(0.1))
    for _ in range(100):
        play(inner, lambda draft: list(range(min(len(draft), 4))), line(0.1), clock)
    assert set(inner.budgets[-50:]) <= {3, 4}
    assert inner.budgets[-50:].count(3) > 45


def test_the_depth_brings_the_most_tokens_a_second(clock: Any) -> None:
    """Against every depth, with random rates and costs of a level."""
    noise, found = random.Random(5), set()
    for _ in range(40):
        slope, seconds = noise.choice([0.02, 0.1, 0.3]), noise.choice([0.01, 0.1, 0.3])
        inner = Fixed(chain_of, clock, seconds=seconds, can_be_cut=False)
        tuned = tune(inner, line(slope), credit=99)
        # Measures the cost of a level.
        propose(inner, [99])
        known = {depth: noise.uniform(0.4, 1) for depth in range(1, 64)}
        tuned.rates = Known(known)
        rates, standing, tokens = {0: 1.0}, 1.0, 1.0
        for depth in range(1, 64):
            standing *= known[depth]
            tokens += standing
            rates[depth] = tokens / (line(slope).seconds(1 + depth) + depth * seconds)
        best = max(rates, key=lambda depth: rates[depth])
        inner.budgets.clear()
        draft = propose(inner, [99])[0]
        assert inner.budgets == ([best] if best else [])
        assert max(draft.depths) == min(best, 8)
        found.add(best)
    assert len(found) > 4


def test_the_depth_stays_in_the_budget(clock: Any) -> None:
    inner = Fixed(chain_of, clock, can_be_cut=False)
    tune(inner, line(0))
    # The first draft is one level deep, since the cost of a level is not known.
    assert len(propose(inner, [99])[0]) == 2
    drafts = propose(inner, [2, 0])
    assert [len(draft) for draft in drafts] == [3, 1]


def test_levels_that_cost_more_than_they_bring_are_not_drafted(clock: Any) -> None:
    inner = Fixed(chain_of, clock, seconds=1.5, can_be_cut=False)
    tune(inner, line(0))
    for _ in range(50):
        play(inner, accept_all, line(0), clock)
    assert len(inner.budgets) <= 2


# --- In the loop ---


def test_closing_keeps_the_curve(tiny: Tiny, clock: Any, cache_folder: Path) -> None:
    target = AttentionTarget(tiny("llama"))
    Tuned(costs_of(line(0.5), target), cuts=True).close()
    assert curves.read_curves() == {curves.machine_key(target, 1): line(0.5).points}


def test_a_curve_refined_on_a_busy_machine_is_not_kept(
    tiny: Tiny, clock: Any, cache_folder: Path
) -> None:
    """Nor later: the curve still contains what the busy batch did to it."""
    tuned = Tuned(costs_of(line(0.5), AttentionTarget(tiny("llama"))), cuts=True)
    for clock.waits in (0.5, 0.0):
        tuned.close()
        assert curves.read_curves() == {}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("spec", ["ngram+recycle", "jacobi", "draft_model"])
def test_greedy_text_does_not_depend_on_time(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    clock: Any,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    batch_size: int,
) -> None:
    """Times span seven orders of magnitude, with credit enough to go on whatever drafting costs."""
    monkeypatch.setattr(tuned_module, "_START_CREDIT", 1e9)
    monkeypatch.setattr(tuned_module, "_MAX_CREDIT", 1e9)
    model = endless(tiny("llama"))
    prompts, limits = [prompt_of(size) for size in (12, 5, 20)], [16, 5, 11]
    runner = Runner(model)
    plain = list(map(plain_text, [model] * 3, prompts, limits))
    drafted = []
    for seed in range(3):
        noise = random.Random(seed)
        clock.tick = lambda noise=noise: 10 ** noise.uniform(-6, 1)
        if spec == "draft_model":
            inner: Drafter = DraftModelDrafter(tiny("llama", 1), target=runner.target)
        else:
            inner = runner.open(spec)
        # A random curve, steeper or flatter.
        points = {size: noise.uniform(0.5, 1) * (1 + seed / 10 * size) for size in SIZES}
        inner.policies = [Tuned(costs_of(Curve({1: points}), runner.target), cuts=inner.can_be_cut)]
        runner.use(inner)
        results = runner.generate(prompts, max_new_tokens=limits, batch_size=batch_size)
        assert [r.token_ids for r in results] == plain
        drafted.append(sum(r.drafted for r in results))
    assert len(set(drafted)) > 1


@pytest.mark.parametrize("spec", ["ngram+recycle", "trigram", "jacobi", "skip", "draft_model"])
def test_a_drafter_observes_rounds_that_it_did_not_draft_in(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], clock: Any, spec: str
) -> None:
    """`observe` is called in rounds without a draft, also at the start and while requests leave."""
    runner = Runner(endless(tiny("llama-deep" if spec == "skip" else "llama")))
    prompts, limits = [prompt_of(12), prompt_of(7), prompt_of(9)], [24, 5, 15]
    plain = runner.generate(prompts, max_new_tokens=limits)
    inner = (
        DraftModelDrafter(runner.target.model, target=runner.target)
        if spec == "draft_model"
        else runner.open(spec)
    )
    tuned = Tuned(costs_of(line(0), runner.target), cuts=inner.can_be_cut)
    for digits in (1, 2):
        tuned._accounts[digits] = tuned_module._Account(credit=0.45, resting=True)
    inner.policies = [tuned]
    runner.use(inner)
    results = runner.generate(prompts, max_new_tokens=limits, batch_size=3)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert sum(r.drafted for r in results) > 0


def test_sampled_text_of_looked_up_drafts_is_plain_under_any_clock(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The emitted token is the target's own draw, whatever was fed."""
    monkeypatch.setattr(tuned_module, "_START_CREDIT", 1e9)
    monkeypatch.setattr(tuned_module, "_MAX_CREDIT", 1e9)
    runner, noise = Runner(endless(tiny("llama"))), random.Random(0)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "seed": 4}
    plain = runner.generate([prompt_of(15)], **options)[0]
    clock.tick = lambda: 10 ** noise.uniform(-6, 1)
    inner = runner.open("ngram+recycle")
    inner.policies = [Tuned(costs_of(line(0.1), runner.target), cuts=True)]
    runner.use(inner)
    result = runner.generate([prompt_of(15)], **options)[0]
    assert result.token_ids == plain.token_ids
    assert result.drafted > 0
