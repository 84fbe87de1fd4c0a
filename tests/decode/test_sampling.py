"""Probabilities from logits, and reproducible draws from them."""

from __future__ import annotations

import pytest
import torch

from spectool.decode.options import SamplingParams
from spectool.decode.sampling import Draws, StepDraws, is_finite, pick
from spectool.errors import UsageError


def probs(logits: torch.Tensor, **options: float) -> torch.Tensor:
    return SamplingParams(**options).probs(logits[None])[0]


def test_probs_are_the_tempered_softmax_in_fp32() -> None:
    logits = torch.randn(3, 7, dtype=torch.bfloat16)
    found = probs(logits, temperature=0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (logits.float() / 0.5).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_very_cold_probs_are_one_hot(temperature: float, filters: dict[str, float]) -> None:
    logits = torch.tensor([[-40.0, 3.0, 2.99, -torch.inf], [5e4, -5e4, 0.0, 1.0]])
    found = probs(logits, temperature=temperature, **filters)
    assert found.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_very_hot_probs_are_flat_over_what_is_possible() -> None:
    found = probs(torch.tensor([[4.0, -9.0, -torch.inf]]), temperature=1e300)
    assert found.tolist() == [[0.5, 0.5, 0]]


def test_finite_logits_have_a_finite_largest_one() -> None:
    fine = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]])
    assert is_finite(fine)
    for wrong in (torch.nan, torch.inf):
        assert not is_finite(torch.cat([fine, torch.tensor([[0.0, wrong]])]))
    assert not is_finite(torch.full((1, 3), -torch.inf))


def test_greedy_picks_the_lowest_index_on_ties() -> None:
    scores = probs(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), temperature=0)
    assert scores.argmax(-1).tolist() == [1]


def test_filters_keep_what_they_say() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = probabilities.log()
    assert (probs(logits, temperature=1, top_k=2) > 0).tolist() == [[True, True, False, False]]
    assert (probs(logits, temperature=1, top_p=0.6) > 0).tolist() == [[True, True, False, False]]
    assert (probs(logits, temperature=1, min_p=0.2) > 0).tolist() == [[True, True, True, False]]
    torch.testing.assert_close(
        probs(logits, temperature=1, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]])
    )


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}]
)
def test_values_outside_the_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**options)


def test_pick_inverts_the_cumulative_sum() -> None:
    found = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    numbers = [0.0, 0.2499, 0.2501, 0.9999999]
    picked = pick(found.expand(4, -1), torch.tensor(numbers, dtype=torch.float64))
    assert picked.tolist() == [1, 1, 3, 3]


def test_draws_are_a_function_of_seed_request_position_and_purpose() -> None:
    one, same = Draws(3, 5), Draws(3, 5)
    first = [one.uniform(position, "token") for position in range(50)]
    one.uniform(7, "draft")
    assert first == [same.uniform(position, "token") for position in range(50)]
    others = [Draws(4, 5).uniform(9, "token"), Draws(3, 6).uniform(9, "token")]
    others += [one.uniform(10, "token"), one.uniform(9, "accept"), one.uniform(9, "draft")]
    assert len({one.uniform(9, "token"), *others}) == 6


def test_draws_are_uniform() -> None:
    numbers = torch.tensor([Draws(0, r).uniform(p, "token") for r in range(40) for p in range(100)])
    assert abs(numbers.mean() - 0.5) < 0.02
    counts = torch.histc(numbers, 20, 0, 1)
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 43.8  # 19 degrees of freedom, p = 0.001


def test_siblings_share_a_number_per_purpose() -> None:
    step = StepDraws(Draws(0, 0), 10)
    flat = torch.full((3, 1000), 1 / 1000)
    picked = step.pick(flat, [0, 1, 1]).tolist()
    assert picked[1] == picked[2] != picked[0]
    assert StepDraws(Draws(0, 0), 11).pick(flat[:1], [0]).tolist() == picked[1:2]
    assert step.below(torch.ones(2), torch.ones(2), [1, 2]).all()
    assert not step.below(torch.zeros(2), torch.ones(2), [1, 2]).any()
