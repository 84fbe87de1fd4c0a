"""The cache of trees: commits, growth, selection of rows, kept prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MllamaForCausalLM, PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.generate import Runner
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.masks import tree_mask

from .trees import trie

Tiny = Callable[..., PreTrainedModel]


def assert_rows_equal(cache: TreeCache, row: int, target: AttentionTarget) -> None:
    """Check that a row's committed columns are those of a fresh prompt pass."""
    fresh = target.cache(1)
    tokens = cache.tokens[row]
    target.prefill(fresh, [tokens])
    for mine, theirs in zip(cache.stores, fresh.stores, strict=True):
        pairs = zip(mine.view(len(tokens)), theirs.view(len(tokens)), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found[row], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt", "gpt_neox"])
def test_committed_rows_are_those_of_a_fresh_pass(tiny: Tiny, family: str) -> None:
    """Also ragged rows, branches that jump, and a doubling of the buffers."""
    target = AttentionTarget(tiny(family))
    cache = target.cache(2)
    target.prefill(cache, [list(range(2, 62)), list(range(2, 9))])
    for _ in range(3):
        drafts = [
            trie(70, [[71, 72], [73, 74, 75], [73, 76, 77]], nodes=9),
            trie(80, [[81], [82, 83]], nodes=9),
        ]
        target.verify(cache, drafts)
        cache.commit([draft.tokens for draft in drafts], [[0, 3, 6, 7], [0, 2, 3]])
    assert cache.lengths == [72, 16]
    assert cache.tokens[0][-4:] == [70, 73, 76, 77]
    assert cache.tokens[1][-3:] == [80, 82, 83]
    for row in (0, 1):
        assert_rows_equal(cache, row, target)


def test_buffers_double_up_to_the_context(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"))
    cache = target.cache(1)
    seen = []
    for _ in range(250):
        target.prefill(cache, [[5]])
        seen.append(cache.capacity)
    assert sorted(set(seen)) == [64, 128, 256]


def test_wide_trees_near_the_context_grow_the_buffers_once(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"), context=100)
    cache = target.cache(1)
    target.prefill(cache, [list(range(2, 62))])
    seen = []
    for num_nodes in range(130, 170):
        draft = trie(5, [[token] for token in range(2, num_nodes + 2)], nodes=num_nodes)
        target.verify(cache, [draft])
        cache.commit([draft.tokens], [[0]])
        seen.append(cache.capacity)
    assert len(set(seen)) <= 3
    assert seen[-1] <= 100 + 256


def test_select_keeps_rows_in_order(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"))
    cache = target.cache(3)
    target.prefill(cache, [[2, 3], [4], [5, 6, 7]])
    cache.select([0, 2])
    assert cache.tokens == [[2, 3], [5, 6, 7]]
    target.prefill(cache, [[8], [9, 10]])
    for row in (0, 1):
        assert_rows_equal(cache, row, target)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_joined_rows_continue_as_they_do_alone(tiny: Tiny, family: str) -> None:
    """Lengths and capacities differ; the first cache may be empty."""
    target = AttentionTarget(tiny(family))
    prompts = [list(range(2, 42)), list(range(50, 57)), list(range(60, 132))]
    joined, alone = target.cache(0), [target.cache(1) for _ in prompts]
    for cache, prompt in zip(alone, prompts, strict=True):
        target.prefill(cache, [prompt])
        given, before = target.cache(1), joined.lengths
        target.prefill(given, [prompt])
        kept = [[field.clone() for field in store.fields] for store in joined.stores]
        joined.join(given)
        assert joined.lengths == [*before, len(prompt)]
        for store, fields in zip(joined.stores, kept, strict=True):
            for field, held in zip(store.fields, fields, strict=False):
                for row, length in enumerate(before):
                    assert torch.equal(field[row, :, :length], held[row, :, :length])
    drafts = [trie(5 + b, [[6, 7], [8, 9 + b]], nodes=5) for b in range(3)]
    paths = [[0, 3, 4], [0, 1], [0]]
    for _ in range(3):
        found = target.verify(joined, drafts).logits_BNV
        for b, cache in enumerate(alone):
            expected = target.verify(cache, [drafts[b]]).logits_BNV[0]
            torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=1e-5)
            cache.commit([drafts[b].tokens], [paths[b]])
        joined.commit([draft.tokens for draft in drafts], paths)
        assert joined.tokens == [cache.tokens[0] for cache in alone]


def test_a_row_that_joins_takes_the_memory_of_one_that_left(tiny: Tiny) -> None:
    """Nothing is allocated, and what the other row had written is not seen, were it NaN."""
    target = AttentionTarget(tiny("llama"))
    cache, given = target.cache(3), target.cache(1)
    target.prefill(cache, [list(range(2, 22)), list(range(30, 50)), [7, 8]])
    target.prefill(given, [[5, 6]])
    with torch.inference_mode():
        for store in cache.stores:
            for field in store.fields:
                field[1] = torch.nan
    where = [field.data_ptr() for store in cache.stores for field in store.fields]
    cache.select([0, 2])
    cache.join(given)
    assert [field.data_ptr() for store in cache.stores for field in store.fields] == where
    assert cache.tokens == [list(range(2, 22)), [7, 8], [5, 6]]
    for row in range(3):
        assert_rows_equal(cache, row, target)


def test_keep_prefix_leaves_the_last_token_to_be_fed(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"))
    cache = target.cache(2)
    target.prefill(cache, [[2, 3, 4, 5], [6, 7, 8]])
    assert cache.keep_prefix([[2, 3, 9, 9], [6, 7, 8]]) == [2, 2]
    target.prefill(cache, [[9, 9], [8]])
    assert cache.tokens == [[2, 3, 9, 9], [6, 7, 8]]
    for row in (0, 1):
        assert_rows_equal(cache, row, target)


def test_nothing_is_copied_for_a_path_in_place(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    target = AttentionTarget(tiny("llama"))
    cache = target.cache(1)
    target.prefill(cache, [[2, 3]])
    draft = tree.chain([4, 5, 6], kind="deterministic")
    target.verify(cache, [draft])
    monkeypatch.setattr(cache, "stores", [])
    cache.commit([draft.tokens], [[0, 1]])
    assert cache.tokens == [[2, 3, 4, 5]]


def test_masks_read_positions_and_not_columns() -> None:
    """As if a store had dropped the tokens at positions 1 to 4 and 6 to 8."""
    positions_BS = torch.tensor([[0, 5, 9, 10, 11, 99]])
    visible_BNT = torch.tensor([[[True, False], [True, True]]])
    for window, seen in {4: [2], 6: [1, 2], 11: [0, 1, 2]}.items():
        mask_NS = tree_mask([3], positions_BS, visible_BNT, torch.float32, window=window)[0, 0]
        assert (mask_NS[0] == 0).nonzero()[:, 0].tolist() == [*seen, 3]
    assert (mask_NS[1] == 0).nonzero()[:, 0].tolist() == [1, 2, 3, 4]


def test_a_layer_that_passes_nothing_has_seen_nothing() -> None:
    """Mllama's layers for images ask for the length of an unused layer."""
    cache = TreeCache(batch=1, num_layers=2, context=16)
    cache.open(torch.arange(2)[None], 2, torch.device("cpu"))
    rows_BHND = torch.ones(1, 1, 2, 4)
    cache.model_cache.update(rows_BHND, rows_BHND, 0)
    cache.commit([[5, 6]], [[0, 1]])
    assert [cache.model_cache.get_seq_length(layer) for layer in (0, 1)] == [2, 0]


def test_a_text_model_with_layers_for_images_decodes() -> None:
    """Mllama skips the layers that read images, and asks each layer whether it holds keys."""
    torch.manual_seed(0)
    config = MllamaTextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1],
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, eos_token_id=95,
    )  # fmt: skip
    model: Any = MllamaForCausalLM(config)
    model.eval()
    prompts, wanted = [[5, 6, 7, 8], [9, 10, 11, 12, 13]], []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        wanted.append(ids[0, len(prompt) :].tolist())
    found = Runner(model, draft="recycle").generate(prompts, max_new_tokens=8, batch_size=2)
    assert [result.token_ids for result in found] == wanted
