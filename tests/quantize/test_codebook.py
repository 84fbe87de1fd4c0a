"""Levels and clusters against exhaustive searches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.quantize.codebook import (
    CELL_SHARE,
    LinearCodebook,
    SelectLevels,
    clamp_to_cells,
    cluster_rows,
    cluster_vectors,
    fit_levels,
    mean_by_label,
    nearest_codes,
)


def error(values_N: Tensor, weights_N: Tensor, level_K: Tensor) -> float:
    apart_NK = (values_N[:, None].double() - level_K.double()).square()
    return float((weights_N.double() * apart_NK.amin(1)).sum())


def best(values_N: Tensor, weights_N: Tensor, count: int) -> float:
    """Return the least error of all cuts of the sorted values into `count` runs."""
    order = values_N.argsort()
    x, w = values_N[order].double(), weights_N[order].double()
    # Sums of w, w x and w x^2 before each place.
    mass, first, second = ([0.0, *(w * x**power).cumsum(0).tolist()] for power in (0, 1, 2))
    found = float("inf")
    for cuts in itertools.combinations(range(1, len(x)), count - 1):
        total = 0.0
        for begin, end in itertools.pairwise([0, *cuts, len(x)]):
            mean = (first[end] - first[begin]) / (mass[end] - mass[begin])
            total += second[end] - second[begin] - mean * (first[end] - first[begin])
        found = min(found, total)
    return found


def test_levels_are_near_the_best_of_all() -> None:
    torch.manual_seed(0)
    shares = []
    for _ in range(40):
        values_N, weights_N = torch.randn(14), torch.rand(14) + 0.1
        (level_K,) = fit_levels(values_N[None], weights_N[None], 4)
        assert torch.equal(level_K, level_K.sort().values)
        shares.append(error(values_N, weights_N, level_K) / best(values_N, weights_N, 4))
    assert min(shares) > 1 - 1e-6 and sum(shares) / len(shares) < 1.15


def test_levels_stand_still_under_a_further_round() -> None:
    values_RN, weights_RN = torch.randn(3, 500).double(), torch.rand(3, 500).double()
    level_RK = fit_levels(values_RN, weights_RN, 8)
    codes_RN = nearest_codes(values_RN, level_RK.double())
    for row in range(3):
        for code in range(8):
            members = codes_RN[row] == code
            mean = (weights_RN[row, members] * values_RN[row, members]).sum() / weights_RN[
                row, members
            ].sum()
            assert float(level_RK[row, code]) == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize(("count", "wanted"), [(2, 0.363), (4, 0.118), (8, 0.0346), (16, 0.0096)])
def test_gaussian_errors_are_those_of_the_best_quantizers(count: int, wanted: float) -> None:
    """Compare with Max 1960, table I."""
    values_N = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    (level_K,) = fit_levels(values_N[None], torch.ones(1, len(values_N)), count)
    found = error(values_N, torch.ones(len(values_N)), level_K) / len(values_N)
    assert found == pytest.approx(wanted, rel=0.03)


def test_more_levels_than_values_and_rows_without_weight() -> None:
    values_RN = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [0.0, 5.0, 9.0]])
    weights_RN = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    level_RK = fit_levels(values_RN, weights_RN, 4)
    restored = level_RK.gather(1, nearest_codes(values_RN, level_RK).long())
    assert torch.isfinite(level_RK).all() and torch.equal(restored, values_RN)


def test_values_without_weight_pull_nothing() -> None:
    values_RN, weights_RN = torch.tensor([[-50.0, 1.0, 2.0, 90.0]]), torch.tensor([[0, 1, 1, 0]])
    assert fit_levels(values_RN, weights_RN, 2).tolist() == [[1.0, 2.0]]


def test_clusters_find_what_lies_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres_KD = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    label_P = torch.arange(80) % 4
    points_PD = centres_KD[label_P] + torch.randn(80, 3, generator=generator)
    found_P = cluster_rows(points_PD, 4, generator)
    assert torch.equal(found_P, label_P), "numbered as their first points stand"
    for seed in range(8):
        again_P = cluster_rows(points_PD, 4, torch.Generator().manual_seed(seed))
        assert torch.equal(again_P, found_P)


def test_clusters_of_few_or_equal_points() -> None:
    assert cluster_rows(torch.zeros(5, 2), 3, torch.Generator()).tolist() == [0] * 5
    assert cluster_rows(torch.eye(3), 8, torch.Generator()).tolist() == [0, 1, 2]


def test_vectors_are_a_fixed_point_and_all_are_used() -> None:
    generator = torch.Generator().manual_seed(0)
    points_PD = torch.randn(300, 3, generator=generator)
    weights_P = torch.rand(300, generator=generator) + 0.1
    label_P = cluster_vectors(points_PD, weights_P, 20, torch.Generator().manual_seed(1))
    assert sorted(set(label_P.tolist())) == list(range(20))
    centres_KD = mean_by_label(points_PD, weights_P, label_P, 20)
    for k in range(20):
        hit = label_P == k
        want = (points_PD[hit] * weights_P[hit, None]).sum(0) / weights_P[hit].sum()
        assert torch.allclose(centres_KD[k], want, atol=1e-5)
    again_P = torch.cdist(points_PD, centres_KD).argmin(1)
    assert float((again_P != label_P).float().mean()) < 0.03
    with pytest.raises(RuntimeError):
        cluster_vectors(points_PD[:5], weights_P[:5], 6, torch.Generator())


def test_a_linear_codebook_leaves_no_code_behind() -> None:
    """With data far from all initial vectors, plain gradients would move only those in use."""

    def used(trained: str) -> float:
        generator = torch.Generator().manual_seed(0)
        middle_KD = 6 * torch.randn(32, 2, generator=generator) + 20
        book = LinearCodebook(torch.randn(256, 2, generator=generator))
        values = {"basis": [book.basis_KD], "turn": [book.transform_DD]}[trained]
        optimizer = torch.optim.Adam(values, lr=0.05)
        hit: set[int] = set()
        for step in range(400):
            places_P = torch.randint(32, (256,), generator=generator)
            points_PD = middle_KD[places_P] + torch.randn(256, 2, generator=generator)
            code_P = torch.cdist(points_PD, book().detach()).argmin(1)
            optimizer.zero_grad()
            (book()[code_P] - points_PD).square().mean().backward()
            optimizer.step()
            if step >= 250:
                hit |= set(code_P.tolist())
        return len(hit) / 256

    assert used("turn") > 2 * used("basis")


def test_the_gradient_of_chosen_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    values_RN, level_RK, slope_RN = (
        torch.randn(size, generator=generator) for size in ((3, 20), (3, 4), (3, 20))
    )
    codes_RN = torch.randint(4, (3, 20), generator=generator, dtype=torch.uint8)
    values_RN.requires_grad_()
    level_RK.requires_grad_()
    out_RN: Any = SelectLevels.apply(values_RN, level_RK, codes_RN)  # type: ignore[no-untyped-call]
    out_RN.backward(slope_RN)
    assert values_RN.grad is not None and torch.equal(values_RN.grad, slope_RN)
    for r in range(3):
        for k in range(4):
            assert torch.equal(out_RN[r][codes_RN[r] == k].unique(), level_RK[r, k, None].detach())
            assert level_RK.grad is not None and float(level_RK.grad[r, k]) == pytest.approx(
                sum(slope_RN[r][codes_RN[r] == k].tolist()), abs=1e-6
            )


def test_a_gradient_of_one_code_reaches_all() -> None:
    start_KD = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    book = LinearCodebook(start_KD)
    assert torch.allclose(book(), start_KD)
    book()[2].sum().backward()
    assert book.transform_DD.grad is not None and bool((book.transform_DD.grad != 0).all())
    assert book.basis_KD.grad is not None and not book.basis_KD.grad[3].any()


def test_values_come_inside_their_cells() -> None:
    level_RK = torch.tensor([[-1.0, 0.0, 2.0]])
    values_RN = torch.tensor([[-5.0, 0.9, 5.0, -0.4, 0.1]])
    codes_RN = torch.tensor([[0, 2, 2, 0, 0]])
    want = [-5.0, 2 - CELL_SHARE, 5.0, -1 + 0.5 * CELL_SHARE, -1 + 0.5 * CELL_SHARE]
    found_RN = clamp_to_cells(values_RN, level_RK, codes_RN)
    assert found_RN[0].tolist() == pytest.approx(want)
    assert torch.equal(nearest_codes(found_RN, level_RK).long(), codes_RN)
