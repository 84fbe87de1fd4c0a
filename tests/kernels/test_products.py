"""Products with packed matrices against their specification, and a row against its mates."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectool.kernels import build, products
from spectool.kernels.layout import to_lines
from spectool.kernels.products import PackedProduct, Precision, precisions, twin
from spectool.kernels.segments import Segment, assemble

pytestmark = pytest.mark.skipif(
    build.missing() is not None, reason=f"no kernels here: {build.missing()}"
)

FORMS = ("center", "zero", "fraction", "offset", "float32", "levels", "tables", "column", "paired")
MOST_BITS = {"levels": 4, "tables": 4, "column": 4}
# Of one segment, and of two, "mixed", with other bits and columns.
FORMATS = [
    (form, bits)
    for form in (*FORMS, "mixed")
    for bits in ((4,) if form == "paired" else range(1, MOST_BITS.get(form, 8) + 1))
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_segment(form: str, bits: int, n: int, k: int, group_size: int, seed: int) -> Segment:
    """Make a segment of a form with random codes and parameters as float16 stores them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape, top = (n, -(-k // group_size)), 2**bits
    codes = torch.randint(top, (n, k), generator=generator, dtype=torch.uint8)
    segment = Segment(
        codes=codes, bits=bits, group_size=group_size, scale=normal(*shape).half().float()
    )
    whole = torch.randint(top, shape, generator=generator).float()
    table = torch.randint(3, (n,), generator=generator)
    forms = {
        "center": lambda: replace(segment, center=top // 2),
        "zero": lambda: replace(segment, zero=whole),
        "fraction": lambda: replace(segment, zero=(whole + normal(*shape)).half().float()),
        "offset": lambda: replace(segment, offset=normal(*shape)),
        "float32": lambda: replace(segment, scale=normal(*shape)),
        "levels": lambda: replace(segment, levels=normal(1, top)),
        "tables": lambda: replace(segment, levels=normal(3, top), table=table),
        "column": lambda: replace(segment, column_levels=normal(k, top)),
        "paired": lambda: replace(segment, levels=normal(1, 32), paired=True),
    }
    return forms[form]()


def make_segments(form: str, bits: int) -> tuple[list[Segment], tuple[int, int]]:
    """Make the segments of a matrix of one of `FORMATS`, of odd sizes; return its shape, too."""
    if form != "mixed":
        group_size = 600 if form == "paired" else 70
        return [make_segment(form, bits, 77, 300, group_size, seed=bits)], (77, 300)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(bits))
    high = make_segment("zero", bits, 77, 30, 30, seed=2 * bits)
    low = make_segment("zero", 1, 77, 100, 100, seed=bits + 1)
    scale = torch.rand(100, generator=torch.Generator().manual_seed(bits)) + 0.5
    segments = [
        replace(high, columns=order[:30]),
        replace(low, columns=order[30:], column_scale=scale),
    ]
    return segments, (77, 130)


def check_product(
    segments: list[Segment], x_Nm: Tensor, bias_n: Tensor | None, precision: Precision
) -> None:
    """Compare a product with its specification: to the bit, or to 1e-5 of the sum of |x| |w|."""
    shape = len(segments[0].codes), x_Nm.shape[1]
    product = PackedProduct(segments, shape, precision)
    weight_nm = assemble(segments, shape)
    assert torch.equal(product.rows(), weight_nm)
    found_Nn = product(x_Nm, bias_n)
    assert found_Nn.dtype == x_Nm.dtype
    if precision != "exact":
        expected_Nn = twin(x_Nm, segments, shape, precision, bias_n)
        assert torch.equal(found_Nn.nan_to_num(7.0), expected_Nn.nan_to_num(7.0))
        return
    exact_Nn, size_Nn = (
        x_Nm.double() @ weight_nm.double().T,
        x_Nm.abs().double() @ weight_nm.abs().double().T,
    )
    if bias_n is not None:
        exact_Nn, size_Nn = exact_Nn + bias_n, size_Nn + bias_n.abs()
    # bfloat16 rounds the result to 8 bits.
    rounding_Nn = 2.0**-8 * exact_Nn.abs() if x_Nm.dtype == torch.bfloat16 else 0.0
    assert bool(((found_Nn - exact_Nn).abs() <= 1e-5 * size_Nn + rounding_Nn).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_products_are_those_of_the_specification(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(FORMS))
    bits = 4 if form == "paired" else data.draw(st.integers(1, MOST_BITS.get(form, 8)))
    n, k = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 160)) * 2
    group_size = data.draw(st.integers(1, 300)) if form != "paired" else 2 * k
    segment = make_segment(form, bits, n, k, group_size, data.draw(st.integers(0, 1 << 20)))
    if data.draw(st.booleans()):
        # Codes that hypothesis likes: repeated, extreme.
        few = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=5))
        index = torch.arange(n * k).view(n, k) % len(few)
        segment = replace(segment, codes=torch.tensor(few, dtype=torch.uint8)[index])
    num_rows = data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(k)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x_Nm = torch.randn(num_rows, k, generator=generator).to(dtype)
    bias_n = torch.randn(n, generator=generator) if data.draw(st.booleans()) else None
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    precision = data.draw(st.sampled_from(precisions([segment])))
    check_product([segment], x_Nm, bias_n, precision)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("num_rows", [1, 5, 19])
