from __future__ import annotations

import math

import pytest

from spectool.errors import UsageError
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures.divergence import Divergence, Divergences, ReferenceModel
from spectool.evaluate.measures.perplexity import Perplexity, TextPerplexity

RESULTS = [
    Perplexity(
        perplexity=TextPerplexity(
            value=4.0,
            lower=3.9,
            upper=4.1,
            tokens=100,
            protocol="text",
            window=8,
            stride=None,
            bos=True,
            activations="exact",
            kv="dense",
            by_position=[],
            by_frequency=[],
        )
    ),
    Divergence(
        reference=ReferenceModel(perplexity=3.8),
        perplexity_ratio=Interval(1.05, 1.02, 1.08),
        perplexity_difference=Interval(0.2, 0.1, 0.3),
        kl=Divergences(
            value=math.nan, lower=0.1, upper=0.3, median=0.01, p99=1.5, p99_9=3.0, max=4.0
        ),
        kl_is_lower_bound=True,
        rms_delta_p=Interval(0.05, 0.04, 0.06),
        top1_agreement=Interval(0.9, 0.85, 0.95),
        not_measured=["reverse_kl", "top5_agreement", "flips"],
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
        ("perplexity_ratio.upper<=1.07", 1.08, False),
        ("perplexity_ratio.lower<=1.07", 1.02, True),
        ("top1_agreement.lower>=0.85", 0.85, True),
        ("kl.p99_9<=3", 3.0, True),
    ],
)
def test_a_gate_compares(expression: str, value: float, holds: bool) -> None:
    (gate,) = parse_gates([expression], KNOWN)
    assert gate.check(RESULTS) == Checked(expression, value, holds)


@pytest.mark.parametrize("sign", ["<=", ">=", "<", ">", "=="])
@pytest.mark.parametrize("metric", ["kl", "reverse_kl", "flips.upper"])
def test_a_figure_that_is_no_number_fails_every_gate(sign: str, metric: str) -> None:
    """Also one that this run could not measure."""
    (gate,) = parse_gates([f"{metric}{sign}1"], KNOWN)
    assert gate.check(RESULTS).holds is False


@pytest.mark.parametrize("expression", ["", "kl", "kl<=", "kl<=x", "kl=1", "kl<=nan", "1<=kl"])
def test_an_expression_of_another_form_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="expected KEY<=NUMBER"):
        parse_gates([expression], KNOWN)


def test_an_unknown_figure_is_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no metric speed"):
        parse_gates(["speed>=1"], KNOWN)


def test_metrics_are_the_numbers_only() -> None:
    ends = ("value", "lower", "upper")
    parts = {
        "perplexity": [*ends, "tokens", "window", "stride"],
        "reference": ["perplexity"],
        "perplexity_ratio": ends,
        "perplexity_difference": ends,
        "kl": [*ends, "median", "p99", "p99_9", "max"],
        "reverse_kl": ends,
        "rms_delta_p": ends,
        "top1_agreement": ends,
        "top5_agreement": ends,
        "flips": ends,
    }
    names = [f"{name}.{part}" for name, parts in parts.items() for part in parts]
    assert sorted([*names, "reference_error"]) == sorted(KNOWN)
