"""Passes of trees through models of many families, and models that are refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

from spectool.decode.protocol import Needs
from spectool.decode.target import attention
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.teacher import TextCache, read_features
from spectool.errors import UnsupportedError, UsageError

from ...conftest import ATTENDING
from ..trees import path_to, trie

Tiny = Callable[..., PreTrainedModel]


@torch.inference_mode()
def sequential(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Return the last logits by transformers alone: no cache, no mask, no positions given."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def test_a_window_that_is_no_number_is_refused(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.config.sliding_window = "16"
    with pytest.raises(UnsupportedError, match="its sliding_window is '16', expected a whole"):
        AttentionTarget(model)


@pytest.mark.parametrize("family", ATTENDING)
def test_every_node_sees_its_own_path(tiny: Tiny, family: str) -> None:
    """Two rows of unequal length, one past the window of 16; trees of unequal size."""
    model = tiny(family)
    target = AttentionTarget(model)
    cache = target.cache(2)
    noise = random.Random(1)
    prompts = [[noise.randrange(2, 320) for _ in range(size)] for size in (21, 6)]
    target.prefill(cache, prompts)
    drafts = [
        trie(7, [[8, 9, 10], [8, 11], [12, 9]], nodes=9),
        trie(13, [[14]], nodes=9),
    ]
    logits = target.verify(cache, drafts).logits_BNV
    for row, draft in enumerate(drafts):
        for node in range(len(draft)):
            path = [draft.tokens[i] for i in path_to(draft, node)]
            torch.testing.assert_close(
                logits[row, node], sequential(model, prompts[row] + path), atol=2e-4, rtol=1e-4
            )


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_prompts_in_chunks(
    tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch, prompt_of: Callable[..., list[int]]
) -> None:
    monkeypatch.setattr(attention, "CHUNK", 7)
    model = tiny(family)
    target = AttentionTarget(model)
    prompts = [prompt_of(size, seed=size) for size in (23, 1, 14)]
    cache = target.cache(3)
    done = target.prefill(cache, prompts, Needs(layers=(0, -1), final=True))
    for row, prompt in enumerate(prompts):
        expected = sequential(model, prompt)
        torch.testing.assert_close(done.logits_BV[row], expected, atol=2e-4, rtol=1e-4)
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            done.features[row]["layer 0"], hidden[1][0], atol=2e-4, rtol=1e-4
        )
        torch.testing.assert_close(done.features[row]["final"], hidden[-1][0], atol=2e-4, rtol=1e-4)
        assert done.features[row]["layer -1"].shape == hidden[-1][0].shape
    assert cache.tokens == prompts


def test_only_the_last_row_of_a_prompt_gets_logits(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    widths = []
    lm_head = model.get_output_embeddings()
    handle = lm_head.register_forward_hook(lambda m, i, output: widths.append(output.shape[1]))
    target = AttentionTarget(model)
    monkeypatch.setattr(attention, "CHUNK", 8)
    target.prefill(target.cache(1), [list(range(2, 22))])
    handle.remove()
    assert widths == [1, 1, 1]


def test_no_hooks_stay(tiny: Tiny) -> None:
    model = tiny("llama")
    target = AttentionTarget(model)
    # transformers registers some hooks itself.
    before = [len(module._forward_hooks) for module in model.modules()]
    target.prefill(target.cache(1), [[3, 4]], Needs(layers=(1,), final=True))
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_features_of_tree_nodes(tiny: Tiny) -> None:
    model = tiny("llama")
    target = AttentionTarget(model)
    cache = target.cache(1)
    target.prefill(cache, [[3, 4]])
    done = target.verify(cache, [trie(5, [[6], [7]], nodes=4)], Needs(final=True))
    with torch.inference_mode():
        logits = model.get_output_embeddings()(done.features["final"])
        torch.testing.assert_close(logits, done.logits_BNV)


class Older(LlamaForCausalLM):
    """A Llama whose cache argument is named as before transformers 5.24."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
                past_key_values: Any = None, **rest: Any) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **rest)


