"""What passes cost, what nodes are worth, and that the choice is the best of both.

No test looks at a real clock.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode import tree, tune
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.drafters.ngram import NgramDrafter
from spectool.decode.generate import Runner
from spectool.decode.protocol import Drafter, Needs, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control, Draws
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.decode.tune import SIZES, Curve, Rates, Tuned

Tiny = Callable[..., PreTrainedModel]
NONE: Any = None


class Clock:
    """Stands still unless it is moved, or is to move at every look."""

    def __init__(self, tick: Callable[[], float] = lambda: 0.0) -> None:
        self.now = 0.0
        self.tick = tick

    def perf_counter(self) -> float:
        self.now += self.tick()
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(tune, "time", made)
    return made


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's curves are kept, away from other tests' curves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def row_of(tokens: list[int], index: int = 0) -> Row:
    return Row(
        index=index,
        tokens=list(tokens),
        draws=Draws(0, index),
        control=Control(),
        max_new_tokens=1000,
        context=1000,
    )


def line(slope: float) -> Curve:
    """A pass of n tokens takes 1 + slope (n - 1) seconds."""
    return Curve({1: 1.0, 64: 1.0 + 63 * slope})


class Known(Rates):
    """Rates that are what they are."""

    def __init__(self, rates: dict[Any, float]) -> None:
        super().__init__()
        self.rates = rates

    def of(self, key: Any, now: int, prior: float = 0.0) -> float:
        return self.rates[key]


class Fixed(Drafter):
    """Proposes what it is told to, which takes `seconds`; keeps account of what it is asked."""

    name = "fixed"
    needs = Needs()

    def __init__(
        self,
        draft: Callable[[int], Draft],
        clock: Clock,
        *,
        seconds: float = 0.0,
        combines: bool = True,
    ) -> None:
        self.draft, self.clock, self.seconds, self.combines = draft, clock, seconds, combines
        self.budgets: list[int] = []
        self.heard = 0
        self.closed = False

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[Prompt], cache: Any) -> None:
        pass

    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        self.budgets.append(budget[0])
        drafts = [self.draft(limit) for limit in budget]
        self.clock.now += self.seconds * max(max(draft.depths) for draft in drafts)
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.heard += 1

    def close(self) -> None:
        self.closed = True


def play(tuned: Tuned, stands: Callable[[Draft], list[int]], passes: Curve, clock: Clock) -> Draft:
    """One round of one row: its draft, fed for as long as `passes` says."""
    row = row_of([5])
    draft = tuned.propose([row], [99])[0]
    clock.now += passes.seconds(len(draft))
    tuned.observe([Outcome(row=row, draft=draft, path=stands(draft), next_token=0)])
    return draft


def none_stands(draft: Draft) -> list[int]:
    return [0]


def all_stand(draft: Draft) -> list[int]:
    return draft.path(len(draft) - 1)


def chain_of(limit: int) -> Draft:
    return tree.chain([5] * (1 + min(limit, 8)), kind="deterministic")


def random_draft(noise: random.Random, size: int) -> Draft:
    """A tree of `size` nodes of different tokens, the root included, of a few sources."""
    return Draft(
        noise.sample(range(320), size),
        [-1, *(noise.randrange(node) for node in range(1, size))],
        ["deterministic"] * size,
        sources=[(), *(noise.randrange(5) for _ in range(1, size))],
    )


# --- Curve ---


def test_a_curve_is_straight_between_what_is_known_and_beyond() -> None:
    curve = Curve({1: 1.0, 4: 2.5, 8: 2.7})
    found = [curve.seconds(n) for n in (1, 2, 3, 4, 6, 8, 28)]
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5, 2.6, 2.7, 3.7])


def test_a_curve_of_one_point_rises_by_what_is_assumed() -> None:
    curve = Curve({1: 2.0})
    assert [curve.seconds(n) for n in (1, 2, 5)] == pytest.approx([2.0, 2.5, 4.0])


def test_a_curve_never_falls() -> None:
    """Whatever was measured, and however it is refined."""
    noise = random.Random(0)
    for _ in range(50):
        sizes = [1, *noise.sample(SIZES[1:], noise.randint(0, len(SIZES) - 1))]
        curve = Curve({size: noise.uniform(0.1, 2) for size in sizes})
        for _ in range(10):
            curve.refine(noise.choice(SIZES), noise.uniform(0.01, 3))
        seconds = [curve.seconds(tokens) for tokens in range(1, 150)]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0


def test_a_refined_curve_comes_to_what_steps_take() -> None:
    curve = line(0.5)
    for _ in range(60):
        curve.refine(1, 2.0)
        # Was not measured: begins between its neighbours.
        curve.refine(8, 3.0)
    assert curve.seconds(1) == pytest.approx(2.0, rel=0.01)
    assert curve.seconds(8) == pytest.approx(3.0, rel=0.01)
    curve.refine(16, curve.seconds(16))
    assert 3.0 < curve.points[16] < curve.points[64] == 32.5


@pytest.mark.parametrize(("tokens", "seconds"), [(5, 2.0), (65, 2.0)])
def test_sizes_that_are_not_chosen_among_change_nothing(tokens: int, seconds: float) -> None:
    curve = line(0.5)
    curve.refine(tokens, seconds)
    assert curve.points == line(0.5).points


def test_a_hiccup_counts_little_and_a_lasting_change_in_full() -> None:
    curve = line(0.5)
    curve.refine(1, 1e9)
    assert curve.seconds(1) == pytest.approx(1.2)
    for _ in range(200):
        curve.refine(1, 50.0)
    assert curve.seconds(1) == pytest.approx(50.0, rel=0.01)


# --- Measuring and keeping ---


@pytest.mark.parametrize("context", [2, 40, 63, 90, 256])
def test_measuring_stays_inside_the_context(
    tiny: Tiny, clock: Clock, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    monkeypatch.setattr(tune, "_REPEATS", 1)
    target = Target(tiny("gpt2"), context=context)
    ends = []
    own = target.verify

    def verify(cache: Any, drafts: list[Draft]) -> Any:
        ends.append(cache.lengths[0] + len(drafts[0]))
        return own(cache, drafts)

    target.verify = verify  # type: ignore[method-assign]
    curve = tune.measure(target)
    assert max(ends, default=0) <= context
    assert set(curve.points) == {1} | {size for size in SIZES if size < context}


def test_measuring_takes_no_longer_than_it_may(tiny: Tiny, clock: Clock) -> None:
    """A pass that has begun is finished, and one size is always known."""
    target, passes = Target(tiny("llama")), []
    own = target.verify
    target.verify = lambda *given: passes.append(given) or own(*given)  # type: ignore
    clock.tick = lambda: 1.0
    assert tune.measure(target).points == {1: 1.0}
    # The first pass of a size does not count.
    assert len(passes) == 2
    passes.clear()
    clock.tick = lambda: 0.004
    assert 1 < len(tune.measure(target).points) < len(SIZES)
    assert len(passes) * 0.008 <= 0.72


def test_a_curve_is_measured_once(
    tiny: Tiny, clock: Clock, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.tick = lambda: 0.02
    target = Target(tiny("llama"))
    first = tune.curve_of(target)
    tune.keep(Target(tiny("gpt2")), Curve({1: 9.0, 2: 9.5, 5: 10.0}))
    monkeypatch.setattr(tune, "measure", None)
    again = tune.curve_of(Target(tiny("llama")))
    assert again.points == first.points
    assert again.found == "known from before"
    # Only sizes that are chosen among are kept, and nothing but the file is left.
    assert tune.curve_of(Target(tiny("gpt2"))).points == {1: 9.0, 2: 9.5}
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == [tune.curves_path()]


def test_what_a_passs_time_depends_on_tells_curves_apart(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    models = [tiny("llama"), tiny("qwen3"), tiny("llama-deep"), half]
    keys = {tune._key(Target(model)) for model in models}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    keys.add(tune._key(Target(tiny("llama"))))
    assert len(keys) == 5
    # Other weights of the same sizes are as fast.
    assert tune._key(Target(tiny("llama"))) == tune._key(Target(tiny("llama", 1)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"KEY": null}',
        '{"KEY": 1}',
        '{"KEY": "1"}',
        '{"KEY": {"1": "x"}}',
        '{"KEY": {"1": 0.5, "many": 1}}',
        '{"KEY": {"1": [0.5]}}',
        '{"KEY": {"2": 0.5}}',
        '{"KEY": {}}',
    ],
)
def test_a_damaged_file_is_no_curve_and_is_replaced(
    tiny: Tiny, clock: Clock, cache_folder: Path, text: str
) -> None:
    clock.tick = lambda: 0.4
    target = Target(tiny("llama"))
    path = tune.curves_path()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", tune._key(target)))
    assert tune.read_curves() == {}
    curve = tune.curve_of(target)
    assert curve.found.startswith("measured")
    assert tune.read_curves() == {tune._key(target): curve.points}


@pytest.mark.parametrize("blocked", [".", "spectool", "spectool/curves.json"])
def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    tiny: Tiny, clock: Clock, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """A file where a folder should be, or a folder where the file should be."""
    place = cache_folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    clock.tick = lambda: 0.4
    if blocked.endswith("json"):
        (place / blocked).mkdir(parents=True)
    else:
        (place / blocked).parent.mkdir(parents=True, exist_ok=True)
        (place / blocked).write_text("")
    before = sorted(cache_folder.rglob("*"))
    assert 1 in tune.curve_of(Target(tiny("llama"))).points
    assert sorted(cache_folder.rglob("*")) == before


# --- Rates ---


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_a_rate_comes_to_how_often_nodes_stand(share: float) -> None:
    noise, rates = random.Random(1), Rates()
    for now in range(1500):
        rates.learn("a", noise.random() < share, now)
    assert rates.of("a", 1500) == pytest.approx(share, abs=0.06)
    assert rates.of("b", 1500) == 0.4
    assert rates.of("b", 1500, prior=0.7) == 0.7


def test_a_rate_is_its_definition() -> None:
    """Each trial weighs half after 400 rounds, and the prior as much as two of now."""
    noise, rates = random.Random(2), Rates()
    trials: list[tuple[int, bool]] = []
    now = 0
    for _ in range(40):
        now += noise.randrange(150)
        trials.append((now, noise.random() < 0.6))
        rates.learn("a", trials[-1][1], now)
    now += 77
    weights = [0.5 ** ((now - then) / 400) for then, _ in trials]
    hits = sum(w for w, (_, stood) in zip(weights, trials, strict=True) if stood)
    assert rates.of("a", now) == pytest.approx((hits + 2 * 0.4) / (sum(weights) + 2))


def test_a_rate_is_forgotten_with_age() -> None:
    rates = Rates()
    for now in range(100):
        rates.learn("a", False, now)
    found = [rates.of("a", 100 + age) for age in (0, 400, 800, 4000, 40000)]
    assert found == sorted(found)
    assert found[0] < 0.01
    assert found[-1] == pytest.approx(0.4)


# --- Which nodes are fed ---


def test_where_passes_cost_the_same_the_whole_tree_is_fed(clock: Clock) -> None:
    noise = random.Random(0)
    for size in (1, 2, 5, 33, 64):
        whole = random_draft(noise, size)
        tuned = Tuned(Fixed(lambda limit, whole=whole: whole, clock), NONE, line(0))
        for _ in range(5):
            draft = play(tuned, none_stands, line(0), clock)
            assert (draft.tokens, draft.parents) == (whole.tokens, whole.parents)
            assert draft.kinds == whole.kinds
            assert draft.sources == whole.sources


def test_where_a_token_costs_a_pass_nothing_is_fed(clock: Clock) -> None:
    tuned = Tuned(Fixed(chain_of, clock), NONE, line(1))
    sizes = [len(play(tuned, all_stand, line(1), clock)) for _ in range(100)]
    # Three probes, and no more.
    assert sum(size > 1 for size in sizes) <= 3


def test_what_never_stands_is_fed_no_longer(clock: Clock) -> None:
    """It is tried again now and then, when it is old."""
    tuned = Tuned(Fixed(chain_of, clock), NONE, line(0.1))
    sizes = [len(play(tuned, none_stands, line(0.1), clock)) for _ in range(1500)]
    assert sizes[0] > 1
    assert sum(size > 1 for size in sizes[30:130]) <= 4
    assert 1 <= sum(size > 1 for size in sizes[130:]) < 70


def test_what_always_stands_is_fed_whole(clock: Clock) -> None:
    """9 tokens in 1.8 seconds are more than 4 in 1.3, where it may come to rest."""
    tuned = Tuned(Fixed(chain_of, clock), NONE, line(0.1))
    sizes = [len(play(tuned, all_stand, line(0.1), clock)) for _ in range(60)]
    assert sizes[-20:] == [9] * 20


def worths(rates: dict[Any, float], draft: Draft) -> list[float]:
    assert draft.sources is not None
    found = [1.0]
    for node in range(1, len(draft)):
        rate = rates[draft.sources[node], draft.depths[node]]
        found.append(found[draft.parents[node]] * rate)
    return found


def closed_sets(draft: Draft) -> list[tuple[int, ...]]:
    """All sets of nodes that are trees: with the root, and each with its parent."""
    nodes = range(1, len(draft))
    return [
        (0, *chosen)
        for size in range(len(draft))
        for chosen in itertools.combinations(nodes, size)
        if all(draft.parents[node] in (0, *chosen) for node in chosen)
    ]


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_fed_trees_bring_the_most_tokens_a_second(
    clock: Clock, rows: int, slope: float
) -> None:
    """Against all trees that can be cut from small ones, of each size that is chosen among."""
    noise, fed = random.Random(rows), set()
    for _ in range(25):
        drafts = [random_draft(noise, noise.randint(1, 9)) for _ in range(rows)]
        left = iter(drafts)
        tuned = Tuned(Fixed(lambda limit, left=left: next(left), clock), NONE, line(slope))
        known = {key: noise.random() for key in itertools.product(range(5), range(1, 9))}
        tuned.rates = Known(known)
        each = [worths(known, draft) for draft in drafts]
        largest = max(map(len, drafts))
        rates = {}
        for size in {*SIZES[:6], largest}:
            best = [
                max(
                    sum(worth[node] for node in chosen)
                    for chosen in closed_sets(draft)
                    if len(chosen) <= size
                )
                for draft, worth in zip(drafts, each, strict=True)
            ]
            rates[size] = sum(best) / line(slope).seconds(rows * size)
        kept = tuned.propose([row_of([5], at) for at in range(rows)], [99] * rows)
        size = max(map(len, kept))
        places = [
            [whole.tokens.index(token) for token in cut.tokens]
            for whole, cut in zip(drafts, kept, strict=True)
        ]
        tokens = sum(
            sum(worth[node] for node in nodes) for worth, nodes in zip(each, places, strict=True)
        )
        assert tokens / line(slope).seconds(rows * size) == pytest.approx(max(rates.values()))
        for whole, cut, nodes in zip(drafts, kept, places, strict=True):
            assert nodes == sorted(nodes)
            assert nodes[0] == 0
            assert cut.sources is not None and whole.sources is not None
            assert cut.sources == [whole.sources[node] for node in nodes]
            above = [nodes[parent] for parent in cut.parents[1:]]
            assert above == [whole.parents[node] for node in nodes[1:]]
        fed.add(size)
    assert len(fed) > 1


def test_the_time_of_drafting_counts(clock: Clock) -> None:
    """Where a draft was expensive to make, more of it is worth feeding."""
    sizes = []
    for seconds in (0.0, 0.5, 5.0):
        tuned = Tuned(Fixed(chain_of, clock, seconds=seconds), NONE, line(0.3))
        sizes.append(len(tuned.propose([row_of([5])], [99])[0]))
    assert sizes == sorted(set(sizes))


def test_tokens_are_never_looked_at(clock: Clock) -> None:
    noise = random.Random(3)
    fed = set()
    for _ in range(30):
        draft = random_draft(noise, 30)
        draft.sources = list(range(30))
        shuffled = copy.deepcopy(draft)
        noise.shuffle(shuffled.tokens)
        left = iter([draft, shuffled])
        tuned = Tuned(Fixed(lambda limit, left=left: next(left), clock), NONE, line(0.05))
        keys = itertools.product(range(30), range(1, 30))
        tuned.rates = Known({key: noise.random() for key in keys})
        one, two = tuned.propose([row_of([5], 0), row_of([5], 1)], [99, 99])
        assert one.sources == two.sources
        assert one.parents == two.parents
        fed.add(len(one))
    assert fed - {1, 30}


def test_nodes_count_where_their_parent_stood(clock: Clock) -> None:
    """Of 0 - 1 - 3 and 0 - 2 - 4, path 0 1: 1 stood, 2 and 3 fell, of 4 nothing is known."""
    kinds: list[Kind] = ["deterministic"] * 5
    whole = Draft([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2], kinds, sources=[(), "a", "b", "c", "d"])
    tuned = Tuned(Fixed(lambda limit: whole, clock), NONE, line(0))
    for _ in range(50):
        play(tuned, lambda draft: [0, 1], line(0), clock)
    found = [tuned.rates.of(key, 50) for key in [("a", 1), ("b", 1), ("c", 2), ("d", 2)]]
    assert found == pytest.approx([1.0, 0.0, 0.0, 0.4], abs=0.03)


# --- Rests ---


def test_drafting_that_does_not_pay_rests_ever_longer(clock: Clock) -> None:
    """Every rest follows on twelve rounds that drafted, and on nothing else."""
    inner = Fixed(chain_of, clock, seconds=0.1)
    tuned, asked = Tuned(inner, NONE, line(0.1)), []
    for _ in range(1200):
        before = len(inner.budgets)
        draft = play(tuned, none_stands, line(0.1), clock)
        asked.append(len(inner.budgets) > before)
        assert asked[-1] or len(draft) == 1
    runs = [(drafted, len(list(rounds))) for drafted, rounds in itertools.groupby(asked)]
    assert [size for drafted, size in runs if not drafted][:6] == [16, 32, 64, 128, 256, 256]
    assert {size for drafted, size in runs[:-1] if drafted} == {12}
    assert inner.heard == 1200


def test_drafting_that_pays_again_goes_on(clock: Clock) -> None:
    inner = Fixed(chain_of, clock, seconds=0.01)
    tuned = Tuned(inner, NONE, line(0.1))
    for _ in range(200):
        play(tuned, none_stands, line(0.1), clock)
    assert len(inner.budgets) < 100
    for _ in range(800):
        play(tuned, all_stand, line(0.1), clock)
    before = len(inner.budgets)
    for _ in range(100):
        assert len(play(tuned, all_stand, line(0.1), clock)) > 1
    assert len(inner.budgets) == before + 100
    # Having paid, its next rest is a short one.
    asked = []
    for _ in range(60):
        before = len(inner.budgets)
        play(tuned, none_stands, line(0.1), clock)
        asked.append(len(inner.budgets) > before)
    rests = [len(list(run)) for drafted, run in itertools.groupby(asked) if not drafted]
    assert rests[0] == 16


def test_drafting_that_pays_never_rests(clock: Clock) -> None:
    inner = Fixed(chain_of, clock, seconds=0.1)
    tuned = Tuned(inner, NONE, line(0.1))
    for _ in range(200):
        play(tuned, all_stand, line(0.1), clock)
    assert len(inner.budgets) == 200


# --- Depths, where trees may not be cut ---


def test_the_depth_is_where_tokens_stop_standing(clock: Clock) -> None:
    """A token more is tried now and then."""
    inner = Fixed(chain_of, clock, combines=False)
    tuned = Tuned(inner, NONE, line(0.1))
    for _ in range(100):
        play(tuned, lambda draft: list(range(min(len(draft), 4))), line(0.1), clock)
    assert set(inner.budgets[-50:]) <= {3, 4}
    assert inner.budgets[-50:].count(3) > 45


def test_the_depth_brings_the_most_tokens_a_second(clock: Clock) -> None:
    """Against every depth, with rates of its own each and the time that a level takes to draft."""
    noise, found = random.Random(5), set()
    for _ in range(40):
        slope, seconds = noise.choice([0.02, 0.1, 0.3]), noise.choice([0.01, 0.1, 0.3])
        inner = Fixed(chain_of, clock, seconds=seconds, combines=False)
        tuned = Tuned(inner, NONE, line(slope))
        # Learns what a level takes.
        tuned.propose([row_of([5])], [99])
        known = {depth: noise.uniform(0.4, 1) for depth in range(1, 64)}
        tuned.rates = Known(known)
        rates, standing, tokens = {0: 1.0}, 1.0, 1.0
        for depth in range(1, 64):
            standing *= known[depth]
            tokens += standing
            rates[depth] = tokens / (line(slope).seconds(1 + depth) + depth * seconds)
        best = max(rates, key=lambda depth: rates[depth])
        inner.budgets.clear()
        draft = tuned.propose([row_of([5])], [99])[0]
        assert inner.budgets == ([best] if best else [])
        assert max(draft.depths) == min(best, 8)
        found.add(best)
    assert len(found) > 4


def test_the_depth_stays_in_the_budget(clock: Clock) -> None:
    inner = Fixed(chain_of, clock, combines=False)
    tuned = Tuned(inner, NONE, line(0))
    drafts = tuned.propose([row_of([5], 0), row_of([5], 1)], [2, 0])
    assert [len(draft) for draft in drafts] == [3, 1]


def test_levels_that_cost_more_than_they_bring_are_not_drafted(clock: Clock) -> None:
    inner = Fixed(chain_of, clock, seconds=1.5, combines=False)
    tuned = Tuned(inner, NONE, line(0))
    for _ in range(50):
        play(tuned, all_stand, line(0), clock)
    assert len(inner.budgets) == 1
    assert inner.heard == 50


# --- In the loop ---


def test_closing_keeps_the_curve_and_closes_the_drafter(
    tiny: Tiny, clock: Clock, cache_folder: Path
) -> None:
    target, inner = Target(tiny("llama")), Fixed(chain_of, clock)
    tuned = Tuned(inner, target, line(0.5))
    tuned.close()
    assert inner.closed
    assert tune.curve_of(target).points == line(0.5).points


def test_it_is_the_drafter_that_it_tunes(clock: Clock) -> None:
    tuned = Tuned(NgramDrafter(), NONE, line(0))
    assert (tuned.name, tuned.needs) == ("ngram", NgramDrafter.needs)
    assert tuned.kinds(Control()) == ("deterministic",)
    assert not tuned.combines


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("spec", ["ngram+recycle", "jacobi", "draft_model"])
def test_greedy_text_does_not_depend_on_time(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    clock: Clock,
    cache_folder: Path,
    spec: str,
    batch_size: int,
) -> None:
    """Of seven orders of magnitude."""
    model = endless(tiny("llama"))
    prompts, limits = [prompt_of(size) for size in (12, 5, 20)], [24, 7, 17]
    runner = Runner(model)
    plain = runner.generate(prompts, max_new_tokens=limits)
    drafted = []
    for seed in range(2):
        noise = random.Random(seed)
        clock.tick = lambda noise=noise: 10 ** noise.uniform(-6, 1)
        if spec == "draft_model":
            inner: Drafter = DraftModelDrafter(tiny("llama", 1), target=runner.target)
        else:
            inner = runner.open(spec)
        # Random, too, and steeper or flatter.
        points = {size: noise.uniform(0.5, 1) * (1 + seed / 10 * size) for size in SIZES}
        runner.use(Tuned(inner, runner.target, Curve(points)))
        results = runner.generate(prompts, max_new_tokens=limits, batch_size=batch_size)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        drafted.append(sum(r.drafted for r in results))
    assert len(set(drafted)) > 1


@pytest.mark.parametrize("spec", ["ngram+recycle", "trigram", "jacobi", "skip", "draft_model"])
def test_a_drafter_hears_of_rounds_that_it_was_not_asked_for(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], clock: Clock, spec: str
) -> None:
    """It rests, or nothing pays, from the first round on and while rows leave the batch."""
    runner = Runner(endless(tiny("llama-deep" if spec == "skip" else "llama")))
    prompts, limits = [prompt_of(12), prompt_of(7), prompt_of(9)], [24, 5, 15]
    plain = runner.generate(prompts, max_new_tokens=limits)
    inner = (
        DraftModelDrafter(runner.target.model, target=runner.target)
        if spec == "draft_model"
        else runner.open(spec)
    )
    tuned = Tuned(inner, runner.target, line(0))
    tuned._resting = 10
    runner.use(tuned)
    results = runner.generate(prompts, max_new_tokens=limits, batch_size=3)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert sum(r.drafted for r in results) > 0


def test_sampled_text_of_looked_up_drafts_is_plain_under_any_clock(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]], clock: Clock
) -> None:
    """What is emitted is the target's own draw, whatever was fed."""
    runner, noise = Runner(endless(tiny("llama"))), random.Random(0)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "seed": 4}
    plain = runner.generate([prompt_of(15)], **options)[0]
    clock.tick = lambda: 10 ** noise.uniform(-6, 1)
    runner.use(Tuned(runner.open("ngram+recycle"), runner.target, line(0.1)))
    result = runner.generate([prompt_of(15)], **options)[0]
    assert result.token_ids == plain.token_ids
    assert result.drafted > 0