def test_segments_read_their_own_columns(precision: Precision, num_rows: int) -> None:
    order = torch.randperm(170, generator=torch.Generator().manual_seed(0))
    high = make_segment("zero", 4, 37, 44, 44, seed=1)
    low = make_segment("offset", 1, 37, 126, 126, seed=2)
    segments = [
        replace(high, columns=order[:44]),
        replace(low, columns=order[44:], column_scale=torch.rand(126) + 0.5),
    ]
    x_Nm = torch.randn(num_rows, 170, generator=torch.Generator().manual_seed(3))
    check_product(segments, x_Nm, None, precision)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-36, 3e38, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("form", ["zero", "levels", "offset"])
def test_activations_of_any_size(value: float, form: str) -> None:
    segment = make_segment(form, 4, 20, 96, 32, seed=4)
    x_Nm = torch.randn(6, 96, generator=torch.Generator().manual_seed(5))
    x_Nm[2], x_Nm[4, 40] = value, value
    for precision in ("int16", "int8"):
        check_product([segment], x_Nm, None, precision)
    found_Nn = PackedProduct([segment], (20, 96), "exact")(x_Nm, None)
    others = [0, 1, 3, 5]
    check_product([segment], x_Nm[others], None, "exact")
    assert bool(found_Nn[others].isfinite().all())
    assert bool(found_Nn[4].isfinite().all()) == (abs(value) < 1)


def check_rows(product: PackedProduct, dtype: torch.dtype) -> None:
    """Compare rows with the same rows at all widths to 64, by one thread and by several."""
    n, k = product.shape
    x_Nm = torch.randn(200, k, generator=torch.Generator().manual_seed(7)).to(dtype)
    bias_n = torch.randn(n)
    torch.set_num_threads(1)
    together_Nn = product(x_Nm, bias_n)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for width in range(1, 65):
            begin = (7 * width) % (200 - width)
            part_Nn = product(x_Nm[begin : begin + width], bias_n)
            assert torch.equal(part_Nn, together_Nn[begin : begin + width])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("form", ["zero", "tables"])
def test_a_row_does_not_depend_on_its_mates(
    form: str, precision: Precision, dtype: torch.dtype
) -> None:
    segment = make_segment(form, 3, 130, 200, 64, seed=6)
    check_rows(PackedProduct([segment], (130, 200), precision), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "bits"), FORMATS)
def test_rows_of_every_format(form: str, bits: int, dtype: torch.dtype) -> None:
    segments, shape = make_segments(form, bits)
    for precision in precisions(segments):
        check_rows(PackedProduct(segments, shape, precision), dtype)


def test_strided_activations_and_biases_are_read_as_their_values() -> None:
    segment = make_segment("zero", 4, 42, 124, 32, seed=8)
    product = PackedProduct([segment], (42, 124), "exact")
    x_Nm, bias_n = torch.randn(5, 124), torch.randn(42)
    found_Nn = product(x_Nm.T.contiguous().T, bias_n.repeat(2, 1).T.contiguous()[:, 0])
    assert torch.equal(found_Nn, product(x_Nm, bias_n))
    nested = product(x_Nm[:4].view(2, 2, 124), bias_n)
    assert torch.equal(nested.view(4, 42), found_Nn[:4])


