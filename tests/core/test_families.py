"""Facts about families hold in the transformers that is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectool.decode.heads.layer import read_final_scale
from spectool.families import FAMILIES, families
from spectool.model.shell import final_logits

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "head_dim": 8,
    "pad_token_id": 0,
}


def small(name: str, **options: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(**SIZES, **options))
    return model.eval()


def test_each_fact_says_where_it_was_seen() -> None:
    assert all(fact.seen in ("5.17", "5.23", "5.24") for fact in FAMILIES.values())
    assert families(state="ignored", state_in_modules=True) == {"recurrent_gemma"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("HyperCLOVAX", {"logits_scaling": 4.0}),
        ("Gemma2", {"final_logit_softcapping": 0.1}),
        ("FalconH1", {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2}),
    ],
)
@torch.no_grad()
def test_products_of_the_lm_head_become_the_models_logits(
    name: str, options: dict[str, Any]
) -> None:
    model: Any = small(name, **options)
    ids_1L = torch.tensor([[5, 6, 7]])
    products: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, given, out: products.append(out))
    logits = model(input_ids=ids_1L, use_cache=False).logits
    assert torch.allclose(final_logits(model.config)(products[0]), logits, atol=1e-6)
    assert torch.equal(products[0], logits) == (name == "Llama")


@pytest.mark.parametrize(("name", "added"), [("Llama", 0), ("Gemma2", 1), ("Qwen3Next", 1)])
def test_the_final_norms_scale_is_what_it_multiplies_by(name: str, added: int) -> None:
    model: Any = small(name)
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    scale_D = read_final_scale(model)
    assert scale_D is not None and torch.equal(scale_D, norm.weight + added)
