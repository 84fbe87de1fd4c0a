"""Runs report their plan, progress and events as data; the command line has words for all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from spectool import report
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli.common import Output
from spectool.cli.events import describe
from spectool.data.text import Reading
from spectool.decode.drafters.medusa import MedusaHeads
from spectool.decode.options import CacheOptions
from spectool.distill.plan import HeadsJob
from spectool.distill.train_heads import train_heads
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize
from spectool.report import Loaded, ShortCalibration, TrainingStarts, TrainingStep

from ..heard import Heard

EVENTS = [
    kind
    for kind in vars(report).values()
    if dataclasses.is_dataclass(kind) and kind is not TrainingStep
]
EXAMPLES = {str: "x", int: 2, float: 0.5}


def heads_job(text: str) -> HeadsJob:
    config = MedusaHeads.Config(num_heads=1)
    return HeadsJob(
        method="medusa", config=config, data=[text], steps=3, seq_len=64, batch_tokens=256,
        held_out=4,
    )  # fmt: skip


def test_a_reporter_hears_a_quantization(
    checkpoint: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    heard = Heard()
    job = QuantizeJob(
        method="rtn", config=RTN.Config(), calibration=[str(text)], samples=999, seq_len=32
    )
    quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", job, reporter=heard)
    (plan,) = heard.plans
    assert set(plan.matrices) == {"model.layers.0", "model.layers.1"}
    assert heard.ticks == [(1, 2, "blocks packed"), (2, 2, "blocks packed")]
    reading, short = heard.events
    assert isinstance(reading, Reading) and reading.source == str(text)
    assert isinstance(short, ShortCalibration) and short.found < short.wanted == 999


def test_a_reporter_hears_a_training_of_heads(
    checkpoint: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    heard, source = Heard(), checkpoint("llama")
    train_heads(open_checkpoint(source), tmp_path / "out", heads_job(str(text)), reporter=heard)
    (plan,) = heard.plans
    assert plan.steps == 3 and plan.held_out == 4
    assert [(total, what) for _, total, what in heard.ticks] == [(4, "held-out texts written")]
    (loaded,) = heard.of(Loaded)
    assert (loaded.name, loaded.runtime, loaded.unused) == (str(source), "dense, float32", [])
    assert [starts.steps for starts in heard.of(TrainingStarts)] == [3]
    steps = heard.of(TrainingStep)
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert steps[0].evaluation["score"] > 0 and steps[3].metrics["loss"] > 0


def test_a_reporter_hears_an_evaluation(checkpoint: Callable[..., Path], text: Path) -> None:
    for blockwise in (False, True):
        heard = Heard()
        options = EvalOptions(text=(str(text),), window=32, limit=400, blockwise=blockwise)
        load = CacheOptions(model=str(checkpoint("llama")))
        evaluate(Context(load, options, reporter=heard))
        (plan,) = heard.plans
        assert plan.text == str(text) and plan.windows.length == 32
        assert heard.ticks[-1][:2] == (plan.windows.num_tokens, plan.windows.num_tokens)
        loaded, *_ = heard.of(Loaded)
        assert (loaded.streamed_bytes is not None) == blockwise


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_there_are_words_for_every_event(kind: Any) -> None:
    hints = get_type_hints(kind)
    event = kind(**{name: EXAMPLES.get(hint) for name, hint in hints.items()} | filled(kind))
    lines = list(describe(event))
    assert lines and all(lines) and not any("\n" in line for line in lines)


def filled(kind: Any) -> dict[str, Any]:
    """Return values for the fields that are no single word or number."""
    values = {"unused": ["a.b"], "notes": [], "rates": [1.5], "speedups": {2: 1.5}}
    return {key: value for key, value in values.items() if key in kind.__dataclass_fields__}


def test_the_output_shows_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json_wanted=False)
    output.event(TrainingStep("medusa", 0, 2, {}, {"accuracy": [0.25], "score": 1.5}))
    assert capsys.readouterr().err == ""
    output.event(TrainingStep("medusa", 1, 2, {"loss": 3.0}, None))
    output.event(TrainingStep("medusa", 2, 2, {"loss": 2.0}, {"perplexity": 9.5, "kl": 0.25}))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "medusa: loss 3.000, held out 25% by head and 1.50 tokens per forward, steps: 1/2, "
    )
    assert last.startswith("medusa: loss 2.000, held out perplexity 9.500, KL 0.2500, steps: 2/2, ")


def test_an_event_without_words_is_a_defect() -> None:
    with pytest.raises(TypeError, match="no words"):
        list(describe(object()))
