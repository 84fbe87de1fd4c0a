"""Packed linears that own a product: what they free, share, and compute."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.errors import UnsupportedError
from spectool.kernels import build
from spectool.model import kernels
from spectool.model.exchange import replace_with_packed, unpack_in_place
from spectool.model.kernels import (
    ProductLinear,
    attach_products,
    describe_packed,
    plan_precision,
    precision_of,
)
from spectool.model.packed import ExpertMatrix, PackedExperts, PackedLinear, load_packed
from spectool.quantize.methods.int8 import Int8
from spectool.quantize.methods.rtn import RTN

pytestmark = pytest.mark.skipif(build.missing_products() is not None, reason="no kernel here")

OPTIONS = {"bits": 4, "group_size": 16, "symmetric": False}


def pack(weight_nm: Tensor, **options: Any) -> PackedLinear:
    config = RTN.Config(**{**OPTIONS, **options})
    entry = {"method": "rtn", "options": config.as_dict(), "shape": list(weight_nm.shape)}
    return load_packed(entry, RTN(config).pack(weight_nm, None, torch.Generator()))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(pack(torch.randn(24, 24) / 5) for _ in range(3)))
    model[1].bias = nn.Parameter(torch.randn(24), requires_grad=False)
    return model


@torch.inference_mode()
def test_a_product_takes_the_place_of_the_fields() -> None:
    model, x = make_model(), torch.randn(2, 5, 24)
    matrices = [layer.dequantize() for layer in model]
    heard: list[Any] = []
    model[1].register_forward_hook(lambda *_: heard.append(1))
    layers, expected = list(model), model(x)
    attach_products(model, torch.float32, "exact")
    attach_products(model, torch.float32, "int8")
    assert list(model) == layers, "the same modules, with their hooks and names"
    for layer, matrix_nm in zip(model, matrices, strict=True):
        assert type(layer) is ProductLinear and layer.product.precision == "exact"
        assert not list(layer.buffers()) and not hasattr(layer, "q")
        assert torch.equal(layer.dequantize(), matrix_nm)
        ids = torch.tensor([7, 0, 7])
        assert torch.equal(layer.rows(ids), matrix_nm[ids])
        assert torch.equal(torch.cat(list(layer.pieces())), matrix_nm)
        assert layer.segments() is None and layer.weight.shape == (24, 1)
    torch.testing.assert_close(model(x), expected)
    assert len(heard) == 2
    assert describe_packed(model) == "3 linears packed (by kernel, exact activations)"
    # In other dtypes by the unpacked matrix.
    wide = F.linear(x.double(), matrices[0].double())
    torch.testing.assert_close(model[0](x.double()), wide)


def test_gradients_reach_the_inputs() -> None:
    layer = make_model()[1]
    x = torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    attach_products(layer, torch.float32)
    assert not layer.is_differentiable
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected)


@torch.inference_mode()
def test_rounded_activations_where_the_format_has_integers() -> None:
    model, x = make_model(), torch.randn(3, 24)
    exact = F.linear(x, model[0].dequantize())
    attach_products(model[:1], torch.float32, "int8")
    assert precision_of(model) == "int8"
    rounded = model[0](x)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    attach_products(model, torch.float32, "exact")
    assert precision_of(model) == "exact and int8"
    ways = "1 by kernel, int8 activations, 2 by kernel, exact activations"
    assert describe_packed(model) == f"3 linears packed ({ways})"


def test_auto_rounds_in_bfloat16_what_the_table_says() -> None:
    torch.manual_seed(0)
    for dtype, bits, expected in (
        (torch.bfloat16, 2, "int8"),
        (torch.bfloat16, 4, "int16"),
        (torch.float32, 2, "exact"),
    ):
        layer = pack(torch.randn(24, 24), bits=bits)
        entries = [{"method": "rtn", "options": {"bits": bits}}]
        assert plan_precision(entries, torch.device("cpu"), dtype, "auto") == expected
        attach_products(layer, dtype)
        assert precision_of(layer) == expected


def test_what_has_no_product_stays_as_it_is() -> None:
    half, trained = make_model()[:1], make_model()[:1]
    attach_products(half, torch.float16)
    scale = trained[0].q.scale
    del trained[0].q._buffers["scale"]
    trained[0].q.register_parameter("scale", nn.Parameter(scale.float()))
    attach_products(trained, torch.float32)
    for model in (half, trained):
        assert describe_packed(model) == "1 linears packed (unpacked each time)"
        assert precision_of(model) == "exact"
    unpack_in_place(half, dtype=torch.float16, keep_kernels=True)
    assert type(half[0]) is nn.Linear


def test_where_torch_is_faster_nothing_has_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_products", lambda: "faster here")
    monkeypatch.setattr(kernels, "_missing_library", kernels._missing_library.__wrapped__)
    model = make_model()
    attach_products(model, torch.float32, "int8")
    assert describe_packed(model) == "3 linears packed (unpacked each time)"
    assert kernels.describe_products("cpu", torch.float32) == "torch (faster here)"


def test_a_model_of_products_stays_on_the_processor_and_can_be_cast() -> None:
    model = make_model()
    attach_products(model, torch.float32)
    before = model[0].dequantize()
    model.to(torch.bfloat16).to("cpu")
    assert torch.equal(model[0].dequantize(), before)
    assert model(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16
    copied = copy.deepcopy(model)
    assert copied[0] is not model[0]
    assert torch.equal(copied[0].dequantize(), before)
    with pytest.raises(UnsupportedError, match="laid out for the processor"):
        model.to("meta")
    unpack_in_place(model, dtype=torch.float32, keep_kernels=True)
    assert type(model[0]) is ProductLinear


@pytest.mark.parametrize("transposed", [False, True])
@torch.inference_mode()
def test_experts_multiply_by_their_products(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            shape = (11, 24, 8) if transposed else (11, 8, 24)
            self.up = nn.Parameter(torch.zeros(shape))
            self.config = SimpleNamespace(_experts_implementation="grouped_mm")

    torch.manual_seed(0)
    matrices, model = torch.randn(11, 8, 24), nn.ModuleDict({"mlp": Experts()})
    fields = [Int8().pack(matrix, None, torch.Generator()) for matrix in matrices]
    entry = {"method": "int8", "options": {}, "shape": [8, 24], "expert": True}
    names = [f"mlp.up.{index}" for index in range(11)]
    spec = {name: (field.dtype, tuple(field.shape)) for name, field in fields[0].items()}
    replace_with_packed(
        model, dict.fromkeys(names, entry), dict.fromkeys(names, spec), dtype=torch.float32
    )
    for name, each in zip(names, fields, strict=True):
        model.get_submodule(name).q.load_state_dict(each)
    experts: Any = model["mlp"].up
    unpacked = [experts[index] for index in range(11)]
    attach_products(model, torch.float32, "exact")
    assert isinstance(experts, PackedExperts) and experts.has_kernel()
    x, bias, index = torch.randn(5, 24), torch.randn(8), torch.tensor(10)
    matrix, dense = experts[index], unpacked[10]
    assert isinstance(matrix, ExpertMatrix)
    calls: list[tuple[int, ...]] = []
    original = ProductLinear.forward

    def forward(self: ProductLinear, x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return original(self, x)

    monkeypatch.setattr(ProductLinear, "forward", forward)
    if transposed:
        pairs = [(x @ matrix, x @ dense), (torch.matmul(x, matrix), x @ dense)]
        pairs += [(F.linear(x, matrix.T, bias), F.linear(x, dense.T, bias))]
    else:
        pairs = [(F.linear(x, matrix), F.linear(x, dense))]
        pairs += [
            (F.linear(x, matrix, bias), F.linear(x, dense, bias)),
            (x @ matrix.T, x @ dense.T),
        ]
    assert calls == [(5, 24)] * len(pairs)
    # The other way round, and as a tensor: by the unpacked matrix.
    back = torch.randn(5, 8)
    pairs += [(back @ matrix.T, back @ dense.T)] if transposed else [(back @ matrix, back @ dense)]
    pairs += [(matrix.sum(), dense.sum()), (torch.mul(2, matrix), 2 * dense)]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
    assert len(calls) == 3 and matrix.shape == dense.shape
