"""OliVe against a search pair by pair, and over every possible byte."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectool.errors import CheckpointError, UnsupportedError, UsageError
from spectool.quantize.methods.olive import (
    FACTORS,
    FLINT4,
    INT4,
    INT8,
    TYPES,
    OliVe,
    Type,
    decode,
    encode,
)
from spectool.quantize.methods.olive import search as search_rows

NORMAL = {
    "int4": [*range(-7, 8)],
    "flint4": [-16, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 16],
    "int8": [*range(-127, 128)],
}
OUTLIER = {
    "int4": [12, 16, 24, 32, 48, 64, 96],
    "flint4": [24, 32, 48, 64, 96, 128, 192],
    "int8": sorted({(8 + k) * 2**e for e in range(4, 20) for k in range(8)} & {*range(129, 32769)}),
}
KINDS = {"int4": INT4, "flint4": FLINT4, "int8": INT8}


def values(table: tuple[int | None, ...]) -> list[int]:
    return sorted(value for value in table if value is not None)


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_the_paper(name: str) -> None:
    kind = KINDS[name]
    assert values(kind.normal) == NORMAL[name]
    assert values(kind.outlier) == sorted([*OUTLIER[name], *(-x for x in OUTLIER[name])])
    assert kind.normal[kind.victim] is None and kind.outlier[kind.victim] is None
    assert kind.outlier[0] is None, "a zero magnitude could not tell its sign"
    assert max(kind.normal, key=lambda x: x or 0) < min(OUTLIER[name])  # type: ignore[operator]


def row_reference(row: Tensor, name: str) -> tuple[float, list[float]]:
    """Search all factors pair by pair; return the least error and its weights."""
    w = row.double().numpy()
    if len(w) % 2:
        w = np.append(w, 0.0)
    mu, sigma = w.mean(), w.std()
    limit = max(abs(mu + 3 * sigma), abs(mu - 3 * sigma))
    largest = max(NORMAL[name])
    numbers = np.array([*(-x for x in OUTLIER[name]), *NORMAL[name], *OUTLIER[name]])
    best: tuple[float, list[float]] = (np.inf, [])
    for factor in FACTORS:
        scale = float(np.float16(factor / largest * limit))
        made: list[float] = []
        for a, b in zip(w[::2], w[1::2], strict=True):
            p, q = (numbers[np.abs(x / scale - numbers).argmin()] for x in (a, b))
            if abs(p) > largest and abs(q) > largest:
                p, q = (p, 0) if abs(a) >= abs(b) else (0, q)
            elif abs(p) > largest:
                q = 0
            elif abs(q) > largest:
                p = 0
            made += [p * scale, q * scale]
        error = float(((np.array(made) - w) ** 2).sum())
        if error < best[0]:
            best = error, made
    return best[0], best[1][: len(row)]


def heavy(n: int, m: int, seed: int = 1) -> Tensor:
    """Draw weights of which a tenth are 3 times, and one in a hundred 15 times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight_nm = torch.randn(n, m, generator=generator)
    chance_nm = torch.rand(n, m, generator=generator)
    weight_nm[chance_nm < 0.1] *= 3
    weight_nm[chance_nm < 0.01] *= 5
    return weight_nm * 0.02


