"""Experts by `sum_experts` against the modules' own loop, and which experts it is chosen for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from spectool.kernels import registry
from spectool.model.experts import ChosenExperts, RowProducts, choose_experts, release_experts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def make_experts(config: Any) -> list[Any]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    choose_experts(model)
    return [each for each in model.modules() if hasattr(each, "is_transposed")]


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize(
    "config",
    [
        transformers.MixtralConfig(**SIZES, num_local_experts=4),
        transformers.Qwen3MoeConfig(**SIZES, num_experts=16),
        transformers.NemotronHConfig(
            **{**SIZES, "hybrid_override_pattern": "E"}, n_routed_experts=8
        ),
    ],
    ids=lambda config: config.model_type,
)
@torch.inference_mode()
def test_the_sum_is_that_of_the_modules_own_loop(config: Any, num_tokens: int) -> None:
    (experts,) = make_experts(config)
    assert isinstance(experts, ChosenExperts)
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_ND = torch.randn(num_tokens, experts.down_proj.shape[1], generator=generator)
    scores = torch.rand(num_tokens, experts.num_experts, generator=generator)
    weights_NK, chosen_NK = scores.topk(2)
    found_ND = experts(hidden_ND, chosen_NK, weights_NK)
    # A copy is of the experts' own class.
    eager = copy.copy(experts)
    eager.config = copy.copy(experts.config)
    eager.config._experts_implementation = "eager"
    expected_ND = eager(hidden_ND, chosen_NK, weights_NK)
    assert (found_ND - expected_ND).abs().max() <= 1e-6 * expected_ND.abs().max()


def test_transposed_experts_keep_their_function() -> None:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4)
    (experts,) = make_experts(config)
    assert not isinstance(experts, ChosenExperts)


def test_models_of_one_configuration_are_chosen_and_released_apart() -> None:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    # Models that are built by their class share the configuration.
    one, other = (
        transformers.MixtralForCausalLM(config).model.layers[0].mlp.experts for _ in range(2)
    )
    kind, before = type(one), config._experts_implementation
    choose_experts(other)
    assert one.config is other.config and config._experts_implementation == before
    assert type(one) is kind and isinstance(other, ChosenExperts)
    choose_experts(one)
    release_experts(one)
    assert type(one) is kind and isinstance(other, ChosenExperts)
    found = pickle.dumps(other)
    assert b"spectool" not in found and type(pickle.loads(found)) is kind
    choose_experts(one)
    assert type(one) is type(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_of_a_product_has_equal_bits_alone(dtype: torch.dtype) -> None:
    if registry.choose("dense", "cpu", dtype).kernel is None:
        pytest.skip("no kernels here")
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(37, 96, generator=generator).to(dtype)
    weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((50, 96), (50,))
    )
    with RowProducts():
        for given in ((), (bias,)):
            together = torch.nn.functional.linear(x_ND, weight, *given)
            alone = [torch.nn.functional.linear(row[None], weight, *given) for row in x_ND]
            assert torch.equal(torch.cat(alone), together)
    exact = torch.nn.functional.linear(x_ND.double(), weight.double(), bias.double())
    assert (together - exact).abs().max() <= (1e-5 if dtype is torch.float32 else 0.2)
