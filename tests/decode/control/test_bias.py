"""Biases are added to the tokens that they name, and read from the command line."""

import pytest
import torch

from spectool.decode.control.bias import LogitBias, parse_biases
from spectool.errors import UsageError


def test_biases_are_added() -> None:
    logits = LogitBias({3: 2.5, 0: -1.0, 4: -torch.inf}).process(None, torch.ones(5))
    assert logits.tolist() == [0.0, 1.0, 1.0, 3.5, -torch.inf]


@pytest.mark.parametrize("biases", [{-1: 1.0}, {1: float("nan")}, {1: torch.inf}])
def test_biases_that_mean_nothing(biases: dict[int, float]) -> None:
    with pytest.raises(UsageError, match="--logit-bias"):
        LogitBias(biases)


def test_items_are_read() -> None:
    assert parse_biases(["3=2.5", "0=-inf"], num_tokens=5) == {3: 2.5, 0: -torch.inf}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["3"], "expected TOKEN=VALUE"),
        (["x=1"], "expected TOKEN=VALUE"),
        (["3=x"], "expected TOKEN=VALUE"),
        (["5=1"], "run from 0 to 4"),
        (["-1=1"], "run from 0 to 4"),
        (["3=1", "3=2"], "has a bias already"),
    ],
)
def test_items_that_cannot_be_read(items: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_biases(items, num_tokens=5)
