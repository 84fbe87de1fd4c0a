"""Tiny random models of any architecture that transformers' causal mapping knows.

A configuration is the class's default with every size set down by the name of its attribute; lists
of one entry a layer keep each kind of layer that the default has. What that does not fit stands in
`OVERRIDES`. Weights are drawn so that every tensor matters: matrices at a gain near one, and norms,
biases and other vectors off their initial ones and zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 512, 64, 4, 4, 128

# What sizes are called, by what they become; fewer layers or tokens would leave something out.
_EXACTLY = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    LAYERS: """num_hidden_layers n_layer n_layers num_layers num_blocks depth decoder_layers
        encoder_layers num_decoder_layers num_encoder_layers""",
}
_AT_MOST = {
    CONTEXT: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
        context_length model_max_length""",
    96: """intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner
        feed_forward_size ffn_hidden_size dense_intermediate_size mlp_dim""",
    WIDTH: """hidden_size n_embd d_model embedding_dim emb_dim dim embedding_size out_hidden_size
        word_embed_proj_dim attention_hidden_size input_embedding_size output_embedding_size
        lru_width hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size""",
    48: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size expert_ffn_hidden_size expert_dim
        moe_shared_expert_intermediate_size intermediate_size_mlp""",
    32: "qk_head_dim image_size index_topk",
    16: """head_dim swa_head_dim d_head dim_head kv_channels attention_head_size index_head_dim
        linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim swa_v_head_dim
        qk_nope_head_dim qk_rope_head_dim mamba_d_head mamba_head_dim kv_lora_rank q_lora_rank
        o_lora_rank mamba_dt_rank time_step_rank laurel_rank hidden_size_per_layer_input
        hc_lowrank adapter_rank sliding_window sliding_window_size local_attention window_size
        attention_window_size attention_chunk_size index_n_heads""",
    8: """mamba_d_state state_size ssm_state_size rotary_dim num_centroids patch_size
        mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size""",
    HEADS: """num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts
        n_routed_experts num_local_experts moe_num_experts""",
    2: """num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k n_groups
        linear_num_key_heads""",
    1: "n_group num_expert_group topk_group",
}
SIZES = {
    name: size
    for table in (_EXACTLY, _AT_MOST)
    for size, names in table.items()
    for name in names.split()
}
EXACTLY = set(" ".join(_EXACTLY.values()).split())
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")

# Where sizes depend on each other, or a size is no attribute of the default.
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MIXED = ["linear_attention", "hybrid"] * 2
QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
       "indexer_compress_ratio": 4, "heads_per_ngram": 2, "ngram_vocab_size_base": 100,
       "split_ngram_parts": 2}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in sorted(set(ALTERNATING))
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16, "head_dim": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 6, "layer_types": ALTERNATING + ALTERNATING[:2],
        "num_kv_shared_layers": 2, "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB - 8},
    "inkling2_text": {"unpadded_vocab_size": VOCAB - 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "roc_bert": {
        "pronunciation_vocab_size": 100, "shape_vocab_size": 100,
        # Of one entry, as no text says which: beside the tokens they are a large constant.
        "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": MIXED, "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": MIXED, "attention_hidden_size": 128, "attention_head_dim": 32},
}  # fmt: skip


# Types whose tiny models repeat a token for ever with one matrix for both ends, however small that
# is, and so write nothing to measure heads on: they get two.
REPEATING = {"ctrl", "roc_bert", "xglm"}


def tiny_config(model_type: str, **extra: Any) -> PreTrainedConfig:
    """The shrunken configuration of a model type."""
    own = {"tie_word_embeddings": False} if model_type in REPEATING else {}
    return shrink(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **own, **extra})


def shrink(kind: type[PreTrainedConfig], extra: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of a class, with every size set down; `extra` stands before the table."""
    default = kind()
    said = default.to_dict()
    chosen: dict[str, Any] = {}
    for name in kind.sub_configs:
        own = getattr(default, name, None)
        if isinstance(own, PreTrainedConfig):
            inner = OVERRIDES.get(own.model_type, {})
            chosen[name] = shrink(type(own), {**inner, **extra.get(name, {})})
    for name, value in said.items():
        if isinstance(value, int) and name in SIZES:
            chosen[name] = SIZES[name] if name in EXACTLY else min(value, SIZES[name])
    heads = said.get("num_attention_heads")
    for name in KEY_VALUE_HEADS:
        own = said.get(name, 0)
        if own is None or own == heads:
            chosen[name] = HEADS
        elif own:
            chosen[name] = min(own, HEADS // 2)
    for name in ("head_dim", "num_experts_per_tok"):
        # Some configurations have no usable default.
        if said.get(name, 0) is None:
            chosen[name] = SIZES[name]
    chosen.update(_by_layer(default, said))
    chosen.update(_tokens(said))
    chosen.update({k: v for k, v in extra.items() if k not in kind.sub_configs})
    return kind(**chosen)


def _by_layer(default: PreTrainedConfig, said: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one entry a layer, cut to a few that show every combination of their entries."""
    count = getattr(default, "num_hidden_layers", 0)
    lists = {
        k: v for k, v in said.items() if isinstance(v, list) and len(v) == count and count > LAYERS
    }
    if not lists:
        return {}
    rows = list(zip(*(v for v in lists.values() if v != [*range(count)]), strict=True))
    first = sorted({repr(row): at for at, row in reversed(list(enumerate(rows)))}.values())
    more = (at for at in range(count) if at not in first)
    kept = sorted([*first, *(next(more) for _ in range(LAYERS - len(first)))])
    # A list of indices is no list of kinds.
    return {"num_hidden_layers": len(kept)} | {
        k: [*range(len(kept))] if v == [*range(count)] else [v[at] for at in kept]
        for k, v in lists.items()
    }


def _tokens(said: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens inside the vocabulary."""
    # No end: a random model writes one anywhere.
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    made: dict[str, Any] = {}
    for name, value in said.items():
        if name in usual:
            # Whoever has no padding may not take some rightly.
            made[name] = None if value is None else usual[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            made[name] = VOCAB - 1 - len(made)
    return made


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 in which no tensor is without effect."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in _weights(model):
            disturb(tensor, generator)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and config.model_type not in REPEATING:
                # Else a model with one matrix for both ends repeats its last token for ever.
                module.weight.mul_(0.2)
    return model.eval()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    # Corrections of routers and the like; what a module computes for itself is not stored.
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and not buffer.any():
            yield buffer


def disturb(tensor: Tensor, generator: torch.Generator) -> None:
    """Scale a random matrix to a gain near one; move anything else a little."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    noise = torch.randn(tensor.shape, generator=generator)
    spread = tensor.std().item() if tensor.numel() > 1 else 0.0
    if tensor.ndim > 1 and spread > 0 and abs(tensor.mean().item()) < spread:
        tensor.copy_(noise * 1.2 / math.sqrt(tensor.shape[-1]))
    else:
        tensor.add_(0.1 * noise)
