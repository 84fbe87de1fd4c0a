"""A tree grown level by level in the tail equals the tree verified in one pass."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import Draft

from ..trees import path_to

Tiny = Callable[..., PreTrainedModel]
FAMILIES = ["llama", "gemma3", "gpt2", "opt", "gpt_neox"]
# Nodes per level of the trees; the root is the first level.
LEVELS = (1, 4, 3, 6, 2)


def noise_of(seed: int, size: int) -> list[int]:
    noise = random.Random(seed)
    return [noise.randrange(2, 320) for _ in range(size)]


def random_tree(seed: int) -> Draft:
    """Return a tree of LEVELS that branches at random."""
    noise = random.Random(seed)
    parents, above = [-1], [0]
    for size in LEVELS[1:]:
        level = list(range(len(parents), len(parents) + size))
        parents += [noise.choice(above) for _ in level]
        above = level
    return Draft(noise_of(seed, len(parents)), parents, ["deterministic"] * len(parents))


def prefilled(target: AttentionTarget, prompts: list[list[int]]) -> TreeCache:
    cache = target.cache(len(prompts))
    target.prefill(cache, prompts)
    return cache


def grow_by_levels(
    target: AttentionTarget, cache: TreeCache, drafts: list[Draft], seen: list[int] | None = None
) -> Tensor:
    """Return the logits of all nodes, [B, N, V], from one pass per level."""
    passes, fed = [], 0
    for size in LEVELS:
        end = fed + size
        tokens = [draft.tokens[:end] for draft in drafts]
        parents = [[0, *draft.parents[1:end]] for draft in drafts]
        done = target.grow(cache, tokens, parents, fed=fed, seen=seen)
        assert done.shape[1] == size
        passes.append(done)
        fed = end
    return torch.cat(passes, 1)


def tails(cache: TreeCache, size: int, lengths: list[int]) -> list[Tensor]:
    """Return keys and values of each row's first `size` nodes."""
    return [
        kept[row, :, length : length + size].clone()
        for store in cache.stores
        for kept in store.fields
        for row, length in enumerate(lengths)
    ]


def committed(cache: TreeCache) -> list[Tensor]:
    return [
        kept[row, :, :length].clone()
        for store in cache.stores
        for kept in store.fields
        for row, length in enumerate(cache.lengths)
    ]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The second case has rows of unequal length; a window of 16 starts inside some, before others.
@pytest.mark.parametrize("sizes", [(40,), (21, 6, 14, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_level_by_level_is_all_at_once(tiny: Tiny, family: str, sizes: tuple[int, ...]) -> None:
    target = AttentionTarget(tiny(family))
    prompts = [noise_of(size, size) for size in sizes]
    drafts = [random_tree(seed) for seed in range(len(sizes))]
    whole, cache = prefilled(target, prompts), prefilled(target, prompts)
    before = committed(cache)
    expected = target.verify(whole, drafts).logits_BNV
    assert_close(grow_by_levels(target, cache, drafts), expected)
    # Nothing was committed, and the tail holds what committing takes.
    assert cache.tokens == prompts
    assert all(map(torch.equal, committed(cache), before))
    lengths, size = list(sizes), sum(LEVELS)
    for one, two in zip(tails(cache, size, lengths), tails(whole, size, lengths), strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grown_path_can_be_committed(tiny: Tiny, family: str) -> None:
    """Later logits are those after the committed text."""
    target, prompt, draft = AttentionTarget(tiny(family)), noise_of(0, 23), random_tree(5)
    cache = prefilled(target, [prompt])
    grow_by_levels(target, cache, [draft])
    path = path_to(draft, len(draft) - 1)
    cache.commit([draft.tokens], [path])
    text = prompt + [draft.tokens[node] for node in path]
    assert cache.tokens == [text]
    next_draft = tree.chain([7, 8], kind="deterministic")
    found = target.verify(cache, [next_draft]).logits_BNV
    assert_close(found, target.verify(prefilled(target, [text]), [next_draft]).logits_BNV)


def test_trees_of_a_forest_do_not_see_each_other(tiny: Tiny) -> None:
    """A node that is its own parent stands right after the committed tokens."""
    target, prompt = AttentionTarget(tiny("gemma3")), noise_of(0, 20)
    cache = prefilled(target, [prompt])
    tokens, parents = [5, 6, 7, 8, 9], [0, 1, 0, 1, 3]
    target.grow(cache, [tokens[:2]], [parents[:2]])
    found = target.grow(cache, [tokens], [parents], fed=2)[0]
    for node, path in zip((2, 3, 4), ([5, 7], [6, 8], [6, 8, 9]), strict=True):
        chain = tree.chain(path, kind="deterministic")
        expected = target.verify(prefilled(target, [prompt]), [chain]).logits_BNV[0, -1]
        assert_close(found[node - 2], expected)


@pytest.mark.parametrize("seen", [(9, 30), (33, 17), (1, 2), (40, 31)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_see_only_as_much_of_their_cache_as_asked(
    tiny: Tiny, family: str, seen: tuple[int, ...]
) -> None:
    """As if the cache held no more: tokens, positions and windows."""
    target = AttentionTarget(tiny(family))
    prompts = [noise_of(1, 40), noise_of(2, 31)]
    drafts = [random_tree(3), random_tree(4)]
    cache = prefilled(target, prompts)
    before = committed(cache)
    prefixes = [prompt[:size] for prompt, size in zip(prompts, seen, strict=True)]
    expected = target.verify(prefilled(target, prefixes), drafts).logits_BNV
    found = target.grow(
        cache, [d.tokens for d in drafts], [[0, *d.parents[1:]] for d in drafts], seen=seen
    )
    assert_close(found, expected)
    assert_close(grow_by_levels(target, cache, drafts, list(seen)), expected)
    assert cache.tokens == prompts
    assert all(map(torch.equal, committed(cache), before))


def test_a_row_that_sees_nothing_is_an_empty_one(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"))
    cache = prefilled(target, [noise_of(1, 12), noise_of(2, 5)])
    chain = [3, 4, 5]
    found = target.grow(cache, [chain] * 2, [[0, 0, 1]] * 2, seen=[0, 5])
    with torch.inference_mode():
        expected = target.model(torch.tensor([chain]), use_cache=False).logits[0]
    assert_close(found[0], expected)


def test_a_tail_outgrows_the_buffers(tiny: Tiny) -> None:
    """The columns of earlier passes of the tree are kept when the buffers grow."""
    target, prompt = AttentionTarget(tiny("llama")), noise_of(0, 40)
    chain = tree.chain(noise_of(1, 80), kind="deterministic")
    expected = target.verify(prefilled(target, [prompt]), [chain]).logits_BNV
    cache, parents = prefilled(target, [prompt]), [0, *chain.parents[1:]]
    capacity = cache.capacity
    target.grow(cache, [chain.tokens[:20]], [parents[:20]])
    assert cache.capacity == capacity
    found = target.grow(cache, [chain.tokens], [parents], fed=20)
    assert cache.capacity > capacity
    assert_close(found, expected[:, 20:])
