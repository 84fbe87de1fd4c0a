"""Fixtures that pack one matrix by a method, or quantize a whole checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.model.packed import PackedLinear
from spectool.quantize.base import FitReport
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import measure
from spectool.quantize.plan import make_plan
from spectool.quantize.report import BlockReport, QuantizeReport
from spectool.quantize.run import quantize

# Otherwise bitsandbytes compiles its functions for a CPU at their first calls, for seconds.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class Packed:
    """A matrix packed by a method: its fields, and the runtime linear read back from a file."""

    def __init__(self, path: Path, method: str, weight_nm: Tensor, options: dict[str, Any]) -> None:
        kind = import_method(method, "quantizer")
        packer = kind(kind.Config(**options))
        self.weight_nm = weight_nm
        self.fields: dict[str, Tensor] = packer.pack(
            weight_nm, None, torch.Generator().manual_seed(0)
        )
        self.layout = dict(packer.layout(tuple(weight_nm.shape)))
        self.module: PackedLinear = packer.build(tuple(weight_nm.shape))
        save_file({name: tensor.contiguous() for name, tensor in self.fields.items()}, path)
        self.module.q.load_state_dict(load_file(path))
        self.module.eval()

    @property
    def bits(self) -> float:
        stored = sum(t.numel() * t.element_size() for t in self.fields.values())
        return 8 * stored / self.weight_nm.numel()

    @property
    def error(self) -> float:
        """Return the relative squared error of the matrix."""
        weight = self.weight_nm.double()
        return float((self.module.dequantize() - weight).square().sum() / weight.square().sum())


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{n * n} sheep jump over {n} fences." for n in range(300)))
    return str(path)


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Packed]:
    """`pack("rtn", weight_nm, bits=3)`"""
    return lambda method, weight_nm, **options: Packed(
        tmp_path / "fields.safetensors", method, weight_nm, options
    )


@pytest.fixture
def check_contract(pack: Callable[..., Packed]) -> Callable[..., None]:
    """Check the contract of every method; see the assertions."""

    def check(method: str, weight_nm: Tensor, **options: Any) -> None:
        torch.manual_seed(0)
        packed = pack(method, weight_nm, **options)
        again = pack(method, weight_nm, **options)
        for name, (dtype, shape) in packed.layout.items():
            field = packed.fields[name]
            assert (field.dtype, tuple(field.shape)) == (dtype, shape), name
            assert torch.equal(field, again.fields[name]), f"{name} is not deterministic"
            assert torch.equal(field, packed.module.q.get_buffer(name)), f"{name} did not survive"
        assert packed.layout.keys() == packed.fields.keys()

        dense_nm = packed.module.dequantize()
        assert dense_nm.dtype == torch.float32 and dense_nm.shape == weight_nm.shape
        assert torch.isfinite(dense_nm).all()

        n, m = weight_nm.shape
        bias = torch.randn(n)
        packed.module.bias = torch.nn.Parameter(bias, requires_grad=False)
        x_BLm = torch.randn(2, 3, m)
        want = x_BLm @ dense_nm.T + bias
        with torch.inference_mode():
            got = packed.module(x_BLm)
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale)

        x_BLm.requires_grad_()
        up = torch.randn(2, 3, n)
        packed.module(x_BLm).backward(up)
        assert x_BLm.grad is not None
        slope = up @ dense_nm
        torch.testing.assert_close(
            x_BLm.grad, slope, rtol=1e-5, atol=1e-5 * float(slope.abs().max())
        )

        for half, tolerance in ((torch.bfloat16, 2**-6), (torch.float16, 2**-8)):
            packed.module.to(half)
            for name, (dtype, _) in packed.layout.items():
                assert packed.module.q.get_buffer(name).dtype == dtype, f"{name} became {half}"
            with torch.inference_mode():
                rough = packed.module(x_BLm.detach().to(half))
            assert rough.dtype == half
            torch.testing.assert_close(rough.float(), want, rtol=0, atol=tolerance * scale)
        assert torch.equal(packed.module.dequantize(), dense_nm)

    return check


@pytest.fixture
def compress(tmp_path: Path) -> Callable[..., Path]:
    """`compress(source, "rtn", bits=3)`: the artifact; `out` names it; `job`, `run` add more."""

    def make(
        source: Path,
        method: str = "rtn",
        *,
        out: str = "out",
        job: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        reports: list[QuantizeReport] | None = None,
        **options: Any,
    ) -> Path:
        asked = QuantizeJob(
            method=method,
            config=import_method(method, "quantizer").Config(**options),
            **(job or {}),
        )
        report = quantize(open_checkpoint(source), tmp_path / out, asked, **(run or {}))
        if reports is not None:
            reports.append(report)
        return tmp_path / out

    return make


@pytest.fixture
def check_fitted(
    compress: Callable[..., Path], checkpoint: Callable[..., Path], text_file: str
) -> Callable[..., list[tuple[BlockReport, FitReport]]]:
    """Pack a model by a method that fits blocks; its files have the bits of the plan, and run.

    Returns the report and the one fit of each block.
    """

    def check(
        method: str, family: str, *, job: dict[str, Any], **options: Any
    ) -> list[tuple[BlockReport, FitReport]]:
        source, reports = checkpoint(family), list[QuantizeReport]()
        quantizer = import_method(method, "quantizer")()
        plan = make_plan(Architecture(open_checkpoint(source)), quantizer, allow_dense=True)
        job = {"calibration": [text_file], **job, "allow_dense": True}
        out = compress(source, method, job=job, reports=reports, **options)
        layout = read_layout(out)
        assert measure(layout).linears == pytest.approx(plan.bits_linears, rel=1e-12)
        assert layout.num_bytes == plan.file_bytes
        ids = torch.tensor([[5, 9, 12, 7, 7, 3]])
        with torch.inference_mode():
            first, second = (spectool.load(out)(ids).logits for _ in range(2))
        assert torch.equal(first, second) and torch.isfinite(first).all()
        blocks = reports[0].blocks
        assert all(len(block.fits) == 1 for block in blocks)
        return [(block, block.fits[0]) for block in blocks]

    return check
