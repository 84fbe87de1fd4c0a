"""The cost curve of steps: what is learnt, what is assumed, what is stored."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.policy import curve as curves
from spectool.decode.policy.curve import SIZES, Curve, Experts, find_experts
from spectool.decode.target.attention import AttentionTarget

Tiny = Callable[..., PreTrainedModel]


def one(points: dict[int, float]) -> Curve:
    """Return the curve of a single request."""
    return Curve({1: points})


def line(slope: float) -> Curve:
    """Return the curve of a step of n nodes in 1 + slope (n - 1) seconds."""
    return one({1: 1.0, 64: 1.0 + 63 * slope})


def learn(steps: list[tuple[int, int, float]], times: int = 40, **given: Any) -> Curve:
    """Return a curve learnt from steps of some requests, nodes and seconds, in turns."""
    curve = Curve(**given)
    for _ in range(times):
        for batch, nodes, seconds in steps:
            curve.refine(nodes, seconds, batch)
    return curve


# --- What is known, and what is assumed ---


def test_a_curve_is_straight_between_what_is_known_and_beyond() -> None:
    curve = one({1: 1.0, 4: 2.5, 8: 2.7})
    found = [curve.seconds(n) for n in (1, 2, 3, 4, 6, 8, 28)]
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5, 2.6, 2.7, 3.7])


def test_one_point_rises_by_what_is_assumed() -> None:
    curve = one({1: 2.0})
    assert [curve.seconds(n) for n in (1, 2, 5)] == pytest.approx([2.0, 2.5, 4.0])
    # A row costs what it does beside one row, whoever sends it.
    company = Curve({8: {1: 2.0}})
    assert company.seconds(2, 8) == pytest.approx(2.0 * (1 + 15 / 4) / (1 + 7 / 4))


def test_a_curve_never_falls() -> None:
    """Whatever was seen, and however it is refined, in company and with experts too."""
    noise = random.Random(0)
    for _ in range(50):
        points = {}
        for batch in noise.sample(range(1, 17), noise.randint(1, 3)):
            sizes = [1, *noise.sample(SIZES[1:], noise.randint(0, len(SIZES) - 1))]
            points[batch] = {size: noise.uniform(0.1, 2) for size in sizes}
        curve = Curve(points, experts=noise.choice([None, Experts(8, 2, 0.9)]))
        for _ in range(10):
            curve.refine(noise.choice(SIZES), noise.uniform(0.01, 3), noise.randint(1, 16))
        for batch in range(1, 18):
            seconds = [curve.seconds(nodes, batch) for nodes in range(1, 150)]
            assert seconds == sorted(seconds)
            assert seconds[0] > 0


def test_what_was_slow_by_accident_is_no_obstacle_to_more_nodes() -> None:
    curve = one({1: 1.0, 4: 9.0, 8: 1.5})
    assert [curve.seconds(n) for n in (1, 4, 8)] == pytest.approx([1.0, 1.5, 1.5])


def test_another_batch_size_costs_what_its_rows_do() -> None:
    curve = line(0.1)
    assert curve.seconds(1, 8) == pytest.approx(curve.seconds(8))
    assert curve.seconds(6, 8) == pytest.approx(curve.seconds(48))
    assert curve.largest(8) == 8
    # Between two batch sizes that are known: a part of the way from the rows of the smaller one.
    curve = Curve({2: {1: 1.0, 8: 2.4}, 4: {1: 3.0, 8: 6.0}})
    assert curve.seconds(1, 3) == pytest.approx((1.1 + 3.0) / 2)
    # Below all that is known, drafting is promised no more than it brings in larger company.
    assert curve.seconds(8, 1) / curve.seconds(1, 1) == pytest.approx(2.4)


def test_a_new_batch_size_begins_at_the_speed_of_its_first_step() -> None:
    curve = line(0.1)
    before = curve.seconds(2, 4) / curve.seconds(1, 4)
    curve.refine(1, 1.2 * curve.seconds(1, 4), 4)
    assert curve.seconds(1, 4) == pytest.approx(1.2 * 1.3)
    assert curve.seconds(2, 4) / curve.seconds(1, 4) == pytest.approx(before)
    assert (curve.visits(1, 4), curve.visits(2, 4)) == (1, 0)


def test_two_rows_of_experts_read_more_than_one() -> None:
    """The expected number of experts, against all choices of three rows."""
    experts = Experts(count=4, chosen=1, share=1.0)
    rows = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert experts.reads(3) == pytest.approx(sum(len(set(row)) for row in rows) / len(rows))
    assert Experts(count=8, chosen=2, share=0.0).reads(5) == 1
    assert Experts(count=8, chosen=8, share=0.7).reads(5) == 1
    # In company nearly all experts are read by plain decoding already.
    curve = Curve({1: {1: 1.0}}, experts=Experts(count=8, chosen=2, share=0.95))
    alone = curve.seconds(2) / curve.seconds(1)
    company = curve.seconds(2, 16) / curve.seconds(1, 16)
    assert alone > 1.9 > company


@pytest.mark.parametrize(("family", "chosen"), [("mixtral", 2), ("qwen3_moe", 2)])
def test_experts_are_those_of_the_model(tiny: Tiny, family: str, chosen: int) -> None:
    model = tiny(family)
    found = find_experts(model)
    assert found is not None
    assert (found.count, found.chosen) == (4, chosen)
    fused = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in model.parameters()) - fused
    rest += sum(buffer.numel() for buffer in model.buffers())
    assert found.share == pytest.approx(fused / 2 / (fused / 2 + rest), rel=0.01)
    assert find_experts(tiny("llama")) is None


# --- Refining ---


def test_steps_tell_the_curve() -> None:
    """Of any batch size, from nothing; sizes in between are not chosen among."""
    steps = [(1, 1, 2.0), (1, 8, 3.0), (4, 1, 2.5), (4, 9, 6.0)]
    curve = learn(steps)
    found = [curve.seconds(nodes, batch) for batch, nodes, _ in steps[:3]]
    assert found == pytest.approx([2.0, 3.0, 2.5], rel=0.03)
    assert curve.seconds(9, 4) == pytest.approx(6.0, rel=0.1)
    assert {batch: set(points) for batch, points in curve.points.items()} == {1: {1, 8}, 4: {1, 8}}


def test_a_first_step_that_was_slow_is_outlived_by_the_second() -> None:
    curve = learn([(1, 1, 50.0), (1, 1, 2.0)], times=1)
    assert curve.seconds(1) == pytest.approx(2.0)


def test_all_sizes_follow_when_the_machine_becomes_slower() -> None:
    """The size that was fed follows in full, the others most of the way."""
    points = {1: 1.0, 2: 1.3, 8: 1.5, 32: 4.0}
    for fed in points:
        curve = one(dict(points))
        for _ in range(60):
            curve.refine(fed, 2 * points[fed])
        assert curve.points[1][fed] == pytest.approx(2 * points[fed], rel=0.01)
        others = [curve.points[1][size] / points[size] for size in points if size != fed]
        assert others == pytest.approx([others[0]] * 3)
        assert 1.5 < others[0] < 2


def test_a_first_visit_moves_a_size_most() -> None:
    """In full where it was not seen; in ever smaller parts where it was."""
    curve = one({1: 1.0, 64: 64.0})
    curve.refine(8, 10.0)
    assert curve.points[1][8] == pytest.approx(10.0)
    moved, before = [], curve.points[1][1]
    for _ in range(6):
        curve.refine(1, 1.01 * before)
        moved.append((curve.points[1][1] / before - 1) / 0.01)
        before = curve.points[1][1]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] == pytest.approx(0.25 + 0.75 / 5)


def test_an_outlier_counts_little_and_a_lasting_change_in_full() -> None:
    curve = line(0.5)
    curve.refine(1, 1e9)
    assert 1 < curve.seconds(1) < 1.25
    for _ in range(200):
        curve.refine(1, 50.0)
    assert curve.seconds(1) == pytest.approx(50.0, rel=0.01)


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.2, 3.0])
def test_a_curve_drifts_where_steps_stay_far_from_it(factor: float) -> None:
    curve = line(0.5)
    for _ in range(6):
        curve.refine(1, factor)
    assert not curve.has_drifted
    for _ in range(30):
        curve.refine(1, factor)
    assert curve.has_drifted == (factor in (0.4, 3.0))
    curve.doubt()
    assert not curve.has_drifted
    assert curve.visits(1) == 1


def test_a_doubted_curve_is_corrected_by_the_next_steps() -> None:
    """Also in its shape, which follows slowly otherwise."""
    found = []
    for doubts in (False, True):
        curve = learn([(1, 1, 1.0), (1, 8, 1.2)])
        if doubts:
            curve.doubt()
        for _ in range(2):
            curve.refine(8, 1.6)
            curve.refine(1, 1.0)
        found.append(curve.seconds(8) / curve.seconds(1))
    assert found[0] < 1.4 < 1.45 < found[1]


# --- Storing ---


def test_a_curve_is_learnt_once(tiny: Tiny, cache_folder: Path) -> None:
    target = AttentionTarget(tiny("llama"))
    first = curves.load_curve(target, 1)
    assert first.points == {} and first.largest() == 0
    for batch, nodes in ((1, 1), (1, 2), (3, 1), (3, 5)):
        first.refine(nodes, 0.01 * batch * nodes, batch)
    curves.store_curve(target, 1, first)
    again = curves.load_curve(AttentionTarget(tiny("llama")), 1)
    assert again.points == first.points
    assert again.origin == "known from before"
    assert curves.load_curve(target, 2).points == {}
    # Nothing but the file is left.
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == [
        cache_folder / "spectool" / curves.FILE
    ]


def test_a_batch_size_without_plain_steps_is_not_kept(tiny: Tiny, cache_folder: Path) -> None:
    target, curve = AttentionTarget(tiny("llama")), line(0.5)
    curve.refine(2, 3.0, 4)
    curves.store_curve(target, 1, curve)
    assert set(curves.load_curve(target, 1).points) == {1}


def test_the_newest_curve_comes_last(tiny: Tiny, cache_folder: Path) -> None:
    targets = [AttentionTarget(tiny(family)) for family in ("llama", "gpt2", "qwen3")]
    for target in (*targets, targets[0]):
        curves.store_curve(target, 1, line(0.5))
    keys = [curves.machine_key(target, 1) for target in targets]
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
        # As it was written before batches were known.
        '{"KEY": {"1": 0.5, "8": 0.7}}',
        '{"format": 1, "curves": {"KEY": {"1": {"1": 0.5}}}}',
        '{"format": 2}',
        '{"format": 2, "curves": 7}',
        '{"format": 2, "curves": {"KEY": null}}',
        '{"format": 2, "curves": {"KEY": {}}}',
        '{"format": 2, "curves": {"KEY": {"1": 0.5}}}',
        '{"format": 2, "curves": {"KEY": {"1": {}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"1": "x"}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"1": 0.5, "many": 1}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"1": [0.5]}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"2": 0.5}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"1": -0.5}}}}',
        '{"format": 2, "curves": {"KEY": {"1": {"1": 0.5, "5": 0.7}}}}',
        '{"format": 2, "curves": {"KEY": {"0": {"1": 0.5}}}}',
    ],
)
def test_a_file_that_is_damaged_or_of_before_is_no_curve_and_is_replaced(
    tiny: Tiny, cache_folder: Path, text: str
) -> None:
    target = AttentionTarget(tiny("llama"))
    path = cache_folder / "spectool" / curves.FILE
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", curves.machine_key(target, 1)))
    assert curves.read_curves() == {}
    curve = curves.load_curve(target, 1)
    assert curve.points == {}
    curve.refine(1, 0.25)
    curves.store_curve(target, 1, curve)
    assert json.loads(path.read_text())["format"] == curves.FORMAT
    assert curves.read_curves() == {curves.machine_key(target, 1): {1: {1: 0.25}}}


@pytest.mark.parametrize("blocked", [".", "spectool", "spectool/curves.json"])
def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    tiny: Tiny, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """A file where a folder should be, or a folder where the file should be."""
    path = cache_folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    if blocked.endswith("json"):
        (path / blocked).mkdir(parents=True)
    else:
        (path / blocked).parent.mkdir(parents=True, exist_ok=True)
        (path / blocked).write_text("")
    before = sorted(cache_folder.rglob("*"))
    curves.store_curve(AttentionTarget(tiny("llama")), 1, line(0.5))
    assert sorted(cache_folder.rglob("*")) == before
