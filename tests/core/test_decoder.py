"""The decoder is the part that computes hidden states, whatever the parts are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from spectool.model.decoder import find_decoder

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("Llama", {**SIZES, "num_attention_heads": 2}, "LlamaModel"),
        # transformers takes its lm_head, `decoder`, for it.
        ("ModernBertDecoder", {**SIZES, "num_attention_heads": 2}, "ModernBertDecoderModel"),
        # Here its whole text model, with the lm_head.
        (
            "MllamaText",
            {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2},
            "MllamaTextModel",
        ),
        # The embedding lies inside of the inner decoder.
        (
            "OPT",
            {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "OPTDecoder",
        ),
    ],
)
def test_the_decoder_holds_the_embedding(name: str, options: dict[str, Any], kind: str) -> None:
    config = getattr(transformers, f"{name}Config")(**options, pad_token_id=0)
    kind_of_model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    with torch.device("meta"):
        model = kind_of_model(config)
    assert type(find_decoder(model)).__name__ == kind
