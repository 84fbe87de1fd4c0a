"""Fixtures that train tiny heads in this process, and read what the training wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectool.checkpoint.tensors import open_checkpoint
from spectool.distill.plan import HeadsJob
from spectool.distill.train_heads import HeadsReport, train_heads
from spectool.methods import import_method
from spectool.report import Reporter, TrainingStep

Train = Callable[..., HeadsReport]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(
        (Path(__file__).parents[2] / "core/data/calibration/code.txt").read_text()[:1600]
    )
    return str(path)


@pytest.fixture
def train(data: str, tmp_path: Path) -> Train:
    """Return `train(checkpoint, "out", steps=..., options={...}, **where)`."""

    def run(
        source: Path,
        out: str = "out",
        *,
        method: str = "medusa",
        options: dict[str, Any] | None = None,
        where: dict[str, Any] | None = None,
        **asked: Any,
    ) -> HeadsReport:
        ahead = "ttt_steps" if method == "eagle3" else "num_heads"
        job = HeadsJob(
            method=method,
            config=import_method(method, "drafter").Heads.Config(**{ahead: 3, **(options or {})}),
            **{
                "data": [data], "steps": 8, "seq_len": 64, "batch_tokens": 256, "held_out": 4,
                "learning_rate": 1e-2, **asked,
            },
        )  # fmt: skip
        return train_heads(open_checkpoint(source), tmp_path / out, job, **(where or {}))

    return run


class Losses(dict[str, list[float]]):
    """Losses of all steps, by the name of a training."""

    def watch(self, name: str) -> dict[str, Any]:
        """Return the keyword arguments that record the losses of a training."""
        losses = self.setdefault(name, [])

        class Listener(Reporter):
            def event(self, event: Any) -> None:
                if isinstance(event, TrainingStep) and event.step:
                    losses.append(event.metrics["loss"])

        return {"reporter": Listener()}


def storing_always(original: Any) -> Any:
    """Return an `__init__` of Training that stores the state after every step."""
    return lambda self, **given: original(
        self, **{**given, "save_seconds": -1, "save_share": math.inf}
    )


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """`endless(model)` removes the end-of-text token for the length of the test."""

    def remove(model: Any) -> Any:
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        return model

    return remove