class Newer(LlamaForCausalLM):
    """A Llama whose cache argument is named as in transformers 5.24."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
                cache: Any = None, **rest: Any) -> Any:  # fmt: skip
        return super().forward(input_ids, attention_mask, position_ids, cache, **rest)


@pytest.mark.parametrize(("kind", "name"), [(Older, "past_key_values"), (Newer, "cache")])
def test_the_cache_goes_by_the_name_that_the_forward_gives_it(
    tiny: Tiny, kind: type[LlamaForCausalLM], name: str, prompt_of: Callable[..., list[int]]
) -> None:
    llama, prompt = tiny("llama"), prompt_of(9)
    model: Any = kind(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    target = AttentionTarget(model)
    assert target.cache_name == name
    cache = target.cache(1)
    target.prefill(cache, [prompt])
    logits_BNV = target.verify(cache, [trie(5, [[6]], nodes=2)]).logits_BNV
    torch.testing.assert_close(logits_BNV[0, 1], sequential(llama, [*prompt, 5, 6]))
    # The decoder's argument has another name.
    kept = TextCache(target.num_layers)
    read_features(target, torch.tensor([prompt]), Needs(final=True), keep=kept)
    assert kept.length == len(prompt)


def small(name: str, **options: Any) -> PreTrainedModel:
    config = getattr(transformers, name + "Config")(vocab_size=32, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Bloom", {"hidden_size": 8, "n_layer": 1, "n_head": 2}, "ALiBi"),
        ("Mpt", {"d_model": 8, "n_layers": 1, "n_heads": 2}, "ALiBi"),
        (
            "Falcon",
            {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True},
            "ALiBi",
        ),
        (
            "GPTNeo",
            {
                "hidden_size": 8,
                "num_layers": 1,
                "num_heads": 2,
                "attention_types": [[["local"], 1]],
            },
            "column numbers",
        ),
        (
            "XLM",
            {"emb_dim": 8, "n_layers": 1, "n_heads": 2, "causal": True},
            "column numbers",
        ),
        (
            "Bert",
            {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            "no causal model",
        ),
    ],
)
def test_models_that_trees_cannot_be_right_for(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"cannot be decoded by spectool: .*{reason}"):
        AttentionTarget(small(name, **options))


def test_flash_attention_is_left_for_one_that_takes_masks(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    assert AttentionTarget(model).notes == []
    model.config._attn_implementation_internal = "flash_attention_2"
    target = AttentionTarget(model)
    assert model.config._attn_implementation == "sdpa"
    assert target.notes == ["attention flash_attention_2 takes no tree mask; using sdpa"]


def test_context_is_the_models_or_less(tiny: Tiny) -> None:
    model = tiny("gpt2")
    assert AttentionTarget(model).context == 256
    assert AttentionTarget(model, context=40).context == 40
    with pytest.raises(UsageError, match="--context 300: gpt2 holds at most 256"):
        AttentionTarget(model, context=300)


@pytest.mark.parametrize("family", ATTENDING)
def test_texts_of_one_row_are_read_as_if_alone(tiny: Tiny, family: str) -> None:
    """Three texts and two, the longest past the window of 16; padding at the end."""
    target = AttentionTarget(tiny(family))
    noise = random.Random(2)
    rows = [
        [[noise.randrange(2, 320) for _ in range(size)] for size in sizes]
        for sizes in ((5, 21, 9), (30, 1))
    ]
    longest = max(sum(map(len, row)) for row in rows)
    tokens_BL = torch.zeros(2, longest, dtype=torch.long)
    segments_BL = torch.full((2, longest), -1)
    for index, row in enumerate(rows):
        flat = [token for text in row for token in text]
        tokens_BL[index, : len(flat)] = torch.tensor(flat)
        numbers = [number for number, text in enumerate(row) for _ in text]
        segments_BL[index, : len(flat)] = torch.tensor(numbers)
    needs = Needs(final=True, layers=(0,))
    found = read_features(target, tokens_BL, needs, segments_BL)
    for index, row in enumerate(rows):
        start = 0
        for text in row:
            alone = read_features(target, torch.tensor([text]), needs)
            for name, value_1LD in alone.items():
                torch.testing.assert_close(
                    found[name][index, start : start + len(text)], value_1LD[0], atol=2e-5, rtol=0
                )
            start += len(text)