def test_some_outputs_are_unpacked() -> None:
    segment = make_segment("tables", 2, 90, 70, 32, seed=9)
    product = PackedProduct([segment], (90, 70), "int8")
    weight_nm, some = assemble([segment], (90, 70)), torch.tensor([89, 0, 17, 17])
    assert torch.equal(product.rows(some), weight_nm[some])
    assert torch.equal(product.rows(slice(3, 60, 2)), weight_nm[3:60:2])


def test_columns_and_pairs_have_exact_products_only() -> None:
    assert precisions([make_segment("column", 3, 8, 8, 8, seed=0)]) == ("exact",)
    assert precisions([make_segment("paired", 4, 8, 8, 8, seed=0)]) == ("exact",)
    assert precisions([make_segment("zero", 4, 8, 8, 8, seed=0)]) == get_args(Precision)


def test_a_packed_matrix_takes_the_memory_of_its_codes_and_scales() -> None:
    segment = make_segment("zero", 4, 256, 1024, 128, seed=0)
    bits = 8 * PackedProduct([segment], (256, 1024), "int8").nbytes / (256 * 1024)
    assert 4.25 <= bits <= 4.3


def test_what_a_matrix_was_made_of_is_not_kept() -> None:
    segment = make_segment("zero", 4, 64, 128, 32, seed=0)
    parts = [weakref.ref(part) for part in (segment.codes, segment.scale, segment.zero)]
    product = PackedProduct([segment], (64, 128), "int8")
    del segment
    gc.collect()
    assert [part() for part in parts] == [None, None, None]
    assert product.rows().shape == (64, 128)


@pytest.mark.parametrize(("precision", "cost"), [("int8", 2e-2), ("int16", 8e-5)])
@pytest.mark.parametrize("form", ["center", "zero", "fraction", "offset"])
def test_rounded_activations_cost_little(form: str, precision: Precision, cost: float) -> None:
    segment = make_segment(form, 4, 60, 300, 100, seed=1)
    x_Nm = torch.randn(9, 300, generator=torch.Generator().manual_seed(2))
    found_Nn = PackedProduct([segment], (60, 300), precision)(x_Nm, None)
    exact_Nn = x_Nm @ assemble([segment], (60, 300)).T
    assert float((found_Nn - exact_Nn).norm() / exact_Nn.norm()) < cost


@pytest.mark.parametrize("form", ["levels", "tables"])
@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_rounded_levels_cost_little(form: str, precision: Precision) -> None:
    segment = make_segment(form, 4, 60, 300, 100, seed=1)
    x_Nm = torch.randn(9, 300, generator=torch.Generator().manual_seed(2))
    found_Nn = PackedProduct([segment], (60, 300), precision)(x_Nm, None)
    exact_Nn = x_Nm @ assemble([segment], (60, 300)).T
    assert float((found_Nn - exact_Nn).norm() / exact_Nn.norm()) < 0.02


def test_levels_are_read_whatever_their_strides() -> None:
    segment = make_segment("tables", 4, 40, 64, 64, seed=1)
    assert segment.levels is not None
    strided = replace(segment, levels=segment.levels.T.contiguous().T)
    for precision in get_args(Precision):
        check_product([strided], torch.randn(3, 64), None, precision)


def test_no_rows_have_no_outputs() -> None:
    product = PackedProduct([make_segment("zero", 4, 40, 64, 64, seed=1)], (40, 64), "exact")
    assert product(torch.empty(2, 0, 64), None).shape == (2, 0, 40)


def test_tensors_of_other_sizes_are_not_read() -> None:
    segment = make_segment("zero", 4, 40, 64, 64, seed=1)
    product = PackedProduct([segment], (40, 64), "exact")
    for x_Nm, bias_n in ((torch.randn(3, 32), None), (torch.randn(3, 64), torch.randn(3))):
        with pytest.raises(AssertionError):
            product(x_Nm, bias_n)
    with pytest.raises(AssertionError):
        PackedProduct([replace(segment, columns=torch.arange(64) + 1)], (40, 64), "exact")


def test_wrong_products_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    products.check()
    monkeypatch.setattr(products, "to_lines", lambda codes, bits: to_lines(codes.flip(1), bits))
    with pytest.raises(RuntimeError, match="compute wrong products on this machine"):
        products.check()
