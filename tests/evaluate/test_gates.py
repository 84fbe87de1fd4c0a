from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spectool.errors import UsageError
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures.divergence import Divergence, Divergences, ReferenceModel
from spectool.evaluate.measures.perplexity import Perplexity, TextPerplexity
from spectool.evaluate.measures.tasks import METRIC, TASK, Score, Tasks
from spectool.evaluate.results import read_numbers

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
NUMBERS = read_numbers(*RESULTS)


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
    assert gate.check(NUMBERS) == Checked(expression, value, holds)


@pytest.mark.parametrize("sign", ["<=", ">=", "<", ">", "=="])
@pytest.mark.parametrize("metric", ["kl", "reverse_kl", "flips.upper"])
def test_a_figure_that_is_no_number_fails_every_gate(sign: str, metric: str) -> None:
    """Also one that this run could not measure."""
    (gate,) = parse_gates([f"{metric}{sign}1"], KNOWN)
    assert gate.check(NUMBERS).holds is False


@pytest.mark.parametrize("expression", ["", "kl", "kl<=", "kl<=x", "kl=1", "kl<=nan", "1<=kl"])
def test_an_expression_of_another_form_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="expected KEY<=NUMBER"):
        parse_gates([expression], KNOWN)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("perplexity_ration", "did you mean perplexity_ratio?"),
        ("kl.p99.9", "did you mean kl.p99_9?"),
        ("speed", "the metrics of this run begin with perplexity, reference, "),
    ],
)
def test_an_unknown_figure_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"no metric {name}") as raised:
        parse_gates([f"{name}>=1"], KNOWN)
    assert hint in str(raised.value.hint)


@pytest.mark.parametrize(
    "task", ["my-task", "v1.0", "two words", "folder/task", "a<=b", "x==", "last-baseline", "TASK"]
)
def test_a_name_of_the_user_may_have_any_characters(task: str) -> None:
    score = Score(items=4, score=Interval(0.5, 0.3, 0.7))
    tasks = SimpleNamespace(metrics=lambda: [(task, "acc", None, True)])
    known = Tasks.metrics(cast(Any, SimpleNamespace(tasks=tasks, paired=None)))
    numbers = read_numbers(Tasks(tasks={task: {"acc": score}, "other": {"acc": score}}))
    assert set(known) <= set(numbers)
    expressions = [f"tasks.{task}.acc.score<=0.6", f" tasks.{task}.acc.score.lower > 4e-1 "]
    gates = parse_gates(
        [*expressions, f"tasks.{task}.acc.items - baseline==0"], known, has_baseline=True
    )
    assert [gate.check(numbers).holds for gate in gates[:2]] == [True, False]
    assert (gates[2].metric, gates[2].change) == (f"tasks.{task}.acc.items", "-")
    with pytest.raises(UsageError, match="no metric"):
        parse_gates([f"tasks.{task}?.acc.score<=0.6"], known)


def test_a_placeholder_stands_for_any_name() -> None:
    known, placeholders = [f"tasks.{TASK}.{METRIC}.score.value", "kl.value"], (TASK, METRIC)
    for name in ("tasks.my-task.acc.score", "tasks.a.b.exact_match.score.value", "kl"):
        assert parse_gates([f"{name}>=0"], known, placeholders=placeholders)
    for name in ("tasks.my-task.acc.scores", "tasks..acc.score", "kl.lower"):
        with pytest.raises(UsageError, match="no metric"):
            parse_gates([f"{name}>=0"], known, placeholders=placeholders)


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
