"""Products from tables, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spectool.kernels import build
from spectool.kernels.lookup import Lookup
from spectool.methods import import_method
from spectool.model.packed import PackedLinear

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pack(n: int, m: int, **options: Any) -> PackedLinear:
    method = import_method("vq", "quantizer")
    quantizer = method(method.Config(**options))
    generator = torch.Generator().manual_seed(n + m)
    linear: PackedLinear = quantizer.build((n, m))
    fields = quantizer.pack(torch.randn(n, m, generator=generator), None, generator)
    linear.q.load_state_dict(fields)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"codes": 16, "width": 4},
        {"codes": 300, "width": 5, "stages": 2},
        {"codes": 16, "width": 0, "frequent": 0},
    ],
)
def test_all_widths_and_numbers_of_threads_give_the_bits_of_the_twin(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    # The last group of columns is padded.
    linear, kernel = pack(431, 42, **options), Lookup(dtype)
    fields = dict(linear.q.named_buffers())
    prepared, generator = kernel.prepare(fields), torch.Generator().manual_seed(0)
    x_Nm = torch.randn(64, 42, generator=generator).to(dtype)
    bias_n = torch.randn(431, generator=generator).to(dtype)
    expected_Nn = kernel.twin(x_Nm, fields, bias_n)
    exact_Nn = x_Nm.double() @ linear.dequantize().double().T + bias_n.double()
    torch.testing.assert_close(expected_Nn, exact_Nn.to(dtype), rtol=1e-2, atol=1e-4)
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for width in (1, 2, 4, 5, 8, 9, 16, 17, 33, 64):
            found_Nn = kernel.linear(x_Nm[-width:], prepared, bias_n)
            assert torch.equal(found_Nn, expected_Nn[-width:])


def test_the_smallest_and_largest_numbers_of_a_codebook_are_exact() -> None:
    values = torch.tensor([2.0**-24, -(2.0**-24), 2.0**-14, 65504.0, -0.0, 1023 * 2.0**-24])
    fields = {
        "codes": torch.arange(6, dtype=torch.uint8)[:, None],
        "codebook": values.half().view(1, 1, 6, 1),
    }
    kernel = Lookup(torch.float32)
    found_Nn = kernel.linear(torch.tensor([[3.0]]), kernel.prepare(fields), None)
    assert torch.equal(found_Nn[0], 3 * values)
