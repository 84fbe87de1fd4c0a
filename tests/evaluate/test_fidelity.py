from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from spectool.data.windows import cut
from spectool.evaluate.fidelity import LogProbsReference, Scores, score
from spectool.evaluate.intervals import Interval


def random_ids(count: int, size: int) -> list[int]:
    return torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("bos", [None, 3])
def test_means_equal_the_definitions_token_by_token(bos: int | None, table_probs: Any) -> None:
    windows = cut(random_ids(41, table_probs.size), length=6, bos=bos)
    ours, theirs = table_probs(2), table_probs(3)
    scores = score(
        windows, ours, table_probs.size, reference=LogProbsReference(theirs), batch_size=2
    )
    expected = defaultdict(list)
    for group in windows.groups:
        for row in group.tolist():
            for before, after in itertools.pairwise(row):
                p, q = theirs.logp_VV[before].double(), ours.logp_VV[before].double()
                top, own = int(p.argmax()), int(q.argmax())
                five = [set(each.argsort(descending=True)[:5].tolist()) for each in (p, q)]
                expected["nll"].append(-float(q[after]))
                expected["reference_nll"].append(-float(p[after]))
                expected["kl"].append(float((p.exp() * (p - q)).sum()))
                expected["reverse_kl"].append(float((q.exp() * (q - p)).sum()))
                expected["delta_p_squared"].append(float((q.exp() - p.exp())[after] ** 2))
                expected["same_top"].append(float(top == own))
                expected["top5"].append(len(five[0] & five[1]) / 5)
                expected["flip"].append(float(p.exp()[top] - p.exp()[own]))
    assert scores.figures.keys() == expected.keys()
    for name, values in expected.items():
        assert scores.figures[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-7), name
        assert scores.mean(name) == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert scores.num_tokens == windows.num_tokens == len(expected["nll"])
    assert scores.perplexity == pytest.approx(math.exp(scores.mean("nll")))
    assert scores.mean("flip") > 0 and 0 < scores.mean("same_top") < 1


def test_a_model_equals_itself(table_probs: Any) -> None:
    windows = cut([0, 1, 2, 3, 4, 5] * 5, length=6, bos=None)
    log_probs = table_probs(0)
    scores = score(windows, log_probs, table_probs.size, reference=LogProbsReference(log_probs))
    for name in ("kl", "reverse_kl", "delta_p_squared", "flip"):
        assert not scores.figures[name].any()
    assert scores.mean("same_top") == scores.mean("top5") == 1
    assert scores.perplexity == scores.reference_perplexity


def test_a_token_that_neither_model_gives_any_probability_adds_nothing(table_probs: Any) -> None:
    """Else 0 * (inf - inf) would make the whole KL NaN."""
    ours, theirs = table_probs(2), table_probs(3)
    for table in (ours, theirs):
        table.logp_VV[:, 6] = -torch.inf
    windows = cut(random_ids(40, 6), length=8, bos=None)
    scores = score(windows, ours, table_probs.size, reference=LogProbsReference(theirs))
    for name in ("kl", "reverse_kl"):
        assert 0 < scores.mean(name) < math.inf


def test_windows_are_resampled_whole_and_in_pairs() -> None:
    """Windows of very different difficulty, where the model is 1% worse everywhere."""
    hard_S = torch.arange(1.0, 41.0)
    windows = cut([0] * 41 * 40, length=41, bos=None)
    reference_N = hard_S.repeat_interleave(40)
    noise_N = torch.randn(1600, generator=torch.Generator().manual_seed(0)) * 1e-3
    figures = {"nll": reference_N + 0.01 + noise_N, "reference_nll": reference_N}
    scores = Scores(windows, figures)
    ratio = scores.interval(("nll", "reference_nll"), lambda ours, theirs: (ours - theirs).exp())
    assert ratio.lower < math.exp(0.01) < ratio.upper < ratio.lower + 5e-4
    # Tokens of a window are not independent: an interval over tokens would be far too narrow.
    mean = scores.interval(["reference_nll"])
    spread = float(hard_S.std(unbiased=False)) / math.sqrt(40)
    assert mean.upper - mean.lower == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_one_window_has_no_interval() -> None:
    windows = cut([0] * 9, length=9, bos=None)
    found = Scores(windows, {"nll": torch.full((8,), 2.0)}).interval(["nll"])
    assert found.value == 2 and math.isnan(found.lower) and math.isnan(found.upper)
    assert f"{found:.1f}" == "2.0" and f"{Interval(2, 1, 3):.1f}" == "2.0 [1.0, 3.0]"
