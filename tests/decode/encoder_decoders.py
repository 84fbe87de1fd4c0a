"""Tiny random encoder-decoders whose texts vary, and slow references for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

T5_SIZES: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    # transformers' own generate takes no more layers than the encoder has (5.23).
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
KINDS = ["t5", "t5-gated", "t5-unscaled-untied", "mt5", "bart", "bart-forced"]


@functools.cache
def make(kind: str, vocab: int = 60, seed: int = 0, end: bool = False) -> PreTrainedModel:
    """Make a model in float32; without `end` its texts have no end."""
    torch.manual_seed(seed)
    sizes = {**(BART_SIZES if kind.startswith("bart") else T5_SIZES), "vocab_size": vocab}
    model: PreTrainedModel
    if kind.startswith("bart"):
        forced = 0 if kind == "bart-forced" else None
        config = BartConfig(**sizes, forced_bos_token_id=forced, forced_eos_token_id=None)
        model = BartForConditionalGeneration(config)
    elif kind == "mt5":
        model = MT5ForConditionalGeneration(MT5Config(**sizes, feed_forward_proj="gated-gelu"))
    else:
        ways: dict[str, dict[str, Any]] = {
            "t5": {},
            "t5-gated": {"feed_forward_proj": "gated-gelu"},
            "t5-unscaled-untied": {"tie_word_embeddings": False},
        }
        model = T5ForConditionalGeneration(T5Config(**{**sizes, **ways[kind]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Else nothing but the last token matters, and each text is a loop of two.
            if "relative_attention_bias" in name or "embed_positions" in name:
                parameter.normal_(0, 2)
            elif "shared" in name or "embed_tokens" in name:
                parameter.normal_(0, 1.0 if "bart" in kind else 0.3)
            elif parameter.ndim == 2:
                # What a decoder reads of its source is much the same at every step.
                parameter.normal_(0, 0.1 if "encoder_attn" in name else 0.4)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
        if "untied" in kind:
            head = torch.nn.Parameter(0.3 * torch.randn(vocab, sizes["d_model"]))
            model.get_output_embeddings().weight = head
    if not end:
        model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def last_logits(model: PreTrainedModel, source: Sequence[int], output: Sequence[int]) -> Any:
    """Return the logits after the decoder's tokens: no cache, no mask, no positions given."""
    done = model(
        input_ids=torch.tensor([source]),
        decoder_input_ids=torch.tensor([output]),
        use_cache=False,
    )
    return done.logits[0, -1]


def generated(model: PreTrainedModel, source: Sequence[int], count: int) -> list[int]:
    """Return the tokens of transformers' own greedy generate after those it starts from."""
    ids = torch.tensor([source])
    forced = model.generation_config.forced_bos_token_id is not None
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count + forced,
        do_sample=False,
        num_beams=1,
    )
    new: list[int] = output[0, 1 + forced :].tolist()
    return new
