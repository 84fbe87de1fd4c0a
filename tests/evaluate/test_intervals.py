"""Intervals: coverage of known laws, clusters, exact tests against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spectool.evaluate.intervals import Interval, bootstrap, bootstrap_within, holm, mcnemar, share


def first(means_RK: torch.Tensor) -> torch.Tensor:
    return means_RK[:, 0]


def test_a_bootstrap_of_all_resamples_of_three_items_has_their_quantiles() -> None:
    values = [0.0, 1.0, 5.0]
    means = [sum(chosen) / 3 for chosen in itertools.product(values, repeat=3)]
    every = torch.tensor(means, dtype=torch.float64)
    drawn = bootstrap(torch.tensor(values)[:, None], first, resamples=40_000)
    assert drawn.value == 2.0
    # The extreme resamples have 1 of 27 each, so both quantiles fall on them.
    assert (drawn.lower, drawn.upper) == (float(every.min()), float(every.max()))


def test_the_interval_of_a_paired_difference_covers_it_in_95_of_100_cases() -> None:
    generator = torch.Generator().manual_seed(1)
    covered, widths = 0, []
    for seed in range(300):
        hard_N = torch.randn(200, generator=generator) * 5
        better_N = hard_N + 0.3 + torch.randn(200, generator=generator) * 0.5
        pairs_N2 = torch.stack([better_N, hard_N], 1)
        found = bootstrap(pairs_N2, lambda m: m[:, 0] - m[:, 1], resamples=500, seed=seed)
        covered += found.lower <= 0.3 <= found.upper
        widths.append(found.upper - found.lower)
    assert 270 <= covered <= 296
    # Unpaired, the spread of the items alone would be 4 * 5 / sqrt(200) * sqrt(2) = 2.
    assert max(widths) < 0.25


def test_items_of_a_cluster_are_resampled_as_one() -> None:
    generator = torch.Generator().manual_seed(2)
    means_C = torch.randn(30, generator=generator)
    clusters_N = torch.arange(30).repeat_interleave(40)
    values_N1 = means_C[clusters_N][:, None]
    alone = bootstrap(values_N1, first, resamples=2000)
    together = bootstrap(values_N1, first, clusters_N=clusters_N, resamples=2000)
    assert together.value == pytest.approx(alone.value)
    ratio = (together.upper - together.lower) / (alone.upper - alone.lower)
    assert ratio == pytest.approx(math.sqrt(40), rel=0.15)


def test_a_mean_over_groups_varies_only_by_what_varies_within_them() -> None:
    generator = torch.Generator().manual_seed(6)
    # Pooled, a resample with more of the first group's items would have a larger mean.
    groups = [torch.full((n, 1), level) for n, level in ((40, 0.9), (5, 0.1))]
    still = bootstrap_within(groups, first)
    assert [still.value, still.lower, still.upper] == pytest.approx([0.5] * 3)
    spread = [torch.randn(n, 1, generator=generator).double() for n in (50, 200)]
    found = bootstrap_within(spread, first)
    assert found.value == pytest.approx(float(spread[0].mean() + spread[1].mean()) / 2)
    error = math.sqrt(sum(float(each.var(correction=0)) / len(each) for each in spread)) / 2
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert bootstrap_within(spread[:1], first) == bootstrap(spread[0], first)
    assert math.isnan(bootstrap_within([*spread, torch.ones(1, 1)], first).lower)


def test_a_bootstrap_repeats_with_its_seed_and_ignores_the_order_of_columns_means() -> None:
    values_NK = torch.rand(50, 2, generator=torch.Generator().manual_seed(3))
    draws = [bootstrap(values_NK, lambda m: m.prod(1), seed=7) for _ in range(2)]
    assert draws[0] == draws[1]
    alone = bootstrap(values_NK[:1], first)
    assert alone.value == float(values_NK[0, 0])
    assert math.isnan(alone.lower) and math.isnan(alone.upper)


@pytest.mark.parametrize("count,of", [(0, 20), (20, 20), (7, 20), (1, 3000)])
def test_a_share_has_the_bounds_that_solve_the_score_equation(count: int, of: int) -> None:
    found = share(count, of)
    assert 0 <= found.lower <= found.value <= found.upper <= 1
    for bound in (found.lower, found.upper):
        if 0 < bound < 1:
            score = (found.value - bound) / math.sqrt(bound * (1 - bound) / of)
            assert abs(score) == pytest.approx(1.959963984540054)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        share(0, 0)


def test_mcnemar_is_the_binomial_test_of_the_disagreements() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(8, 1) == mcnemar(1, 8) == 2 * (1 + 9) / 512
    assert mcnemar(1500, 1000) < 1e-20


def test_holm_multiplies_by_the_number_of_tests_left() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_an_interval_is_written_with_four_digits() -> None:
    found = Interval(0.56, 0.3706733186979878, 0.7333436111893266)
    assert f"{found}" == str(found) == "0.56 [0.3707, 0.7333]"
    assert f"{found:.1%}" == "56.0% [37.1%, 73.3%]"
    assert f"{Interval(0.123456, math.nan, math.nan)}" == "0.1235"
