"""Tiny random models and a tokenizer, made here so that no test needs a network."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything that reads it: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectool.model.experts import release_experts

VOCAB = 320
_TEXT = Path(__file__).parent.parent / "core/data/calibration/mixed.txt"
SHARED = Path(__file__).parent.parent.parent / "shared"

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 16}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 16}),
    "gemma3": (
        "Gemma3",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 16,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", GROUPED),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "opt": (
        "OPT",
        {
            **{k: v for k, v in COMMON.items() if k != "intermediate_size"},
            "ffn_dim": 56,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt_neox": ("GPTNeoX", COMMON),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, "head_dim": 8, **_EXPERTS}),
}
DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe")]
ATTENDING = [name for name in FAMILIES if name not in ("llama-tied", "qwen3_moe")]

# With a recurrent state.
_BARE = {
    name: COMMON[name]
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id")
}
_MIXED = {**GROUPED, "layer_types": ["linear_attention", "full_attention"]}
_DELTA = {
    **_MIXED,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_CONV = {**GROUPED, "layer_types": ["conv", "full_attention"]}
_SHARED_EXPERTS = {**_EXPERTS, "shared_expert_intermediate_size": 24}
_SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_LATENT = {
    **_MIXED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        {**_BARE, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "bamba": ("Bamba", {**GROUPED, **_SCAN, "attn_layer_indices": [1], "mamba_chunk_size": 8}),
    "falcon_h1": (
        "FalconH1",
        {**GROUPED, **_SCAN, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "head_dim": 8},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **_MIXED,
            **_SCAN,
            "mamba_chunk_size": 8,
            "shared_intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": ("Qwen3Next", {**_DELTA, **_SHARED_EXPERTS}),
    "qwen3_5_text": ("Qwen3_5Text", _DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**_DELTA, **_SHARED_EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", _DELTA),
    "kimi_linear": ("KimiLinear", {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 4}),
    "bailing_hybrid": (
        "BailingHybrid",
        {**_LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    "lfm2": ("Lfm2", {**_CONV, "block_multiple_of": 8}),
    "lfm2_moe": ("Lfm2Moe", {**_CONV, **_EXPERTS, "num_dense_layers": 1}),
    "lfm3": (
        "Lfm3",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "sliding_attention"],
            "sliding_window": 16,
        },
    ),
    "zaya": (
        "Zaya",
        {
            **GROUPED,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "router_hidden_size": 16,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "head_dim": 8,
        },
    ),
    "mamba": ("Mamba", {**_BARE, "state_size": 8}),
    "falcon_mamba": ("FalconMamba", {**_BARE, "state_size": 8}),
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "zamba": (
        "Zamba",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    """A GPU is for `make gpu`: elsewhere everything is computed where it is compared."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[None]:
    """Keep what runs leave for later ones out of the user's folders.

    Compiled kernels stay in the tree for later sessions: their names have a hash of the sources.
    """
    cache, kernels = tmp_path_factory.mktemp("cache"), pytestconfig.rootpath / "build/test-kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "spectool").mkdir()
    (cache / "spectool/kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads gain nothing on tiny tensors, and lose much on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder and below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path) -> None:
    """Change one bit of a file, near its end."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens, trained on the bundled text; <s> is 0 and </s> is 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family, float32, in eval mode. Large weights make its text vary.

    `llama-deep` and the like have more layers.
    """
    family, deep, _ = family.partition("-deep")
    prefix, options = (FAMILIES | RECURRENT)[family]
    if deep:
        layers = "n_layer" if prefix == "GPT2" else "num_hidden_layers"
        options = {**options, layers: 5}
        if "layer_types" in options:
            options["layer_types"] = ["sliding_attention"] * 4 + ["full_attention"]
    suffix = "TextConfig" if prefix == "Gemma3" else "Config"
    options = {"initializer_range": 0.2, "tie_word_embeddings": False, **options, **overrides}
    config = getattr(transformers, prefix + suffix)(**options)
    without_sdpa = ("Gemma2", "Mamba", "Mamba2", "FalconMamba")
    config._attn_implementation = "eager" if prefix in without_sdpa else "sdpa"
    torch.manual_seed(seed)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


@functools.cache
def _shared_model(family: str, seed: int) -> PreTrainedModel:
    return make_model(family, seed=seed)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny("qwen3")`: a random model shared between tests; do not change its weights."""

    def give(family: str, seed: int = 0) -> PreTrainedModel:
        model = _shared_model(family, seed)
        # A target that an earlier test opened lets experts compute in another way.
        release_experts(model)
        return model

    return give


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("qwen3", dtype=…)`: a directory with that model and the tokenizer, read-only."""

    @functools.cache
    def make(
        family: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "50GB",
        **overrides: Any,
    ) -> Path:
        path = tmp_path_factory.mktemp(family)
        model = make_model(family, seed=seed, **overrides).to(dtype)
        model.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts; the test is skipped where it is absent."""
    if not SHARED.exists():
        pytest.skip("no shared models and data here")
    return SHARED


# Tests of which a sister runs in `make test`: together they would take it past three minutes.
ALSO_SLOW = (
    "cli/test_bad_input.py::test_a_stopped_run_exits_130_and_goes_on_later[15]",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[distill logits",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize gptq",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize hqq",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize jlcm",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize nf4",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize olive",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[quantize scala",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[train-heads ch",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[train-heads cl",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[train-heads ea",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[train-heads hy",
    "cli/test_commands.py::test_every_option_stands_in_one_panel[train-heads pp",
    "cli/test_commands.py::test_quantize_and_inspect_say_what_the_files_hold[nf4]",
    "cli/test_run.py::test_variants_share_the_stages_that_are_equal",
    "cli/test_tune.py::test_what_is_found_is_what_drafts[eagle3-3]",
    "core/test_architecture.py::test_experts_are_slices_of_fused_tensors[mixtral]",
    "core/test_architecture.py::test_multimodal_wrappers_keep_their_towers[False-gemma3]",
    "core/test_architecture.py::test_multimodal_wrappers_keep_their_towers[True-llava]",
    "core/test_matrices.py::test_routers_stay_dense[jamba]",
    "core/test_matrices.py::test_routers_stay_dense[mixtral]",
    "core/test_shell.py::test_blocks_one_by_one_are_the_model[dtype0-falcon_h1]",
    "core/test_shell.py::test_blocks_one_by_one_are_the_model[dtype0-jamba]",
    "core/test_shell.py::test_blocks_one_by_one_are_the_model[dtype0-mamba]",
    "core/test_shell.py::test_blocks_one_by_one_are_the_model[dtype1-falcon_h1]",
    "core/test_shell.py::test_model_that_cannot_be_walked_is_refused_before_work_begins[big_bird]",
    "core/test_shell.py::test_model_that_cannot_be_walked_is_refused_before_work_begins[gemma3n]",
    "decode/drafters/test_eagle3.py::test_trees_are_those_of_a_search[options0]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[chain-gemma3]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[chain-llama]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[iid-llama]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[jacobi-llama]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[ngram-gemma3]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[rsd-c-llama]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[rsd-s-llama]",
    "decode/drafters/test_lossless.py::test_greedy_text_is_plain_text[skip-gemma3]",
    "decode/drafters/test_ppd.py::test_training_lowers_the_loss[1]",
    "decode/kv/test_int8.py::test_drafted_text_is_plain_text_of_the_same_store[chain-sampling8]",
    "decode/kv/test_int8.py::test_drafted_text_is_plain_text_of_the_same_store[jacobi-sampling1]",
    "decode/kv/test_int8.py::test_drafted_text_is_plain_text_of_the_same_store[medusa-sampling6]",
    "decode/kv/test_int8.py::test_low_precision_stays_near_greedy[rsd-s]",
    "decode/kv/test_int8.py::test_low_precision_stays_near_greedy[skip]",
    "decode/target/test_encoder_decoder.py::test_the_distribution_is_the_models[copy]",
    "decode/target/test_recurrent.py::test_a_kept_cache_goes_on_or_starts_over[zamba]",
    "decode/target/test_recurrent.py::test_every_drafter_in_a_batch[mamba2-recycle]",
    "decode/target/test_recurrent.py::test_every_drafter_in_a_batch[mamba2-trigram]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[bailing_hybrid]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[bamba]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[granitemoehybrid]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[lfm2_moe]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[olmo_hybrid]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[qwen3_5_moe_text]",
    "decode/target/test_recurrent.py::test_text_is_that_of_generate[qwen3_5_text]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[ngram:depth=3+trigram-gpt2]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[ngram:depth=3+trigram-qwen3]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[none-gpt2]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[none-qwen3]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[trigram-gpt2]",
    "decode/test_adapter.py::test_greedy_text_is_transformers_own[trigram-qwen3]",
    "decode/test_batching.py::test_a_request_without_a_token_left_ends_alone[chain-0.0]",
    "decode/test_batching.py::test_a_request_without_a_token_left_ends_alone[hydra-0.8]",
    "decode/test_batching.py::test_a_request_without_a_token_left_ends_alone[jacobi:window=6-0.8]",
    "decode/test_batching.py::test_a_request_without_a_token_left_ends_alone[ngram-0.0]",
    "decode/test_batching.py::test_a_request_without_a_token_left_ends_alone[rsd-s-0.0]",
    "decode/test_batching.py::test_cancel_frees_a_row[1-eagle3]",
    "decode/test_batching.py::test_cancel_frees_a_row[1-ngram]",
    "decode/test_batching.py::test_requests_have_the_tokens_that_they_have_alone[ngram]",
    "decode/test_batching.py::test_requests_have_the_tokens_that_they_have_alone[recycle]",
    "decode/test_distribution.py::test_planted_faults_are_found[chain verifier on looked-up nodes]",
    "decode/test_distribution.py::test_the_distribution_is_that_of_a_packed_target[chain-int8-1000]",
    "decode/test_distribution.py::test_the_distribution_is_the_targets[chain]",
    "decode/test_distribution.py::test_the_distribution_is_the_targets[exits]",
    "decode/test_distribution.py::test_the_distribution_is_the_targets[jacobi]",
    "decode/test_distribution.py::test_the_distribution_is_the_targets[rsd-s]",
    "decode/test_engine.py::test_greedy_equals_transformers_for_every_drafter[phi3]",
    "decode/test_engine.py::test_greedy_equals_transformers_for_every_drafter[qwen2]",
    "decode/test_engine.py::test_greedy_equals_transformers_for_every_drafter[qwen3]",
    "decode/test_kernels.py::test_drafting_from_codes_is_plain_decoding[recycle]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[False-0.02-0.0]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[False-0.02-0.3]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[False-0.3-0.02]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[False-0.3-0.3]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[False-0.3-4.0]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[True-0.02-0.0]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[True-0.02-4.0]",
    "decode/test_tuned.py::test_drafting_that_never_pays_costs_little[True-0.3-0.02]",
    "decode/test_tuned.py::test_greedy_text_does_not_depend_on_time[jacobi-1]",
    "decode/test_tuned.py::test_greedy_text_does_not_depend_on_time[ngram+recycle-1]",
    "distill/test_every_method.py::test_a_model_with_a_packed_embedding_and_head_is_taught[eagle3",
    "distill/test_every_method.py::test_a_model_with_a_packed_embedding_and_head_is_taught[medusa",
    "distill/test_every_method.py::test_a_model_with_a_packed_embedding_and_head_is_taught[ppd",
    "distill/test_every_method.py::test_a_stopped_run_goes_on_to_the_same_bytes[eagle3]",
    "distill/test_every_method.py::test_a_stopped_run_goes_on_to_the_same_bytes[medusa]",
    "distill/test_every_method.py::test_a_stopped_run_goes_on_to_the_same_bytes[ppd]",
    "distill/test_every_method.py::test_what_is_written_drafts_and_changes_nothing[eagle3-gpt2]",
    "distill/test_every_method.py::test_what_is_written_drafts_and_changes_nothing[hydra-plain-llama]",
    "distill/test_every_method.py::test_what_is_written_drafts_and_changes_nothing[medusa-gpt2]",
    "distill/test_every_method.py::test_what_is_written_drafts_and_changes_nothing[ppd-gpt2]",
    "distill/test_every_method.py::test_where_the_output_matrix_is_learnt[chimera]",
    "distill/test_every_method.py::test_where_the_output_matrix_is_learnt[hydra]",
    "distill/test_exchange.py::test_eagle3_comes_back[gemma3-speculators",
    "distill/test_exchange.py::test_eagle3_comes_back[gpt2-eagle3",
    "distill/test_exchange.py::test_eagle3_comes_back[llama-eagle3",
    "distill/test_exchange.py::test_medusa_as_its_server_computes_it[options1]",
    "distill/test_exchange.py::test_medusa_as_its_server_computes_it[options2]",
    "distill/test_features.py::test_a_store_that_was_interrupted_goes_on[0]",
    "distill/test_features.py::test_a_store_that_was_interrupted_goes_on[3]",
    "distill/test_features.py::test_all_kinds_of_features_make_the_same_heads[chimera-gpt2]",
    "distill/test_features.py::test_all_kinds_of_features_make_the_same_heads[clover-llama]",
    "distill/test_features.py::test_all_kinds_of_features_make_the_same_heads[eagle3-qwen3]",
    "distill/test_features.py::test_all_kinds_of_features_make_the_same_heads[hydra-gemma3]",
    "distill/test_features.py::test_all_kinds_of_features_make_the_same_heads[medusa-llama]",
    "distill/test_packed_fields.py::test_fields_learn_and_codes_stay[scalar:bits=2-gpt2]",
    "distill/test_processes.py::test_what_two_processes_tell_each_other",
    "distill/test_sorted.py::test_plain_transformers_loads_the_first_layers[gemma3-deep-options0]",
    "distill/test_train_heads.py::test_a_stopped_run_goes_on_to_the_same_bytes[4]",
    "distill/test_train_heads.py::test_a_stopped_run_goes_on_to_the_same_bytes[7]",
    "distill/test_train_heads.py::test_heads_computed_in_bfloat16_learn_as_in_float32[hydra]",
    "distill/test_train_weights.py::test_a_stopped_run_goes_on_to_the_same_bytes[lexical-units]",
    "distill/test_train_weights.py::test_a_stopped_run_goes_on_to_the_same_bytes[logits]",
    "distill/test_train_weights.py::test_a_stopped_run_goes_on_to_the_same_bytes[sorted]",
    "evaluate/test_certificate.py::test_rows_of_packed_models_are_equal_bits[dtype0]",
    "evaluate/test_log_probs.py::test_block_by_block_equals_resident[False-gpt2]",
    "evaluate/test_log_probs.py::test_block_by_block_equals_resident[False-llama-tied]",
    "evaluate/test_log_probs.py::test_block_by_block_equals_resident[True-qwen3_moe]",
    "quantize/test_budget.py::test_other_families[gpt2]",
    "quantize/test_budget.py::test_other_families[qwen3_moe]",
    "quantize/test_budget.py::test_several_methods_and_killed_while_measuring",
    "quantize/test_calibration.py::test_a_method_is_shown_both_streams_and_their_statistics[llama]",
    "quantize/test_export.py::test_compressed_tensors_by_its_own_code[qwen3",
    "quantize/test_export.py::test_dense_again[olive-options1-llama-tied]",
    "quantize/test_export.py::test_dense_again[olive-options1-qwen3_moe]",
    "quantize/test_export.py::test_what_it_cannot_hold[llama-olive",
    "quantize/test_gptq.py::test_a_checkpoint_has_the_planned_bits[llama]",
    "quantize/test_jlcm.py::test_a_checkpoint_has_the_planned_bits_and_the_fit_gains[qwen3_moe]",
    "quantize/test_pack.py::test_buffers_in_files_give_the_same_bytes[gpt2]",
    "quantize/test_pack.py::test_buffers_in_files_give_the_same_bytes[llama]",
    "quantize/test_pack.py::test_killed_at_random_moments_it_ends_with_the_same_bytes[data-free]",
    "quantize/test_pack.py::test_killed_at_random_moments_it_ends_with_the_same_bytes[fitted]",
    "quantize/test_preprocess.py::test_a_run_that_was_killed_ends_with_the_same_bytes",
    "quantize/test_preprocess.py::test_the_reshaped_model_is_packed_as_the_original[gpt2]",
    "quantize/test_preprocess.py::test_the_reshaped_model_is_packed_as_the_original[qwen3_moe]",
    "quantize/test_ptq161.py::test_a_checkpoint_has_the_planned_bits_and_every_block_gains[gpt2]",
    "quantize/test_ptq161.py::test_a_checkpoint_has_the_planned_bits_and_every_block_gains[llama]",
    "quantize/test_rules.py::test_blocks_are_calibrated_behind_the_packed_embedding[gemma3]",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[gemma2-rtn",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[gemma3-int8",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[gpt_neox-rtn",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[llama-tied-rtn",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[opt-rtn",
    "quantize/test_rules.py::test_embedding_and_head_are_packed_and_read_back[qwen3_moe-rtn",
    "quantize/test_run.py::test_family_through_both_doors[gemma2-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[gpt_neox-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[llama-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[llama-tied-int8]",
    "quantize/test_run.py::test_family_through_both_doors[llama-tied-nf4]",
    "quantize/test_run.py::test_family_through_both_doors[llama-tied-ptq161]",
    "quantize/test_run.py::test_family_through_both_doors[mistral-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[mixtral-int8]",
    "quantize/test_run.py::test_family_through_both_doors[mixtral-ptq161]",
    "quantize/test_run.py::test_family_through_both_doors[opt-ptq161]",
    "quantize/test_run.py::test_family_through_both_doors[opt-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[phi3-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[qwen2-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[qwen3-rtn]",
    "quantize/test_run.py::test_family_through_both_doors[qwen3_moe-rtn]",
    "quantize/test_run.py::test_without_the_import_plain_transformers_refuses",
    "quantize/test_scalar.py::test_a_checkpoint_has_the_planned_bits_and_every_block_gains[gpt2]",
    "quantize/test_scalar.py::test_fields_describe_the_matrix[42-123-2.0]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=32,shortlist=9-gemma2]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=32,shortlist=9-llama]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=32,shortlist=9-opt]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=64,width=0,frequent=20-gpt2]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=64,width=0,frequent=20-llama-tied]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=64,width=0,frequent=20-llama]",
    "quantize/test_vq.py::test_a_model_with_a_learnt_head[vq:codes=64,width=0,frequent=20-opt]",
)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from scanning what is imported at every collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `ALSO_SLOW` names, before it is chosen by marks what runs."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(ALSO_SLOW):
            item.add_marker(pytest.mark.slow)
