from __future__ import annotations

import math

import pytest

from spectool.errors import UsageError
from spectool.evaluate.gates import list_metrics, parse_gates

RESULT = {
    "perplexity": {"value": 4.0, "tokens": 100, "bos": True},
    "perplexity_ratio": 1.05,
    "kl": math.nan,
}
KNOWN = ["perplexity.value", "perplexity.tokens", "perplexity_ratio", "kl"]


@pytest.mark.parametrize(
    ("expression", "value", "holds"),
    [
        ("perplexity_ratio<=1.1", 1.05, True),
        ("perplexity_ratio <= 1.05", 1.05, True),
        ("perplexity_ratio<1.05", 1.05, False),
        ("perplexity.value>=4", 4.0, True),
        ("perplexity>4", 4.0, False),
        ("perplexity.tokens==1e2", 100.0, True),
    ],
)
def test_a_gate_compares(expression: str, value: float, holds: bool) -> None:
    (gate,) = parse_gates([expression], KNOWN)
    assert gate.check(RESULT) == {"expression": expression, "value": value, "holds": holds}


@pytest.mark.parametrize("sign", ["<=", ">=", "<", ">", "=="])
def test_a_figure_that_is_no_number_fails_every_gate(sign: str) -> None:
    (gate,) = parse_gates([f"kl{sign}1"], KNOWN)
    assert gate.check(RESULT)["holds"] is False


@pytest.mark.parametrize("expression", ["", "kl", "kl<=", "kl<=x", "kl=1", "kl<=nan", "1<=kl"])
def test_an_expression_of_another_form_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="expected KEY<=NUMBER"):
        parse_gates([expression], KNOWN)


def test_an_unknown_figure_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no metric speed"):
        parse_gates(["speed>=1"], KNOWN)


def test_figures_are_the_numbers_only() -> None:
    assert list_metrics(RESULT) == [
        "perplexity.value",
        "perplexity.tokens",
        "perplexity_ratio",
        "kl",
    ]
