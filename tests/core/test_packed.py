"""Fields keep their dtypes; packed modules replace dense ones and are replaced by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectool.errors import CheckpointError, UsageError
from spectool.model.exchange import field_specs, replace_with_packed, unpack_in_place
from spectool.model.packed import (
    Fields,
    PackedExperts,
    PackedLinear,
    build_packed,
    packed_modules,
    relative_error,
)

SPEC = {"codes": (torch.uint8, (3, 4)), "scale": (torch.float16, (3,))}


class Plain(PackedLinear):
    """Codes times scales, the simplest format."""

    def dequantize(self) -> Tensor:
        return self.q.codes.float() * self.q.scale.float()[:, None]


def filled(shift: int = 0) -> Plain:
    module = Plain(SPEC, (3, 4))
    module.q.codes = torch.arange(12, dtype=torch.uint8).view(3, 4) + shift
    module.q.scale = torch.tensor([0.5, 1.0, 2.0]).half()
    return module


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()],
)
def test_casting_a_model_leaves_its_codes_and_scales(cast: Callable[[Any], Any]) -> None:
    model = nn.Sequential(filled(), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in model[0].q.state_dict().items()}
    cast(model)
    for name, tensor in model[0].q.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_moving_to_another_device_moves_the_fields() -> None:
    fields = Fields(SPEC).to("meta")
    assert all(tensor.is_meta for tensor in fields.buffers())
    assert {n: t.dtype for n, t in fields.named_buffers()} == {n: d for n, (d, _) in SPEC.items()}
    fields = Fields(SPEC).to("meta", torch.bfloat16)
    assert fields.scale.is_meta and fields.scale.dtype == torch.float16


def test_forward_is_the_product_with_the_unpacked_matrix() -> None:
    module = filled()
    module.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(module(x), x @ module.dequantize().T + module.bias)
    assert "in_features=4, out_features=3" in repr(module)


def test_stand_in_weight_has_a_device_and_no_values() -> None:
    module = filled()
    assert module.weight.device.type == "cpu" and module.weight.shape == (3, 1)
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.randn(1, 4), module.weight)
    assert (torch.ones(3, 4) * module.weight).isnan().all()
    # As Blt initialises its layers.
    assert module.weight.shape[1] ** -0.5 == 1
    assert "weight" not in module.state_dict()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_unpacked_one_by_one(transposed: bool) -> None:
    experts = PackedExperts(
        {1: filled(20), 0: filled()}, transposed=transposed, dtype=torch.bfloat16
    )
    for index in (0, 1, torch.tensor(1)):
        want = filled(20 if index else 0).dequantize().bfloat16()
        assert torch.equal(experts[index], want.T if transposed else want)
    assert experts.to(torch.float32)[0].dtype == torch.float32
    assert sorted(experts.state_dict()) == ["0.q.codes", "0.q.scale", "1.q.codes", "1.q.scale"]


RTN = {"method": "rtn", "options": {"bits": 4, "group_size": 0}, "shape": [3, 8]}
RTN_SPEC = {
    "codes": (torch.uint8, (3, 4)), "scale": (torch.float16, (3, 1)), "zero": (torch.uint8, (3, 1)),
}  # fmt: skip


def test_build_checks_the_fields_against_the_shape() -> None:
    assert build_packed(RTN, RTN_SPEC).dequantize().shape == (3, 8)
    for field, header in (
        ("scale", (torch.float32, (3, 1))),
        ("scale", (torch.float16, (3, 2))),
        ("zero", None),
        ("extra", (torch.uint8, (1,))),
    ):
        spec = {**RTN_SPEC, field: header}
        with pytest.raises(CheckpointError, match=f"field {field} of a packed 3 x 8 matrix is"):
            build_packed(RTN, {name: header for name, header in spec.items() if header is not None})


def test_build_refuses_unknown_methods_and_options() -> None:
    with pytest.raises(UsageError, match="no quantizer is called 'gone'"):
        build_packed({**RTN, "method": "gone"}, RTN_SPEC)
    with pytest.raises(UsageError, match="unknown option"):
        build_packed({**RTN, "options": {"bots": 3}}, RTN_SPEC)


def test_swapping_in_and_back() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Sequential(nn.Linear(3, 2)))
    bias = model[0].bias
    replace_with_packed(model, {"0": RTN}, {"0": RTN_SPEC}, dtype=torch.float32)
    assert list(packed_modules(model)) == ["0"] and model[0].bias is bias
    for tensor in model[0].q.buffers():
        tensor.copy_(torch.randint(0, 9, tensor.shape))
    x = torch.randn(2, 8)
    want = model(x)
    unpack_in_place(model, dtype=torch.float32)
    assert not packed_modules(model) and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want)


def test_swapping_in_below_a_prefix() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 3)})
    replace_with_packed(
        model, {"h.0.fc": RTN}, {"h.0.fc": RTN_SPEC}, dtype=torch.float32, prefix="h.0"
    )
    assert list(packed_modules(model)) == ["fc"]


@pytest.mark.parametrize("name", ["1.x", "0.weight.y", "nothing", "deep.er"])
def test_names_that_the_model_does_not_have(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(CheckpointError, match="the architecture has no such module"):
        replace_with_packed(model, {name: RTN}, {name: RTN_SPEC}, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="holds no codes"):
        replace_with_packed(model, {"0": RTN}, {}, dtype=torch.float32)


def test_fused_experts_in_and_out() -> None:
    class Experts(nn.Module):
        is_transposed = False

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(12, 3, 8))
            self.config = SimpleNamespace(_experts_implementation="grouped_mm")

    model = nn.ModuleDict({"mlp": Experts()})
    modules = {f"mlp.up.{index}": {**RTN, "expert": True} for index in sorted(range(12), key=str)}
    replace_with_packed(model, modules, dict.fromkeys(modules, RTN_SPEC), dtype=torch.float32)
    experts = model["mlp"].up
    assert isinstance(experts, PackedExperts)
    assert model["mlp"].config._experts_implementation == "eager"
    for index in range(12):
        part = experts.get_submodule(str(index))
        for tensor in part.q.buffers():
            tensor.fill_(0)
        part.q.scale.fill_(1)
        part.q.codes.fill_(index)
    unpack_in_place(model, dtype=torch.float32)
    for index in range(12):
        # Every byte holds two 4-bit codes; the low one is `index`, the high one 0.
        assert model["mlp"].up[index].unique().tolist() == sorted({0.0, float(index)})


def test_fields_are_grouped_by_the_module_they_belong_to() -> None:
    header = (torch.uint8, (1,))
    found = field_specs({"a.b.q.codes": header, "a.b.q.scale": header, "a.weight": header})
    assert found == {"a.b": {"codes": header, "scale": header}}


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_error_at_any_size_of_weights(
    size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectool.model.packed.PIECE", 8)
    module = filled()
    module.q.scale = torch.zeros(3).half()
    weight_nm = (torch.ones(3, 4) * size).to(dtype)
    before = weight_nm.clone()
    assert relative_error(weight_nm, module) == pytest.approx(1.0)
    module = filled()
    assert relative_error(module.dequantize().to(dtype), module) == 0.0
    half_nm = module.dequantize().to(dtype) * 2
    assert relative_error(half_nm, module) == pytest.approx(0.25)
    assert torch.equal(weight_nm, before)


def test_error_of_a_matrix_of_zeros() -> None:
    module = filled()
    assert relative_error(torch.zeros(3, 4), module) == math.inf
    module.q.scale = torch.zeros(3).half()
    assert relative_error(torch.zeros(3, 4), module) == 0.0


def test_error_between_matrices_of_other_shapes() -> None:
    with pytest.raises(CheckpointError, match="packed 3 x 4 matrix stands for one of 4 x 3"):
        relative_error(torch.zeros(4, 3), filled())
