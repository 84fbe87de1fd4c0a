"""Models that are not causal are recognized by what they were built as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectool.model import causal
from spectool.model.causal import why_not_causal

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def small(name: str, **options: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Bert", SIZES, "is_decoder false"),
        ("Bert", {**SIZES, "is_decoder": True}, None),
        ("RemBert", {**SIZES, "input_embedding_size": 8, "output_embedding_size": 8}, "is_decoder"),
        # Whose configuration says is_decoder false as well.
        ("GPTNeoX", {**SIZES, "intermediate_size": 16}, None),
        ("GPTNeoXJapanese", SIZES, None),
        ("Llama", {**SIZES, "intermediate_size": 16}, None),
        ("Llama", {**SIZES, "intermediate_size": 16, "is_causal": False}, "is_causal false"),
        (
            "Gemma3Text",
            {
                **SIZES,
                "num_key_value_heads": 2,
                "intermediate_size": 16,
                "head_dim": 8,
                "use_bidirectional_attention": True,
            },
            "use_bidirectional_attention",
        ),
        ("XLM", {"vocab_size": 64, "emb_dim": 16, "n_layers": 1, "n_heads": 2}, "causal false"),
        (
            "XLM",
            {"vocab_size": 64, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "causal": True},
            None,
        ),
        ("XLNet", {"vocab_size": 64, "d_model": 16, "n_layer": 1, "n_head": 2}, "any order"),
    ],
)
def test_the_reason_is_there_where_logits_look_ahead(
    name: str, options: dict[str, Any], reason: str | None
) -> None:
    model: Any = small(name, **options)
    found = why_not_causal(model.config, model.modules())
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    # And truly so.
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits[:, :3]
    assert torch.allclose(first, second, atol=1e-5) == (reason is None)


def test_what_an_older_transformers_makes_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("Doge", **SIZES, intermediate_size=16)
    for version, reason in (((5, 23), None), ((5, 17), "gives it no causal mask")):
        monkeypatch.setattr(causal, "VERSION", version)
        found = why_not_causal(model.config, model.modules())
        assert (found is None) == (reason is None) and (reason or "") in (found or "")