@pytest.mark.parametrize(("bits", "m"), [(4, 64), (4, 61), (8, 64)])
def test_equals_a_search_pair_by_pair(pack: Callable[..., Any], bits: int, m: int) -> None:
    weight_nm = heavy(7, m)
    packed = pack("olive", weight_nm, bits=bits)
    found = {
        name: [row_reference(row, name) for row in weight_nm]
        for name, kind in KINDS.items()
        if kind.bits == bits
    }
    name = min(found, key=lambda name: sum(error for error, _ in found[name]))
    assert KINDS[name] is TYPES[bits][int(packed.fields["kind"])]
    wanted = torch.tensor([row for _, row in found[name]]).float()
    torch.testing.assert_close(packed.module.dequantize(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["int4", "flint4"])
def test_every_byte_is_a_pair_or_is_refused(name: str) -> None:
    kind = KINDS[name]
    for low, high in itertools.product(range(16), repeat=2):
        codes = torch.tensor([[low, high]], dtype=torch.uint8)
        first, second = kind.normal[low], kind.normal[high]
        if high == 8:
            first, second = kind.outlier[low], 0
        elif low == 8:
            first, second = 0, kind.outlier[high]
        if (low, high) == (8, 8) or first is None or second is None:
            with pytest.raises(CheckpointError, match="damaged"):
                decode(codes, kind)
        else:
            assert decode(codes, kind).tolist() == [[first, second]]


@pytest.mark.parametrize("kind", [INT4, FLINT4, INT8])
def test_codes_of_what_codes_say_are_the_same(kind: Type) -> None:
    weight_nm = heavy(20, 64, seed=2)
    scale_n, error_n = search_rows(weight_nm, kind)
    codes_nm = encode(weight_nm, scale_n, kind)
    again_nm = decode(codes_nm, kind) * scale_n[:, None]
    assert torch.equal(encode(again_nm, scale_n, kind), codes_nm)
    torch.testing.assert_close((again_nm - weight_nm).square().sum(1), error_n)
    # A pair has at most one victim, next to an outlier.
    assert int((codes_nm.view(20, 32, 2) == kind.victim).sum(-1).max()) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_contract(check_contract: Callable[..., None], bits: int) -> None:
    check_contract("olive", heavy(42, 123), bits=bits)


def test_bits_of_a_7b_matrix() -> None:
    spec = OliVe(OliVe.Config()).layout((4096, 4096))
    stored = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in spec.values())
    assert 8 * stored / 4096**2 == pytest.approx(4 + 16 / 4096, abs=1e-6)


def test_isolated_outliers_cost_less_than_clipping(pack: Callable[..., Any]) -> None:
    """Compare with the best clipped 4-bit grid per row, which has no values for outliers."""
    weight_nm = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    weight_nm[:, ::128] *= 20
    clipped_n = torch.full((64,), torch.inf)
    for share in torch.linspace(0.05, 1, 96):
        scale_n1 = share * weight_nm.abs().amax(1, keepdim=True) / 7
        rounded = (weight_nm / scale_n1).round().clamp(-7, 7) * scale_n1
        clipped_n = torch.minimum(clipped_n, (rounded - weight_nm).square().sum(1))
    olive = pack("olive", weight_nm)
    assert olive.error < 0.2 * float(clipped_n.sum() / weight_nm.square().sum())


def test_on_gaussians_it_is_about_as_good_as_a_grid(pack: Callable[..., Any]) -> None:
    """Compare with a clipped grid of 15 steps, which leaves 0.0130 of the variance."""
    weight_nm = torch.randn(16, 4096, generator=torch.Generator().manual_seed(4))
    assert 0.012 < pack("olive", weight_nm).error < 0.0132


def test_outliers_everywhere_halve_the_matrix(pack: Callable[..., Any]) -> None:
    """Where outliers come in pairs, half of them become victims."""
    weight_nm = 0.01 * torch.randn(4, 2048, generator=torch.Generator().manual_seed(5))
    weight_nm[:, :8] = torch.tensor([1.0, 0.9]).repeat(4)
    dense_nm = pack("olive", weight_nm).module.dequantize()
    assert not dense_nm[:, 1:8:2].any() and float(dense_nm[:, :8:2].min()) > 0.3


def test_zeros_stay_and_what_float16_cannot_hold_is_refused(pack: Callable[..., Any]) -> None:
    weight_nm = torch.zeros(3, 40)
    weight_nm[1] = torch.randn(40)
    dense_nm = pack("olive", weight_nm).module.dequantize()
    assert not dense_nm[0].any() and not dense_nm[2].any() and dense_nm[1].any()
    with pytest.raises(UnsupportedError, match="float16"):
        pack("olive", torch.randn(4, 64) * 1e9)


def test_a_type_that_is_none_is_refused(pack: Callable[..., Any]) -> None:
    packed = pack("olive", heavy(4, 16))
    packed.module.q.kind.fill_(2)
    with pytest.raises(CheckpointError, match="has no type 2"):
        packed.module.dequantize()


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(UsageError):
        OliVe.Config(bits=bits)  # type: ignore[arg-type]
