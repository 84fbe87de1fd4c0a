"""Linears of a model get their kernels once, and use them only where kernels are in force."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectool.kernels import registry
from spectool.model.kernels import KernelLinear, attach_kernels

needs_kernel = pytest.mark.skipif(
    registry.choose("dense", "cpu", torch.float32).kernel is None, reason="no kernel here"
)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, 128), nn.Linear(128, 256, bias=False), nn.Linear(8, 8), nn.LayerNorm(8)
    )


@needs_kernel
@torch.inference_mode()
def test_large_linears_use_their_kernel_within_the_context_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    big, x = model[0], torch.randn(2, 3, 256)
    plain = big(x)
    for _ in range(2):
        assert str(attach_kernels(model, torch.float32)["dense"]) == "kernel"
    assert [type(layer) for layer in model[:3]] == [KernelLinear, KernelLinear, nn.Linear]
    kernel = registry.choose("dense", "cpu", torch.float32).kernel
    assert kernel is not None
    expected = kernel.linear(x, (big.weight, None), big.bias)
    assert torch.equal(big(x), plain)
    with registry.use_kernels():
        assert torch.equal(big(x), expected) and not torch.equal(plain, expected)
        # More rows than pay are torch's.
        monkeypatch.setattr(kernel, "most_rows", 64)
        attach_kernels(model, torch.float32)
        many = torch.randn(65, 256)
        assert torch.equal(big(many), nn.functional.linear(many, big.weight, big.bias))
        assert torch.equal(big(many[:64]), kernel.linear(many[:64], (big.weight, None), big.bias))
    assert torch.equal(big(x), plain)


@needs_kernel
@torch.inference_mode()
def test_a_model_with_kernels_can_be_copied_cast_and_changed() -> None:
    model = make_model()[:1]
    attach_kernels(model, torch.float32)
    x = torch.randn(3, 256)
    copied = copy.deepcopy(model)
    copied[0].weight.mul_(2)
    copied[0].bias.zero_()
    model[0].bias.zero_()
    with registry.use_kernels():
        assert torch.equal(copied(x), 2 * model(x))
        half = copied.to(torch.float64)
        assert torch.equal(half(x.double()), nn.functional.linear(x.double(), half[0].weight))
    attach_kernels(half, torch.float64)
    assert half[0].product is None


@needs_kernel
@torch.inference_mode()
def test_weights_that_are_replaced_later_are_the_ones_used() -> None:
    model, x = make_model()[:1], torch.randn(3, 256)
    attach_kernels(model, torch.float32)
    model.load_state_dict(
        {"0.weight": torch.zeros(128, 256), "0.bias": torch.ones(128)}, assign=True
    )
    with registry.use_kernels():
        assert torch.equal(model(x), torch.ones(3, 128))
        # Neither of these may be read as rows of float32, one after another.
        model[0].weight.data = torch.randn(256, 128).T
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        model.bfloat16()
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)


@needs_kernel
def test_matrices_of_other_devices_and_dtypes_are_left_alone() -> None:
    strided = nn.Linear(256, 256)
    strided.weight.data = strided.weight.data.T
    for layer, reason in (
        (nn.Linear(512, 512, device="meta"), "no kernel for dense in float32 on meta"),
        (nn.Linear(512, 512).half(), "no kernel for dense in float16 on cpu"),
        (nn.Linear(8, 8), "matrices of fewer than 32768 weights"),
        (strided, "its tensors are not contiguous"),
    ):
        assert str(attach_kernels(layer, torch.float32)["dense"]) == f"torch ({reason})"
        assert type(layer) is nn.Linear
