"""Triton kernels of packed products against the weights that segments stand for.

`test_triton_products.py` runs this file in processes of its own: whether Triton interprets is
settled when it is imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.kernels.segments import Segment, assemble
from spectool.kernels.triton_products import TritonProduct, packed_product

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def draw(
    n: int, k: int, bits: int, group_size: int, kind: str, generator: torch.Generator
) -> Segment:
    """Draw a segment of one of the forms that formats have."""
    groups = -(-k // group_size)
    options: dict[str, Any] = {}
    if kind == "centred":
        options["center"] = 1 << (bits - 1)
    elif kind == "zeros":
        options["zero"] = torch.randint(0, 1 << bits, (n, groups), generator=generator).float()
    elif kind == "fractions":
        options["zero"] = torch.randn(n, groups, generator=generator) * (1 << bits)
    elif kind == "offsets":
        options["offset"] = torch.randn(n, groups, generator=generator)
    elif kind == "columns":
        options["column_levels"] = torch.randn(k, 1 << bits, generator=generator)
    else:
        tables = 1 if kind == "levels" else 3
        options["levels"] = torch.randn(tables, 1 << bits, generator=generator)
        if kind == "tables":
            options["table"] = torch.randint(0, tables, (n,), generator=generator)
    return Segment(
        codes=torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
        scale=torch.rand(n, groups, generator=generator) + 0.1,
        **options,
    )


def draw_pairs(n: int, k: int, generator: torch.Generator) -> Segment:
    """Draw a segment of pairs, of which some hold an outlier."""
    segment = draw(n, k, 4, k, "offsets", generator)
    pairs = segment.codes.view(n, -1, 2)
    pairs[..., 0][pairs[..., 0] == 8] = 1
    pairs[:, ::3, 1] = 8
    levels = torch.randn(1, 32, generator=generator)
    levels[:, 8] = 0
    return replace(segment, offset=None, levels=levels, paired=True)


def draw_two(n: int, m: int, generator: torch.Generator) -> list[Segment]:
    """Draw the segments of a matrix of signs and salient columns."""
    order = torch.randperm(m, generator=generator)
    high, low = order[: m // 5].sort().values, order[m // 5 :].sort().values
    return [
        replace(draw(n, len(high), 4, len(high), "zeros", generator), columns=high),
        replace(
            draw(n, len(low), 1, len(low), "offsets", generator),
            columns=low,
            column_scale=torch.rand(len(low), generator=generator) + 0.5,
        ),
    ]


FORMS = ["rtn2", "rtn3", "rtn5", "rtn8", "hqq4", "int8", "odd-groups", "scale-each-block"]
FORMS += ["levels", "tables", "columns", "pairs", "two"]


def make(form: str, n: int, m: int) -> list[Segment]:
    generator = torch.Generator().manual_seed(n + m)
    if form == "two":
        return draw_two(n, m, generator)
    if form == "pairs":
        return [draw_pairs(n, m + m % 2, generator)]
    bits, group_size, kind = {
        "rtn2": (2, 64, "zeros"),
        "rtn3": (3, 128, "zeros"),
        "rtn5": (5, m, "centred"),
        "rtn8": (8, 32, "zeros"),
        "hqq4": (4, 64, "fractions"),
        "int8": (8, m, "centred"),
        "odd-groups": (6, 20, "fractions"),
        "scale-each-block": (7, 512, "offsets"),
        "levels": (4, 64, "levels"),
        "tables": (1, m, "tables"),
        "columns": (3, m, "columns"),
    }[form]
    return [draw(n, m, bits, group_size, kind, generator)]


def build(form: str, n: int, m: int) -> tuple[TritonProduct, Tensor]:
    """Build a product on the device, and its weights on the host."""
    segments = make(form, n, m)
    moved = [
        replace(
            segment,
            **{
                name: value.to(DEVICE)
                for name in Segment.__slots__
                if isinstance(value := getattr(segment, name), Tensor)
            },
        )
        for segment in segments
    ]
    return TritonProduct(moved, (n, m)), assemble(segments, (n, m))


def activations(num_rows: int, m: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, m, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("n", "m", "num_rows"), [(5, 300, 3), slow(1, 6, 1), slow(131, 1100, 17), slow(70, 128, 70)]
)
def test_it_multiplies_with_the_weights(
    form: str, n: int, m: int, num_rows: int, dtype: torch.dtype
) -> None:
    product, weight_nm = build(form, n, m)
    x_Nm = activations(num_rows, m, dtype)
    bias_n = activations(1, n, dtype)[0] if num_rows > 1 else None
    found_Nn = product(x_Nm.to(DEVICE), None if bias_n is None else bias_n.to(DEVICE)).cpu()
    assert found_Nn.dtype == dtype
    exact_Nn = x_Nm.double() @ weight_nm.double().T
    size_Nn = x_Nm.double().abs() @ weight_nm.double().abs().T
    if bias_n is not None:
        exact_Nn += bias_n.double()
        size_Nn += bias_n.double().abs()
    rounding_Nn = exact_Nn.abs() / 256 if dtype == torch.bfloat16 else 0
    assert bool(((found_Nn.double() - exact_Nn).abs() <= 1e-5 * size_Nn + rounding_Nn).all())


@pytest.mark.parametrize("form", FORMS)
def test_it_unpacks_the_weights(form: str) -> None:
    product, weight_nm = build(form, 42, 300)
    assert torch.equal(product.rows().cpu(), weight_nm)
    ids_N = torch.tensor([41, 3, 3])
    assert torch.equal(product.rows(ids_N.to(DEVICE)).cpu(), weight_nm[ids_N])
    bits = {"rtn2": 2, "int8": 8}.get(form)
    if bits is not None:
        assert product.nbytes >= 42 * 512 * bits // 8


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*map(slow, FORMS[:-1]), "two"])
def test_a_row_does_not_depend_on_its_mates(form: str, dtype: torch.dtype) -> None:
    product, _ = build(form, 42, 300)
    x_Nm = activations(64, 300, dtype).to(DEVICE)
    whole_Nn = product(x_Nm, None)
    for width in (1, 2, 15, 16, 17, 33):
        for start in (0, 63 - width):
            part_Nn = product(x_Nm[start : start + width], None)
            assert torch.equal(part_Nn, whole_Nn[start : start + width])


def test_activations_of_any_strides_and_many_dimensions() -> None:
    product, _ = build("two", 42, 300)
    x_Nm = activations(6, 300, torch.bfloat16).to(DEVICE)
    expected_Nn = product(x_Nm, None)
    assert torch.equal(product(x_Nm.T.contiguous().T, None), expected_Nn)
    assert torch.equal(product(x_Nm.view(2, 3, 300), None), expected_Nn.view(2, 3, 42))
    assert product(x_Nm[:0], None).shape == (0, 42)


def test_rows_beyond_those_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    product, _ = build("rtn2", 5, 300)
    x_Nm = activations(7, 300, torch.float32).to(DEVICE)
    expected_Nn = product(x_Nm, None)
    monkeypatch.setattr("spectool.kernels.triton_products.MOST_ROWS", 3)
    assert torch.equal(product(x_Nm, None), expected_Nn)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    product, _ = build("two", 5, 70)
    bias_n = activations(1, 5, torch.float32)[0].to(DEVICE)
    x_Nm = activations(3, 70, torch.float32).to(DEVICE)
    for bias in (None, bias_n):
        torch.library.opcheck(packed_product, (x_Nm, bias, product._tensors, product._numbers))
