"""The training loop: schedule, best weights, and resuming to the same weights."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectool import training as room
from spectool.errors import MissingExtra, SpectoolError, UnsupportedError
from spectool.training import (
    Metrics,
    Recipe,
    Training,
    check_optimizer,
    make_optimizer,
    rate_share,
)


def test_the_rate_rises_then_falls_along_a_cosine() -> None:
    shares = [rate_share(step, 100, warmup=0.1, final=0.2) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1.0 and shares == sorted(shares[:10]) + sorted(shares[10:], reverse=True)
    assert shares[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert 0.2 < shares[-1] < 0.21
    assert rate_share(0, 0, warmup=0.05) == 1.0


class Memory:
    """Store that copies states, as a file would."""

    def __init__(self) -> None:
        self.states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.states[-1] if self.states else None

    def agree(self, due: bool) -> bool:
        return due

    def save(self, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        copied = {**record, "evaluations": list(record["evaluations"])}
        self.states.append(({name: t.clone() for name, t in tensors.items()}, copied))


class Stop(Exception):
    pass


def make(
    store: Memory | None, *, stop_at: int = -1, bad_at: int = -1, optimizer: str = "adamw"
) -> Training:
    """Make a training run of a linear map whose best evaluation is not its last."""
    torch.manual_seed(0)
    # Moments of less than 4096 weights stay float32.
    inside = 4 if optimizer == "adamw" else 1000
    module = nn.Sequential(nn.Linear(5, inside), nn.Linear(inside, 3))
    module[0].bias.requires_grad_(False)
    evaluated: list[int] = []

    def accumulate(step: int) -> Metrics:
        if step == stop_at:
            raise Stop
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        loss = (module(x) - x[:, :3].flip(-1)).square().mean()
        loss.backward()
        return {"loss": math.nan if step == bad_at else loss.item()}

    def evaluate() -> Metrics:
        evaluated.append(0)
        x = torch.ones(1, 5)
        return {"score": -float((module(x) - 0.3).square().sum().detach())}

    return Training(
        name="linear",
        module=module,
        optimizers=[
            make_optimizer(
                optimizer,
                [p for p in module.parameters() if p.requires_grad],
                rate=0.1,
                betas=(0.9, 0.999),
                weight_decay=0.01,
            ),
        ],
        recipe=Recipe(steps=30, every=4),
        accumulate=accumulate,
        evaluate=evaluate,
        store=store,
        save_seconds=-1,
        save_share=math.inf,
    )


def weights(training: Training) -> list[Tensor]:
    return [p.detach().clone() for p in training.module.parameters()]


def test_the_best_evaluation_is_kept() -> None:
    training = make(None)
    history = training.run()
    assert [metrics["step"] for metrics in history.evaluations] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert history.best == max(history.evaluations, key=lambda metrics: float(metrics["score"]))
    assert training.evaluate()["score"] == history.best["score"]


@pytest.mark.parametrize("stop_at", [0, 1, 4, 17, 29])
def test_a_stopped_run_ends_with_the_same_weights(stop_at: int) -> None:
    whole = make(None)
    evaluations = whole.run().evaluations
    store = Memory()
    with pytest.raises(Stop):
        make(store, stop_at=stop_at).run()
    again = make(store)
    assert again.run().evaluations == evaluations
    assert all(map(torch.equal, weights(again), weights(whole)))


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    with pytest.raises(SpectoolError, match="the loss is nan at step 4: training diverged"):
        make(None, bad_at=3).run()


@pytest.mark.parametrize("stop_at", [1, 17])
def test_eight_bit_moments_are_stored_exactly(stop_at: int) -> None:
    pytest.importorskip("bitsandbytes")
    whole = make(None, optimizer="adamw8bit")
    whole.run()
    store = Memory()
    with pytest.raises(Stop):
        make(store, stop_at=stop_at, optimizer="adamw8bit").run()
    tensors, record = store.states[-1]
    assert tensors["optimizer.0.0.state1"].dtype == torch.uint8
    assert record["numbers"]["optimizer.0.0.step"] == stop_at
    again = make(store, optimizer="adamw8bit")
    again.run()
    assert all(map(torch.equal, weights(again), weights(whole)))


def test_an_optimizer_that_does_not_run_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer("adamw", torch.device("cpu"))

    class Broken:
        def step(self) -> None:
            raise NotImplementedError("no kernel\nfor this")

    with monkeypatch.context() as patch:
        patch.setattr(room, "make_optimizer", lambda *_, **__: Broken())
        with pytest.raises(UnsupportedError, match="does not run on cpu here: no kernel"):
            check_optimizer("adamw8bit", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="--optimizer adamw8bit needs the package bitsandbytes"):
        check_optimizer("adamw8bit", torch.device("cpu"))


def test_steps_that_overflow_are_left_out_and_the_rest_is_torchs_own_loop() -> None:
    """Annealed by torch, without clipping; what is kept is the caller's."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 5, generator=generator)
    inputs[7] = math.inf
    found = []
    numbers, kept = itertools.count(1), iter(("first", "best"))
    for ours in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.3)

        def accumulate(step: int, module: nn.Module = module) -> Metrics:
            torch.autograd.backward(module(inputs[step]).square().sum())
            return {}

        if ours:
            training = Training(
                name="test",
                module=module,
                optimizers=[optimizer],
                recipe=Recipe(steps=12, annealing=True, clip=None, every=5, skip_overflow=True),
                accumulate=accumulate,
                evaluate=lambda: {"score": float(next(numbers) == 3)},
                keep=lambda: next(kept),
            )
            history = training.run()
            assert history.skipped == 1
            # Evaluated after 0, 5, 10 and 12 steps; the third was the best.
            assert [each["step"] for each in history.evaluations] == [0, 5, 10, 12]
            assert training.best == "best"
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            for step in range(12):
                optimizer.zero_grad()
                accumulate(step)
                if step != 7:
                    optimizer.step()
                schedule.step()
        found.append(module.weight.detach())
    assert torch.equal(*found)
