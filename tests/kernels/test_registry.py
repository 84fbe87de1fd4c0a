"""Every kernel of the table against its twin, and against itself."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from spectool.kernels import registry
from spectool.kernels.base import Kernel

CHOICES = {key: registry.choose(*key) for key in registry.KERNELS}
KERNELS = [choice.kernel for choice in CHOICES.values() if choice.kernel is not None]
each_kernel = pytest.mark.parametrize(
    "kernel", KERNELS, ids=[f"{kernel.source}-{str(kernel.dtype)[6:]}" for kernel in KERNELS]
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands(
    kernel: Kernel, n: int, m: int, num_rows: int
) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + num_rows)
    fields = kernel.example(n, m, generator)
    x = torch.randn(num_rows, m, generator=generator).to(kernel.dtype)
    return fields, x, torch.randn(n, generator=generator).to(kernel.dtype)


@each_kernel
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 7), (42, 123), (431, 64), (96, 1025)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 33])
def test_it_computes_what_the_twin_does(kernel: Kernel, n: int, m: int, num_rows: int) -> None:
    fields, x, bias = operands(kernel, n, m, num_rows)
    exact = x.double() @ kernel.matrix(fields).double().T
    # Sums are in float32; bfloat16 rounds the result to 8 bits.
    whole = kernel.dtype == torch.float32
    size = float(exact.abs().max())
    for maybe_bias, expected in ((None, exact), (bias, exact + bias.double())):
        found = kernel.linear(x, kernel.prepare(fields), maybe_bias)
        assert found.dtype == kernel.dtype
        for other in (expected, kernel.twin(x, fields, maybe_bias).double()):
            torch.testing.assert_close(
                found.double(), other, rtol=1e-5 if whole else 1e-2, atol=1e-5 * size
            )


@each_kernel
def test_strided_activations_and_biases_are_read_as_their_values(kernel: Kernel) -> None:
    fields, x, bias = operands(kernel, 42, 123, 5)
    prepared = kernel.prepare(fields)
    found = kernel.linear(x.T.contiguous().T, prepared, bias.repeat(2, 1).T.contiguous()[:, 0])
    assert torch.equal(found, kernel.linear(x, prepared, bias))


@each_kernel
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(1, 200), (301, 203), (302, 64)])
def test_a_row_does_not_depend_on_its_mates(
    kernel: Kernel, num_threads: int, n: int, m: int
) -> None:
    fields, x, bias = operands(kernel, n, m, 13)
    prepared = kernel.prepare(fields)
    torch.set_num_threads(1)
    together = kernel.linear(x, prepared, bias)
    torch.set_num_threads(num_threads)
    for size in (1, 2, 3, 4, 5, 8):
        for start in range(13 - size):
            part = kernel.linear(x[start : start + size], prepared, bias)
            assert torch.equal(part, together[start : start + size])


def before_a_forbidden_page(tensor: Tensor) -> Tensor:
    """Copy a tensor to the end of memory that may be read, as at the end of a mapped file."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes
    )
    return copy.view(tensor.shape).copy_(tensor)


@each_kernel
@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, 77), (42, 123), (96, 1025)])
def test_nothing_is_read_past_the_end_of_a_tensor(kernel: Kernel, n: int, m: int) -> None:
    fields, x, bias = operands(kernel, n, m, 5)
    expected = kernel.linear(x, kernel.prepare(fields), bias)
    at_end = {name: before_a_forbidden_page(field) for name, field in fields.items()}
    x, bias = before_a_forbidden_page(x), before_a_forbidden_page(bias)
    assert torch.equal(kernel.linear(x, kernel.prepare(at_end), bias), expected)


@each_kernel
def test_wrong_products_are_an_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.check()
    original = type(kernel).prepare

    def forget_the_last_row(self: Kernel, fields: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        weight, *rest = original(self, fields)
        return weight.roll(1, 0), *rest

    monkeypatch.setattr(type(kernel), "prepare", forget_the_last_row)
    with pytest.raises(RuntimeError, match=f"kernel {kernel.source} .* wrong products"):
        kernel.check()


def test_formats_without_a_kernel_say_so() -> None:
    assert str(registry.choose("dense", "cpu", torch.float16)) == (
        "torch (no kernel for dense in float16 on cpu)"
    )


def test_kernels_are_in_force_in_the_thread_that_entered_only() -> None:
    seen = []
    with registry.use_kernels():
        with registry.use_kernels():
            pass
        thread = threading.Thread(target=lambda: seen.append(registry._force.on))
        thread.start()
        thread.join()
        assert registry._force.on
    assert seen == [False] and not registry._force.on
    with pytest.raises(ZeroDivisionError), registry.use_kernels():
        raise ZeroDivisionError
    assert not registry._force.on
