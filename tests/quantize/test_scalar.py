"""Scalar codebooks against slow references: bit allocation, stored fields, columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.errors import UnsupportedError, UsageError
from spectool.quantize.codebook import fit_levels
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.methods.scalar import (
    DISTORTION,
    MAX_BITS,
    Scalar,
    ScalarLinear,
    TrainedLevels,
    allocate,
    max_levels,
)
from spectool.quantize.statistics import LinearStats

GENERATOR = torch.Generator()


def correlated(m: int, *, tokens: int = 400, seed: int = 0) -> Tensor:
    """Draw correlated inputs, some of them large."""
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(m, m, generator=noise) / m**0.5
    x_Tm = torch.randn(tokens, m, generator=noise) @ (torch.eye(m) + mixing)
    x_Tm[:, : m // 8] *= 6
    return x_Tm


def made(
    weight_nm: Tensor, x_Tm: Tensor | None = None, **options: Any
) -> tuple[ScalarLinear, dict[str, Tensor]]:
    stats = None
    if x_Tm is not None:
        stats = LinearStats(("hessian",))
        stats.add(x_Tm)
    config = Scalar.Config(**options)
    fields = Scalar(config).pack(weight_nm, stats, GENERATOR)
    shape = (weight_nm.shape[0], weight_nm.shape[1])
    linear = Scalar(config).build(shape)
    linear.q.load_state_dict(fields)
    return linear, fields


def test_bits_are_the_best_of_all_ways_to_share_them() -> None:
    noise = torch.Generator().manual_seed(0)
    for bits in (1.0, 1.5, 2.0, 3.0):
        cost_m = torch.rand(5, generator=noise).pow(3)
        found = allocate(cost_m, bits).tolist()
        total, most = int(5 * bits), max_levels(5, bits)

        def error(given: Any, cost_m: Tensor = cost_m) -> float:
            return sum(float(w) * DISTORTION[b] for w, b in zip(cost_m, given, strict=True))

        every = [
            given
            for given in itertools.product(range(MAX_BITS + 1), repeat=5)
            if sum(given) <= total and sum(1 << b for b in given) <= most
        ]
        assert tuple(found) in every and sum(found) == total
        assert error(found) <= 1.1 * min(map(error, every))


def test_levels_never_exceed_their_storage() -> None:
    """Levels fit their storage however different the inputs are."""
    for bits in (1.0, 2.0, 3.5, 4.0):
        for power in (0, 3, 12):
            cost_m = torch.rand(97, generator=torch.Generator().manual_seed(1)).pow(power)
            given = allocate(cost_m, bits)
            assert int((1 << given.long()).sum()) <= max_levels(97, bits)
            assert int(given.sum()) <= int(97 * bits)
    assert allocate(torch.ones(8), 2.0).tolist() == [2] * 8


@pytest.mark.parametrize(("n", "m", "bits"), [(42, 123, 2.0), (5, 431, 1.3), (1, 1, 4.0)])
def test_fields_describe_the_matrix(n: int, m: int, bits: float) -> None:
    """Read the fields bit by bit in plain Python."""
    weight_nm = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    linear, fields = made(weight_nm, correlated(m), bits=bits)
    widths = fields["bits"].tolist()
    stored = fields["levels"].tolist()
    starts = [sum(1 << b for b in widths[:j]) for j in range(m)]
    restored = linear.dequantize().tolist()
    for i, row in enumerate(fields["codes"].tolist()):
        flat = [(byte >> bit) & 1 for byte in row for bit in range(8)]
        offset = 0
        for j, width in enumerate(widths):
            code = sum(flat[offset + t] << t for t in range(width))
            offset += width
            assert restored[i][j] == stored[starts[j] + code]
        assert not any(flat[offset:]), "padding is zero"
    assert not any(stored[sum(1 << b for b in widths) :])
    some = torch.tensor([n - 1, 0, n - 1])
    assert torch.equal(linear.rows(some), linear.dequantize()[some])


def test_without_statistics_each_column_has_lloyds_levels() -> None:
    """With the identity as Hessian there is no compensation, and all inputs get equal bits."""
    weight_nm = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    linear, fields = made(weight_nm)
    assert fields["bits"].tolist() == [2] * 6
    want_mK = fit_levels(weight_nm.T.contiguous(), torch.ones(6, 200), 4)
    assert torch.allclose(linear.table(), want_mK, atol=2e-3)
    error = float((linear.dequantize() - weight_nm).square().mean() / weight_nm.var())
    assert error == pytest.approx(DISTORTION[2], rel=0.15)


def test_order_of_inputs_means_nothing() -> None:
    weight_nm, x_Tm = torch.randn(30, 40), correlated(40)
    order = torch.randperm(40)
    plain, _ = made(weight_nm, x_Tm)
    moved, _ = made(weight_nm[:, order], x_Tm[:, order])
    apart = (plain.dequantize()[:, order] - moved.dequantize()).abs()
    # Sums of H in another order may move a code.
    assert float((apart > 1e-3).float().mean()) < 0.02


def output_error(linear: Any, weight_nm: Tensor, x_Tm: Tensor) -> float:
    return float(((linear.dequantize() - weight_nm) @ x_Tm.T).square().sum())


def test_errors_fall_with_bits_and_lie_below_a_grid() -> None:
    weight_nm, x_Tm = torch.randn(64, 96) * 0.1, correlated(96)
    errors = [
        output_error(made(weight_nm, x_Tm, bits=bits)[0], weight_nm, x_Tm)
        for bits in (1.0, 1.5, 2.0, 3.0, 4.0)
    ]
    assert errors == sorted(errors, reverse=True)
    for bits, error in ((2, errors[2]), (3, errors[3])):
        config = RTN.Config(bits=bits, group_size=0)
        grid = RTN(config).build((64, 96))
        grid.q.load_state_dict(RTN(config).pack(weight_nm, None, GENERATOR))
        assert error < 0.5 * output_error(grid, weight_nm, x_Tm)


def test_large_inputs_get_more_bits() -> None:
    _, fields = made(torch.randn(64, 96), correlated(96))
    bits = fields["bits"].float()
    assert bits[:12].mean() > bits[12:].mean() + 0.5


def test_a_matrix_of_few_values_stays() -> None:
    values = torch.tensor([-0.5, 0.25, 1.0])
    weight_nm = values[torch.randint(3, (40, 16), generator=torch.Generator().manual_seed(0))]
    linear, _ = made(weight_nm, correlated(16), bits=4.0)
    assert torch.equal(linear.dequantize(), weight_nm)


@pytest.mark.parametrize("bits", [1.0, 2.3])
def test_contract(check_contract: Callable[..., None], bits: float) -> None:
    check_contract("scalar", torch.randn(42, 123) * 0.05, bits=bits)


def test_bits_of_a_7b_matrix() -> None:
    """Levels add 16 x 1.5 x 2^b / n bits per weight, their counts 8 / n."""
    layout = Scalar(Scalar.Config(bits=2.0)).layout((4096, 4096))
    stored = sum(8 * dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())
    assert stored / 4096**2 == pytest.approx(2 + 16 * 6 / 4096 + 8 / 4096)


def test_zeros_stay_and_what_float16_cannot_hold_is_refused() -> None:
    assert not made(torch.zeros(5, 7))[0].dequantize().any()
    for factor in (1e6, 1e-12):
        with pytest.raises(UnsupportedError, match="float16"):
            made(torch.randn(5, 7) * factor)
    for bits in (0.9, 4.5):
        with pytest.raises(UsageError, match="--bits"):
            Scalar.Config(bits=bits)


def test_the_part_computes_what_it_stores() -> None:
    weight_nm, x_Tm = torch.randn(20, 33), correlated(33)
    linear, _ = made(weight_nm, x_Tm, bits=2.2)
    before = linear.dequantize()
    part = TrainedLevels(linear, weight_nm, torch.float32)
    with torch.no_grad():
        assert torch.allclose(part(x_Tm), x_Tm @ before.T, atol=1e-3)
    part.store()
    assert torch.allclose(linear.dequantize(), before, atol=2e-3)
    loss = part(x_Tm).square().sum()
    loss.backward()
    # A weight's gradient passes straight through to its choice, relative to the mean.
    slope_nm = (2 * (x_Tm @ linear.dequantize().T)).T @ x_Tm * part.spread_m
    assert part.choice_nm.grad is not None and part.level_mK.grad is not None
    relative = slope_nm / slope_nm.abs().mean()
    assert torch.allclose(part.choice_nm.grad, relative, rtol=0.05, atol=0.05)
    # A level gets the gradients of all its weights, divided by its curvature.
    codes, found = linear.codes(), []
    for j, i in ((3, 0), (20, 5)):
        hit = codes[:, j] == codes[i, j]
        want = float(slope_nm[hit, j].sum() / hit.sum() / part.spread_m[j].square())
        found.append(float(part.level_mK.grad[j, int(codes[i, j])]) / want)
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_codes_that_are_not_the_nearest_survive_moving_levels() -> None:
    """The fit starts from codes of error compensation, which are often not the nearest."""
    weight_nm, x_Tm = torch.randn(40, 33), correlated(33)
    linear, _ = made(weight_nm, x_Tm)
    before = linear.codes()
    part = TrainedLevels(linear, weight_nm, torch.float32)
    with torch.no_grad():
        for factor in (0.99, 1.02):
            part.level_mK *= factor
            part.store()
            assert torch.equal(linear.codes(), before)
    straight = (weight_nm[..., None] - linear.table()).abs().argmin(-1).to(torch.uint8)
    assert float((straight != before).float().mean()) > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_has_the_planned_bits_and_every_block_gains(
    check_fitted: Callable[..., Any], text_file: str, family: str
) -> None:
    job = {"calibration": [text_file], "samples": 4, "seq_len": 32}
    for _, fit in check_fitted("scalar", family, job=job, epochs=2):
        assert fit.loss_after < fit.loss_start
