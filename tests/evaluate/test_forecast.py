"""The acceptance that a training can be expected to reach, from finished ones."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

from spectool.checkpoint.headers import HEADS
from spectool.decode.heads.artifact import HeadsRecord
from spectool.errors import CheckpointError
from spectool.evaluate.forecast import LEAST_TRAININGS, Finished, forecast, read_finished

OPTIONS = {"num_heads": 3}
IDENTITY: dict[str, Any] = {
    "source": {"fingerprint": "sha256:model"},
    "regenerate": False,
    "regenerate_model": None,
    "temperature": 0.8,
    "init_from": None,
    "learning_rate": 1e-3,
    "warmup": 0.05,
    "optimizer": "adamw",
    "batch_tokens": 4096,
    "seq_len": 1024,
    "sequence_packing": False,
}


def gain(tokens: float, height: float, scale: float, exponent: float) -> float:
    return height * (1 - (1 + tokens / scale) ** -exponent)


def measure(tokens: int, noise: float = 0.0) -> Finished:
    reached = 1.2 + gain(tokens, 2.0, 30_000, 0.5) + noise
    return Finished(tokens=tokens, tokens_per_forward=(1.2, reached), accuracy=(0.0, reached / 5))


def test_the_law_is_found_again_beyond_what_was_measured() -> None:
    points = [measure(tokens) for tokens in (5_000, 10_000, 20_000, 40_000, 80_000)]
    found = forecast(points, 400_000)
    expected = 1.2 + gain(400_000, 2.0, 30_000, 0.5)
    figure = found.tokens_per_forward
    # Five times beyond the largest: the points themselves leave the exponent open.
    assert figure is not None and figure.value == pytest.approx(expected, abs=0.12)
    assert figure.lower <= expected <= figure.upper
    inside = forecast(points, 60_000).tokens_per_forward
    assert inside is not None
    assert inside.value == pytest.approx(1.2 + gain(60_000, 2.0, 30_000, 0.5), abs=0.005)
    assert (found.trainings, found.largest, found.reason) == (5, 80_000, None)


def test_no_other_law_of_the_grid_fits_better() -> None:
    """The sum of squares of the prediction's law is the least of all, computed one by one."""
    rng = random.Random(2)
    tokens = [5_000, 5_000, 20_000, 20_000, 80_000, 80_000]
    points = [measure(each, rng.gauss(0, 0.05)) for each in tokens]
    found = forecast(points, 80_000).tokens_per_forward
    least, value = math.inf, 0.0
    for scale, exponent in itertools.product(
        [500 * 1.05**step for step in range(152)],
        [0.0625, 0.125, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 4],
    ):
        shapes = [gain(each, 1, scale, exponent) for each in tokens]
        gains = [each.tokens_per_forward[1] - 1.2 for each in points]
        height = sum(map(float.__mul__, shapes, gains)) / sum(shape**2 for shape in shapes)
        error = sum((y - height * x) ** 2 for x, y in zip(shapes, gains, strict=True))
        if error < least:
            least, value = error, 1.2 + gain(80_000, height, scale, exponent)
    assert found is not None and found.value == pytest.approx(value, abs=0.01)


def test_intervals_hold_most_of_what_comes() -> None:
    """Check over 12 seeds that an interval of 95% from 8 trainings mostly holds the next one."""
    inside, widths = 0, []
    for seed in range(12):
        rng = random.Random(seed)
        budgets = [10_000, 20_000, 40_000, 80_000] * 2
        points = [measure(each, rng.gauss(0, 0.03)) for each in budgets]
        figure = forecast(points, 160_000).tokens_per_forward
        came = measure(160_000, rng.gauss(0, 0.03)).tokens_per_forward[1]
        assert figure is not None
        inside += figure.lower <= came <= figure.upper
        widths.append(figure.upper - figure.lower)
    assert inside >= 10 and max(widths) < 1


def test_too_few_trainings_give_a_reason_and_no_number() -> None:
    assert forecast([], 1000).reason == "no finished training of such heads for this model"
    few = [measure(10_000), measure(20_000), measure(40_000)]
    found = forecast(few, 80_000)
    assert found.tokens_per_forward is None and found.accuracy is None
    assert found.reason is not None and "3 finished trainings" in found.reason
    same = [measure(10_000, 0.01 * n) for n in range(LEAST_TRAININGS)]
    assert forecast(same, 80_000).tokens_per_forward is None


def write(folder: Path, number: int, method: str = "medusa", **changed: Any) -> Path:
    """Write the record of a finished training."""
    evaluations = [
        {"step": 0, "score": 1.2, "accuracy": [0.01, 0.0]},
        {"step": 4, "score": 2.0, "accuracy": [0.4, 0.1]},
        {"step": 8, "score": 1.9, "accuracy": [0.5, 0.1]},
    ]
    training = {**IDENTITY, "tokens": 1000 * (1 + number), "evaluations": evaluations}
    target = {"fingerprint": IDENTITY["source"]["fingerprint"]}
    record = HeadsRecord(
        method=method,
        options=OPTIONS,
        target=target,
        accuracy=[0.4],
        tree=[],
        shares=[],
        training={**training, **changed},
    )
    directory = folder / f"heads-{number}"
    directory.mkdir(parents=True)
    (directory / HEADS).write_bytes(record.as_bytes())
    (directory / "heads.safetensors").write_bytes(b"")
    return directory


def test_such_heads_alone_count_and_the_weights_that_were_written(tmp_path: Path) -> None:
    like = [write(tmp_path, number) for number in range(2)]
    write(tmp_path, 2, method="hydra")
    write(tmp_path, 3, learning_rate=1e-2)
    write(tmp_path, 4, tokens=0)
    found = read_finished([tmp_path], "medusa", OPTIONS, IDENTITY)
    assert [each.tokens for each in found] == [1000, 2000]
    assert found[0].tokens_per_forward == (1.2, 2.0) and found[0].accuracy == (0.01, 0.4)
    assert read_finished(like, "medusa", OPTIONS, IDENTITY) == found
    assert read_finished([tmp_path], "medusa", {"num_heads": 4}, IDENTITY) == []
    other = {**IDENTITY, "source": {"fingerprint": "sha256:other"}}
    assert read_finished([tmp_path], "medusa", OPTIONS, other) == []


def test_a_folder_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no draft heads"):
        read_finished([tmp_path], "medusa", OPTIONS, IDENTITY)
