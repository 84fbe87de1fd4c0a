from __future__ import annotations

import math

import pytest

from spectool.errors import UsageError
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.measures.divergence import Divergence, ReferenceModel
from spectool.evaluate.measures.perplexity import Perplexity, Protocol

RESULTS = [
    Perplexity(
        perplexity=Protocol(
            value=4.0, tokens=100, window=8, bos=True, activations="exact", kv="dense"
        )
    ),
    Divergence(
        reference=ReferenceModel(perplexity=3.8),
        perplexity_ratio=1.05,
        kl=math.nan,
        kl_is_lower_bound=False,
        top1_agreement=0.9,
    ),
]
KNOWN = [metric for result in RESULTS for metric in result.metrics()]


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
    assert gate.check(RESULTS) == Checked(expression, value, holds)


@pytest.mark.parametrize("sign", ["<=", ">=", "<", ">", "=="])
def test_a_figure_that_is_no_number_fails_every_gate(sign: str) -> None:
    (gate,) = parse_gates([f"kl{sign}1"], KNOWN)
    assert gate.check(RESULTS).holds is False


@pytest.mark.parametrize("expression", ["", "kl", "kl<=", "kl<=x", "kl=1", "kl<=nan", "1<=kl"])
def test_an_expression_of_another_form_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="expected KEY<=NUMBER"):
        parse_gates([expression], KNOWN)


def test_an_unknown_figure_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no metric speed"):
        parse_gates(["speed>=1"], KNOWN)


def test_metrics_are_the_numbers_only() -> None:
    assert KNOWN == [
        "perplexity.value",
        "perplexity.tokens",
        "perplexity.window",
        "reference.perplexity",
        "perplexity_ratio",
        "kl",
        "top1_agreement",
    ]
