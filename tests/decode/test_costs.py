"""What steps cost with one thread and with many, and which number decoding takes.

No test reads a real clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool import machine, processors
from spectool.decode.generate import Runner
from spectool.decode.policy import costs as costs_module
from spectool.decode.policy import curve as curves
from spectool.decode.policy.costs import Costs, Paced
from spectool.decode.policy.curve import Curve
from spectool.decode.policy.tuned import Tuned
from spectool.decode.target.attention import AttentionTarget

from .conftest import plain_text

Tiny = Callable[..., PreTrainedModel]
NONE: Any = None


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give torch two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def decode(costs: Costs, seconds: dict[int, float], steps: int) -> list[int]:
    """Run plain steps that take `seconds` with each number of threads; return the numbers."""
    used = []
    for _ in range(steps):
        costs.begin()
        used.append(torch.get_num_threads())
        costs.learn(1, seconds[used[-1]], 1)
        assert torch.get_num_threads() == 2
    return used


def known(one: float, two: float) -> dict[int, Curve]:
    return {2: Curve({1: {1: two}}), 1: Curve({1: {1: one}})}


def test_one_thread_is_tried_and_taken_if_it_is_faster() -> None:
    costs = Costs(NONE, curves={2: Curve(), 1: Curve()})
    used = decode(costs, {1: 0.01, 2: 0.02}, 200)
    assert used == [2] * 8 + [1] * 192
    assert costs.threads == 1


def test_a_trial_that_is_hopeless_is_short() -> None:
    """And the next one is far away, ever further if nothing changes."""
    costs = Costs(NONE, curves={2: Curve(), 1: Curve()})
    used = decode(costs, {1: 0.04, 2: 0.02}, 2000)
    trials = [step for step in range(1, 2000) if used[step] == 1 and used[step - 1] == 2]
    assert used.count(1) == 2 * len(trials)
    assert trials == pytest.approx([8, 266, 780, 1806])
    # Little is lost: each step of a trial costs one step more.
    assert used.count(1) < 0.005 * len(used)


def test_a_trial_that_loses_little_is_whole() -> None:
    costs = Costs(NONE, curves={2: Curve(), 1: Curve()})
    used = decode(costs, {1: 0.021, 2: 0.02}, 100)
    assert used.count(1) == 5
    assert costs.threads == 2


def test_what_was_stored_is_believed_at_once(tiny: Tiny, clock: Any, cache_folder: Path) -> None:
    """The faster number is taken without a trial, and both curves are kept."""
    target = AttentionTarget(tiny("llama"))
    first = Costs(target, choose_threads=True)
    decode(first, {1: 0.01, 2: 0.02}, 60)
    first.close()
    keys = {curves.machine_key(target, threads) for threads in (1, 2)}
    assert curves.read_curves().keys() == keys
    again = Costs(target, choose_threads=True)
    assert decode(again, {1: 0.01, 2: 0.02}, 200) == [1] * 200


def test_threads_change_when_the_machine_becomes_busy_and_idle_again() -> None:
    """Many threads lose most beside other processes."""
    costs = Costs(NONE, curves=known(0.03, 0.02))
    idle, busy = {1: 0.03, 2: 0.02}, {1: 0.06, 2: 0.5}
    assert decode(costs, idle, 100) == [2] * 100
    used = decode(costs, busy, 200)
    # Apart from a trial or two.
    assert used[-150:].count(1) > 145
    used = decode(costs, idle, 1000)
    assert used[-500:].count(2) > 490


def test_a_drift_of_all_speeds_is_measured_again_and_bounded() -> None:
    """Curves are doubted, at most every 64 steps, whatever passes take."""
    costs = Costs(NONE, curves=known(0.03, 0.02))
    doubts = []
    real = Curve.doubt
    for curve in costs._curves.values():
        curve.doubt = lambda curve=curve: doubts.append(curve) or real(curve)  # type: ignore
    decode(costs, {1: 0.03, 2: 0.02}, 100)
    assert doubts == []
    used = decode(costs, {1: 0.3, 2: 0.2}, 100)
    assert 1 <= len(doubts) <= 2
    assert 1 <= used.count(1) <= 10
    for power in range(20):
        decode(costs, {1: 3.0 * 2**power, 2: 2.0 * 2**power}, 64)
    assert 10 < len(doubts) <= 23


def test_a_step_that_is_slow_by_accident_changes_nothing() -> None:
    costs = Costs(NONE, curves=known(0.03, 0.02))
    for _ in range(20):
        decode(costs, {1: 0.03, 2: 2.0}, 1)
        assert decode(costs, {1: 0.03, 2: 0.02}, 10) == [2] * 10


@pytest.mark.parametrize(
    ("environ", "requested", "chooses"),
    [({}, None, True), ({"OMP_NUM_THREADS": "2"}, None, False), ({}, 2, False)],
)
def test_who_says_how_many_threads_has_them(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    cache_folder: Path,
    environ: dict[str, str],
    requested: int | None,
    chooses: bool,
) -> None:
    for name in processors.NUM_THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    runner = Runner(tiny("llama"), choose_threads=machine.may_choose_threads(requested))
    assert runner.costs.chooses == chooses
    assert [type(policy) for policy in runner.drafter.policies] == [Paced] * chooses


def test_with_half_a_processor_there_is_one_thread(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, cache_folder: Path, tmp_path: Path
) -> None:
    """As the cgroup's file says, from which `allowed` is read."""
    proc, group = tmp_path / "proc", tmp_path / "group"
    (proc / "self").mkdir(parents=True)
    group.mkdir()
    (group / "cpu.max").write_text("50000 100000\n")
    (proc / "self/cgroup").write_text("0::/\n")
    (proc / "self/mountinfo").write_text(f"1 2 0:3 / {group} rw - cgroup2 cgroup2 rw\n")
    limits = processors.allowed(proc)
    assert limits.quota == 0.5
    for name in processors.NUM_THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processors, "allowed", lambda: limits)
    machine.set_threads(None)
    assert torch.get_num_threads() == 1
    assert not Runner(tiny("llama"), choose_threads=True).costs.chooses


@pytest.mark.parametrize("draft", ["none", "ngram+recycle"])
def test_texts_do_not_depend_on_threads(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    clock: Any,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    draft: str,
) -> None:
    """One thread is tried during the texts."""
    monkeypatch.setattr(costs_module, "_FIRST", 3)
    model = endless(tiny("llama"))
    plain = [plain_text(model, prompt_of(size), 30) for size in (12, 5)]
    runner = Runner(model, draft=draft, tune=True, choose_threads=True)
    (policy,) = runner.drafter.policies
    assert isinstance(policy, Paced if draft == "none" else Tuned)
    used = []
    real = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n) or real(n))
    clock.tick = lambda: 0.01
    results = runner.generate([prompt_of(12), prompt_of(5)], max_new_tokens=30, batch_size=2)
    assert [result.token_ids for result in results] == plain
    assert {1, 2} <= set(used)
    runner.close()
    assert len(curves.read_curves()) == 2
