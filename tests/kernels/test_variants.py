"""All variants of the kernels compute the same bits: those that this processor runs, side by side,
and those of other machines under an emulator."""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectool.kernels import build, products, variants
from spectool.kernels.products import PackedProduct, precisions
from tests.kernels.test_products import FORMATS, make_segments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.missing() is not None, reason="no kernels here"),
]

# What Zig calls a machine, and the program that runs its programs.
EMULATED = [("aarch64-linux-musl", "aarch64", "qemu-aarch64")]
TENSORS = [name for name, kind in products._Segment._fields_ if kind is ctypes.c_void_p]
NUMBERS = [name for name, kind in products._Segment._fields_ if kind is ctypes.c_int32]


@functools.cache
def cases() -> list[tuple[PackedProduct, Tensor, Tensor | None]]:
    """Return products of all forms and widths with few and with many rows of activations."""
    found = []
    for form, bits in FORMATS:
        segments, shape = make_segments(form, bits)
        for precision in precisions(segments):
            product = PackedProduct(segments, shape, precision)
            for num_rows in (1, 3, 13):
                generator = torch.Generator().manual_seed(num_rows)
                x_Nm = torch.randn(num_rows, shape[1], generator=generator)
                x_Nm *= 10.0 ** torch.randint(-9, 9, (num_rows, 1), generator=generator)
                bias_n = torch.randn(shape[0], generator=generator) if bits % 2 else None
                found += [(product, x_Nm, bias_n), (product, x_Nm.bfloat16(), bias_n)]
    return found


def compute(variant: variants.Variant) -> list[Tensor]:
    """Compute all cases with a variant that this processor runs."""
    library = build.load_variant(variant)
    assert isinstance(library, build.Library)
    run = library.functions["spectool_products"]
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_int], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_load", lambda: run)
        return [product(x_Nm, bias_n) for product, x_Nm, bias_n in cases()]


def as_bytes(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def record(product: PackedProduct, x_Nm: Tensor, bias_n: Tensor | None) -> Iterator[bytes]:
    """Yield a product as replay.c reads it."""
    numbers = [len(product._parts), len(x_Nm), product.shape[1], product.shape[0]]
    numbers += [product._num_tiles, product.row_bytes, products._PRECISIONS[product.precision]]
    yield struct.pack("<9q", *numbers, products.TYPES[x_Nm.dtype], 2)
    tensors = [x_Nm, product._order_P, bias_n]
    for part in product._parts:
        yield from (struct.pack("<q", len(raw)) + raw for raw in map(as_bytes, tensors))
        segment = [len(NUMBERS), *(part.numbers[name] for name in NUMBERS)]
        yield struct.pack(f"<{len(segment)}q", *segment)
        tensors = [part.tensors.get(name) for name in TENSORS]
    yield from (struct.pack("<q", len(raw)) + raw for raw in map(as_bytes, tensors))


@pytest.mark.parametrize("variant", build.supported()[1:], ids=lambda variant: variant.name)
def test_variants_of_this_processor_compute_the_same_bits(variant: variants.Variant) -> None:
    expected = compute(build.supported()[0])
    for found, other in zip(compute(variant), expected, strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize(
    ("target", "emulator", "variant"),
    [
        pytest.param(target, emulator, variant, id=f"{machine}-{variant.name}")
        for target, machine, emulator in EMULATED
        for variant in variants.VARIANTS[machine]
    ],
)
def test_variants_of_other_machines_compute_the_same_bits(
    tmp_path: Path, target: str, emulator: str, variant: variants.Variant
) -> None:
    compiler = variants.find_compiler(target)
    if compiler is None or shutil.which(emulator) is None:
        pytest.skip(f"needs ziglang and {emulator} (Debian: qemu-user)")
    program = str(tmp_path / "replay")
    sources = [Path(__file__).parent / "replay.c", *(variants.FOLDER.glob("*.c"))]
    words = [*compiler, *variant.options, "-O2", "-ffp-contract=off", f"-I{variants.FOLDER}"]
    words += ["-static", *map(str, sources), "-lm", "-o", program]
    subprocess.run(words, check=True, timeout=variants._SECONDS)
    given = b"".join(raw for case in cases() for raw in record(*case))
    done = subprocess.run(
        [emulator, program], input=given, stdout=subprocess.PIPE, timeout=variants._SECONDS
    )
    assert done.returncode == 0
    expected = [as_bytes(y_Nn) for y_Nn in compute(build.supported()[0])]
    assert len(done.stdout) == sum(map(len, expected))
    begin = 0
    for (product, x_Nm, _), right in zip(cases(), expected, strict=True):
        found = done.stdout[begin : begin + len(right)]
        assert found == right, (product.precision, product._parts[0].plain.bits, x_Nm.shape)
        begin += len(right)
