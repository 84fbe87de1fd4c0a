"""Layers in C against their specification in torch, and a row against its mates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectool.kernels import build, steps
from spectool.kernels.products import PackedProduct
from spectool.kernels.segments import Segment
from spectool.kernels.steps import (
    ACTIVATIONS,
    Activate,
    Add,
    Attend,
    Gate,
    Layer,
    Matrix,
    Norm,
    Products,
    Rotate,
    Rows,
    Step,
    Store,
    View,
)

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=f"no kernels here: {build.missing()}"
)

# Sizes that are no multiples of the vectors of any variant.
WIDTH, HEADS, KEY_HEADS, HEAD, INNER = 45, 6, 2, 10, 83
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(n: int, m: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (normal(n, m, seed=seed) / m**0.5).to(dtype)


def packed(n: int, m: int, precision: str, seed: int, group_size: int = 32) -> PackedProduct:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, m), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, -(-m // group_size), generator=generator) / m**0.5).half().float()
    segment = Segment(codes=codes, bits=4, group_size=group_size, scale=scale, center=8)
    return PackedProduct([segment], (n, m), precision)  # type: ignore[arg-type]


def make_layer(
    kind: str,
    dtype: torch.dtype,
    *,
    norm: str = "rms",
    in_pairs: bool = False,
    activation: str = "silu",
    cap: float | None = None,
) -> Layer:
    """Make a layer with norms of heads, gated, whose matrices are of a kind."""

    def weight(n: int, m: int, seed: int) -> PackedProduct | Tensor:
        return dense(n, m, dtype, seed) if kind == "dense" else packed(n, m, kind, seed)

    hidden, states = View(0, WIDTH), View(1, WIDTH)
    # Queries, keys and values of a head side by side.
    queries = View(2, HEAD, HEADS, HEAD)
    keys, values = View(3, HEAD, KEY_HEADS, 2 * HEAD), View(3, HEAD, KEY_HEADS, 2 * HEAD, HEAD)
    gate, up, inner = View(5, INNER), View(6, INNER), View(5, INNER)
    plain = View(7, WIDTH)
    program: list[Step] = [
        Norm(norm, hidden, states, normal(WIDTH, seed=1), normal(WIDTH, seed=2), 1e-5),
        Products(
            1,
            [
                Matrix(2, weight(HEADS * HEAD, WIDTH, 3), normal(HEADS * HEAD, seed=4)),
                Matrix(3, weight(2 * KEY_HEADS * HEAD, WIDTH, 5), None),
            ],
        ),
        Norm("rms", queries, queries, normal(HEAD, seed=6), None, 1e-6),
        Norm("layer", keys, keys, None, None, 1e-6),
        Rotate(queries, in_pairs),
        Rotate(keys, in_pairs),
        Store(keys, values),
        Attend(queries, keys, 4, 0.3, cap),
        Products(4, [Matrix(7, weight(WIDTH, HEADS * HEAD, 7), normal(WIDTH, seed=8))]),
        Add(hidden, plain, hidden),
        Norm(norm, hidden, states, normal(WIDTH, seed=9), None, 1e-5),
        Products(
            1,
            [Matrix(5, weight(INNER, WIDTH, 10), None), Matrix(6, weight(INNER, WIDTH, 11), None)],
        ),
        Gate(gate, up, inner, activation),
        Products(5, [Matrix(7, weight(WIDTH, INNER, 12), None)]),
        Activate(plain, plain, activation),
        Add(hidden, plain, hidden),
    ]
    widths = [WIDTH, WIDTH, HEADS * HEAD, 2 * KEY_HEADS * HEAD, HEADS * HEAD, INNER, INNER, WIDTH]
    return Layer(program, widths, dtype)


def make_pass(
    dtype: torch.dtype, num_nodes: int, *, batch: int = 2, cached: int = 5, rotary: int = 6
) -> tuple[Tensor, Rows, Tensor]:
    """Make random states, a mask that hides keys of each row, and a cache of unequal lengths."""
    x_BND = normal(batch, num_nodes, WIDTH, seed=20).to(dtype)
    columns = cached + num_nodes + 3
    hidden = torch.finfo(dtype).min
    seen = torch.rand(batch, num_nodes, columns, generator=torch.Generator().manual_seed(21)) < 0.6
    starts_B = torch.arange(batch) + cached - batch + 1
    for text, start in enumerate(starts_B.tolist()):
        seen[text, :, start:] = False
        for node in range(num_nodes):
            seen[text, node, start + node] = True
    mask_BNS = torch.where(seen, 0.0, hidden)
    angles = normal(batch, num_nodes, rotary, seed=22)
    cache = normal(2, batch, KEY_HEADS, columns + 4, HEAD, seed=23).to(dtype)
    return x_BND, Rows(mask_BNS, hidden, starts_B, angles.cos(), angles.sin()), cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "exact", "int16", "int8"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_a_layer_equals_its_specification(
    dtype: torch.dtype, kind: str, norm: str, in_pairs: bool
) -> None:
    layer = make_layer(kind, dtype, norm=norm, in_pairs=in_pairs)
    for num_nodes in (1, 7, 33):
        x_BND, rows, cache = make_pass(dtype, num_nodes)
        expected_cache = cache.clone()
        expected_BND = layer.twin(x_BND, rows, *expected_cache).float()
        found_BND = layer(x_BND, rows, *cache).float()
        # An activation at the border of two integers may round to either.
        tolerance = {"int8": 2e-2, "int16": 1e-4}.get(kind, 1e-5)
        tolerance = tolerance if dtype == torch.float32 else 2e-2
        for found, expected in (
            (found_BND, expected_BND),
            (cache.float(), expected_cache.float()),
        ):
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("cap", [0.1, 3.0, 50.0])
def test_scores_are_capped(cap: float) -> None:
    x_BND, rows, cache = make_pass(torch.float32, 7)
    found = []
    for layer in (make_layer("dense", torch.float32, cap=cap), make_layer("dense", torch.float32)):
        expected_BND = layer.twin(x_BND, rows, *cache.clone())
        found.append(layer(x_BND, rows, *cache.clone()))
        assert (found[-1] - expected_BND).abs().max() <= 1e-5 * expected_BND.abs().max()
    assert not torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer = make_layer("dense", torch.float32, activation=activation)
    x_BND, rows, cache = make_pass(torch.float32, 3)
    # Large numbers too, where exponentials end.
    x_BND *= 30
    expected_BND = layer.twin(x_BND, rows, *cache.clone())
    found_BND = layer(x_BND, rows, *cache)
    assert (found_BND - expected_BND).abs().max() <= 1e-5 * expected_BND.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "exact", "int16", "int8"])
def test_a_row_does_not_depend_on_its_mates_or_on_threads(dtype: torch.dtype, kind: str) -> None:
    layer = make_layer(kind, dtype)
    x_BND, rows, cache = make_pass(dtype, 65, batch=3)
    torch.set_num_threads(2)
    together_BND = layer(x_BND, rows, *cache.clone())
    torch.set_num_threads(1)
    assert torch.equal(layer(x_BND, rows, *cache.clone()), together_BND)
    assert rows.cosine_BNR is not None and rows.sine_BNR is not None
    for text, node in ((0, 0), (1, 31), (2, 64)):
        here = slice(text, text + 1), slice(node, node + 1)
        alone = Rows(
            rows.mask_BNS[here],
            rows.hidden,
            rows.starts_B[here[0]] + node,
            rows.cosine_BNR[here],
            rows.sine_BNR[here],
        )
        # A spare text in the cache, as those that left have.
        cached = cache[:, [text, text]].clone()
        assert torch.equal(layer(x_BND[here], alone, *cached), together_BND[here])


def test_the_memory_of_many_rows_is_not_kept() -> None:
    layer = make_layer("dense", torch.float32)
    large = 2 * steps._KEPT_BYTES
    assert len(steps._arena(large)) == large
    x_BND, rows, cache = make_pass(torch.float32, 2)
    layer(x_BND, rows, *cache)
    assert len(steps._arena(1)) <= steps._KEPT_BYTES
