"""The cost curve of passes: measured, refined, stored."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.policy import curve as curves
from spectool.decode.policy.curve import SIZES, Curve
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import Draft

Tiny = Callable[..., PreTrainedModel]


def line(slope: float) -> Curve:
    """Return the curve of a pass of n tokens in 1 + slope (n - 1) seconds."""
    return Curve({1: 1.0, 64: 1.0 + 63 * slope})


def test_a_curve_is_straight_between_what_is_known_and_beyond() -> None:
    curve = Curve({1: 1.0, 4: 2.5, 8: 2.7})
    found = [curve.seconds(n) for n in (1, 2, 3, 4, 6, 8, 28)]
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5, 2.6, 2.7, 3.7])


def test_a_load_or_measure_one_point_rises_by_what_is_assumed() -> None:
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


def test_what_was_measured_too_high_is_no_obstacle_to_more_tokens() -> None:
    curve = Curve({1: 1.0, 4: 9.0, 8: 1.5})
    assert [curve.seconds(n) for n in (1, 4, 8)] == pytest.approx([1.0, 1.5, 1.5])


def test_a_refined_curve_comes_to_what_steps_take() -> None:
    curve = line(0.5)
    for _ in range(150):
        curve.refine(1, 2.0)
        # 8 was not measured: it starts between its neighbours.
        curve.refine(8, 3.0)
    assert curve.seconds(1) == pytest.approx(2.0, rel=0.01)
    assert curve.seconds(8) == pytest.approx(3.0, rel=0.01)


def test_all_sizes_follow_when_the_machine_becomes_slower() -> None:
    """The size that was fed follows in full, the others most of the way."""
    points = {1: 1.0, 2: 1.3, 8: 1.5, 32: 4.0}
    for fed in points:
        curve = Curve(dict(points))
        for _ in range(60):
            curve.refine(fed, 2 * points[fed])
        assert curve.points[fed] == pytest.approx(2 * points[fed], rel=0.01)
        others = [curve.points[size] / points[size] for size in points if size != fed]
        assert others == pytest.approx([others[0]] * 3)
        assert 1.5 < others[0] < 2


def test_a_first_visit_moves_a_size_most() -> None:
    """In full where it was not measured; in ever smaller parts where it was."""
    curve = Curve({1: 1.0, 64: 64.0})
    curve.refine(8, 10.0)
    assert curve.points[8] == pytest.approx(10.0)
    moved, before = [], curve.points[1]
    for _ in range(6):
        curve.refine(1, 1.01 * before)
        moved.append((curve.points[1] / before - 1) / 0.01)
        before = curve.points[1]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == pytest.approx(0.25 + 0.75 / 5)


@pytest.mark.parametrize(("tokens", "seconds"), [(5, 2.0), (65, 2.0)])
def test_sizes_that_are_not_chosen_among_change_nothing(tokens: int, seconds: float) -> None:
    curve = line(0.5)
    curve.refine(tokens, seconds)
    assert curve.points == line(0.5).points


def test_an_outlier_counts_little_and_a_lasting_change_in_full() -> None:
    curve = line(0.5)
    curve.refine(1, 1e9)
    assert 1 < curve.seconds(1) < 1.25
    for _ in range(200):
        curve.refine(1, 50.0)
    assert curve.seconds(1) == pytest.approx(50.0, rel=0.01)


# --- Measuring and storing ---


@pytest.mark.parametrize("context", [2, 40, 63, 90, 256])
def test_measuring_stays_inside_the_context(
    tiny: Tiny, clock: Any, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    monkeypatch.setattr(curves, "_REPEATS", 1)
    target = AttentionTarget(tiny("gpt2"), context=context)
    ends = []
    real_verify = target.verify

    def verify(cache: Any, drafts: list[Draft]) -> Any:
        ends.append(cache.lengths[0] + len(drafts[0]))
        return real_verify(cache, drafts)

    target.verify = verify  # type: ignore[method-assign]
    curve = curves.measure(target)
    assert max(ends, default=0) <= context
    assert set(curve.points) == {1} | {size for size in SIZES if size < context}


def test_measuring_takes_no_longer_than_it_may(tiny: Tiny, clock: Any) -> None:
    """A pass that has begun is finished, and one size is always known."""
    target, passes = AttentionTarget(tiny("llama")), []
    real_verify = target.verify
    target.verify = lambda *given: passes.append(given) or real_verify(*given)  # type: ignore
    clock.tick = lambda: 1.0
    assert set(curves.measure(target).points) == {1}
    # The first pass of a size does not count.
    assert len(passes) == 2
    passes.clear()
    clock.tick = lambda: 0.01
    assert 1 < len(curves.measure(target).points) < len(SIZES)
    # Every pass reads the clock twice, and once more for the time left.
    assert len(passes) * 0.03 <= 0.73


def test_sizes_take_turns(tiny: Tiny, clock: Any) -> None:
    """A slow spell slows all of them alike; the minimum of each counts."""
    target, fed = AttentionTarget(tiny("llama")), []
    real_verify = target.verify

    def verify(cache: Any, drafts: list[Draft]) -> Any:
        fed.append(len(drafts[0]))
        # The first two rounds are in a slow spell.
        clock.now += (10 if len(fed) <= 2 * len(SIZES) else 1) * 1e-4 * (1 + len(drafts[0]))
        return real_verify(cache, drafts)

    target.verify = verify  # type: ignore[method-assign]
    points = curves.measure(target).points
    rounds = [fed[at : at + len(SIZES)] for at in range(0, len(fed), len(SIZES))]
    assert len(rounds) == 6
    assert all(sorted(sizes) == list(SIZES) for sizes in rounds)
    assert points == pytest.approx({size: 1e-4 * (1 + size) for size in SIZES})


def test_a_curve_is_measured_once(
    tiny: Tiny, clock: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.tick = lambda: 0.02
    target = AttentionTarget(tiny("llama"))
    first = curves.load_or_measure(target)
    curves.store_curve(AttentionTarget(tiny("gpt2")), Curve({1: 0.03, 2: 0.04, 5: 0.05}))
    monkeypatch.setattr(curves, "measure", None)
    again = curves.load_or_measure(AttentionTarget(tiny("llama")))
    assert again.points == first.points
    assert again.origin == "known from before"
    # Only sizes that are chosen among are kept, and nothing but the file is left.
    assert curves.load_or_measure(AttentionTarget(tiny("gpt2"))).points == {1: 0.03, 2: 0.04}
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == [
        cache_folder / "spectool" / curves.FILE
    ]


def test_a_load_or_measure_a_busy_machine_is_not_left(
    tiny: Tiny, clock: Any, cache_folder: Path
) -> None:
    """Used now, and measured again by the next run."""
    clock.tick, clock.waits = lambda: 0.4, 0.5
    target = AttentionTarget(tiny("llama"))
    curve = curves.load_or_measure(target)
    assert curve.origin.endswith("while other processes ran")
    assert curves.read_curves() == {}
    clock.waits = 0.0
    assert not curves.load_or_measure(target).origin.endswith("while other processes ran")
    assert curves.read_curves().keys() == {curves.machine_key(target)}


@pytest.mark.parametrize(
    ("factor", "believed"), [(1, True), (2, True), (0.5, True), (40, False), (0.02, False)]
)
def test_a_curve_from_before_that_is_far_off_is_measured_again(
    tiny: Tiny, clock: Any, cache_folder: Path, factor: float, believed: bool
) -> None:
    clock.tick = lambda: 0.02
    target = AttentionTarget(tiny("llama"))
    curves.store_curve(target, Curve({1: factor * 0.02, 2: factor * 0.03}))
    found = curves.load_or_measure(target)
    assert (found.origin == "known from before") == believed
    assert found.points[1] == pytest.approx(factor * 0.02 if believed else 0.02)
    assert curves.read_curves()[curves.machine_key(target)] == found.points


def test_one_slow_pass_is_no_reason_to_measure_again(
    tiny: Tiny, clock: Any, cache_folder: Path
) -> None:
    target, passes = AttentionTarget(tiny("llama")), []
    real_verify = target.verify

    def verify(cache: Any, drafts: list[Draft]) -> Any:
        passes.append(len(drafts[0]))
        clock.now += 1.0 if len(passes) == 1 else 0.01
        return real_verify(cache, drafts)

    target.verify = verify  # type: ignore[method-assign]
    curves.store_curve(target, Curve({1: 0.01}))
    assert curves.load_or_measure(target).origin == "known from before"
    assert passes == [1, 1]


def test_the_newest_curve_comes_last(tiny: Tiny, cache_folder: Path) -> None:
    targets = [AttentionTarget(tiny(family)) for family in ("llama", "gpt2", "qwen3")]
    for target in (*targets, targets[0]):
        curves.store_curve(target, line(0.5))
    keys = [curves.machine_key(target) for target in targets]
    assert list(curves.read_curves()) == [keys[1], keys[2], keys[0]]


def test_what_a_passs_time_depends_on_tells_curves_apart(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    models = [tiny("llama"), tiny("qwen3"), tiny("llama-deep"), half]
    keys = {curves.machine_key(AttentionTarget(model)) for model in models}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    keys.add(curves.machine_key(AttentionTarget(tiny("llama"))))
    assert len(keys) == 5
    # Other weights of the same sizes are as fast.
    assert curves.machine_key(AttentionTarget(tiny("llama"))) == curves.machine_key(
        AttentionTarget(tiny("llama", 1))
    )


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
    tiny: Tiny, clock: Any, cache_folder: Path, text: str
) -> None:
    clock.tick = lambda: 0.4
    target = AttentionTarget(tiny("llama"))
    path = cache_folder / "spectool" / curves.FILE
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", curves.machine_key(target)))
    assert curves.read_curves() == {}
    curve = curves.load_or_measure(target)
    assert curve.origin.startswith("measured")
    assert curves.read_curves() == {curves.machine_key(target): curve.points}


@pytest.mark.parametrize("blocked", [".", "spectool", "spectool/curves.json"])
def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    tiny: Tiny, clock: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """A file where a folder should be, or a folder where the file should be."""
    path = cache_folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    clock.tick = lambda: 0.4
    if blocked.endswith("json"):
        (path / blocked).mkdir(parents=True)
    else:
        (path / blocked).parent.mkdir(parents=True, exist_ok=True)
        (path / blocked).write_text("")
    before = sorted(cache_folder.rglob("*"))
    assert 1 in curves.load_or_measure(AttentionTarget(tiny("llama"))).points
    assert sorted(cache_folder.rglob("*")) == before
