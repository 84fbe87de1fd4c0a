"""8-bit keys and values: the formula, the bytes, and drafts that change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode.generate import Runner
from spectool.decode.kv.base import Columns, parse_kv
from spectool.decode.kv.int8 import Int8Store
from spectool.decode.options import CacheOptions
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.open import open_target
from spectool.errors import UnsupportedError, UsageError

from ..drafters import test_eagle3, test_medusa
from ..drafters.test_lossless import ONE_OF_A_KIND, open_on, prompts_of
from ..trees import path_to, trie

Tiny = Callable[..., PreTrainedModel]


def random_states(batch: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return states [B, 2, L, D] whose tokens and channels differ in size."""
    generator = torch.Generator().manual_seed(width)
    states = torch.randn(batch, 2, length, width, generator=generator)
    sizes = torch.randn(batch, 1, length, 1, generator=generator).exp()
    return (states * sizes * torch.linspace(0.01, 10, width)).to(dtype)


def written(store: Int8Store, keys: Tensor, values: Tensor, first: int = 0) -> Int8Store:
    """Write states as a pass that starts at column `first` of all rows."""
    end = first + keys.shape[2]
    store.write_tail(keys, values, Columns([first] * len(keys), None, end, max(16, end)))
    return store


def rounded(x_D: Tensor, size: int) -> list[float]:
    """Compute s q of one token in one head, group by group, by the equations."""
    found = []
    for start in range(0, len(x_D), size):
        group = [float(x) for x in x_D[start : start + size]]
        s = float(torch.tensor(max(map(abs, group))).div(127).bfloat16())
        for x in group:
            q = 0.0 if s == 0 else float((torch.tensor(x) / torch.tensor(s)).round())
            found.append(max(-127.0, min(127.0, q)) * s)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "size"), [(8, 8), (20, 20), (64, 32), (80, 20), (96, 32)])
def test_a_view_is_the_formula(width: int, size: int, dtype: torch.dtype) -> None:
    """A head's width that 32 does not divide has smaller groups; a value has one."""
    keys, values = random_states(2, 5, width, dtype), random_states(2, 5, width, dtype).flip(-1)
    keys[0, 0, 1] = 0
    store = written(Int8Store(), keys, values)
    for found, states, group in zip(store.view(5), (keys, values), (size, width), strict=True):
        expected = [[[rounded(x, group) for x in head] for head in row] for row in states]
        assert found.dtype == dtype
        assert torch.equal(found, torch.tensor(expected).to(dtype))


@pytest.mark.parametrize(("width", "size"), [(64, 32), (40, 20)])
def test_errors_are_at_most_half_a_step(width: int, size: int) -> None:
    keys = random_states(3, 11, width, torch.float32)
    found, _ = written(Int8Store(), keys, keys).view(11)
    largest = keys.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True)
    # The rounding of the scale adds 1 part in 256 of a step.
    steps = (found - keys).unflatten(-1, (-1, size)).abs() / (largest / 127)
    assert steps.max() <= 0.5 * (1 + 2**-8)


def test_a_token_takes_its_codes_and_scales() -> None:
    states = random_states(1, 3, 64, torch.float32)
    store = written(Int8Store(Int8Store.Config(group=16)), states, states)
    # Two heads of keys and values: 64 codes; 4 scales of a key, 1 of a value.
    assert store.token_bytes == 2 * ((64 + 4 * 2) + (64 + 1 * 2))
    assert {field.dtype for field in store.fields} == {torch.int8, torch.bfloat16}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_stays_visible(bad: float) -> None:
    states = random_states(1, 2, 8, torch.float32)
    states[0, 1, 1, 3] = bad
    keys, values = written(Int8Store(), states, states).view(2)
    assert not keys[0, 1, 1].isfinite().all() and not values[0, 1, 1].isfinite().all()
    assert keys[0, 0].isfinite().all() and keys[0, 1, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_depends_on_its_token_alone(dtype: torch.dtype) -> None:
    """Whatever the pass, the batch, and the columns that it passed through."""
    keys, values = random_states(3, 9, 20, dtype), random_states(3, 9, 20, dtype).flip(-1)
    whole = written(Int8Store(), keys, values).view(9)
    one_by_one, moved = Int8Store(), Int8Store()
    for at in range(9):
        written(one_by_one, keys[:, :, at : at + 1], values[:, :, at : at + 1], at)
    written(moved, keys.flip(2), values.flip(2), 4)
    for row in range(3):
        moved.move(row, 4 + torch.arange(8, -1, -1), 0)
    alone = written(Int8Store(), keys[[0, 2, 1]], values[[0, 2, 1]])
    alone.select([0, 2])
    alone.join(written(Int8Store(), keys[2:], values[2:]), (2, 1))
    for store in (one_by_one, moved, alone):
        assert all(map(torch.equal, store.view(9), whole))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_tail_is_rounded_as_committed_tokens_are(tiny: Tiny, family: str) -> None:
    """A tree's logits are those of its paths, token by token; exact keys give other ones."""
    target, exact = AttentionTarget(tiny(family), kv="int8:group=4"), AttentionTarget(tiny(family))
    draft = trie(5, [[6, 7, 8], [6, 9], [10]], nodes=6)
    cache, dense = target.cache(1), exact.cache(1)
    target.prefill(cache, [list(range(20, 50))])
    exact.prefill(dense, [list(range(20, 50))])
    found = target.verify(cache, [draft]).logits_BNV[0]
    other = exact.verify(dense, [draft]).logits_BNV[0]
    seen = set()
    for leaf in set(range(len(draft))) - set(draft.parents):
        alone = target.cache(1)
        for token in range(20, 50):
            target.prefill(alone, [[token]])
        for node in path_to(draft, leaf):
            logits_BV = target.prefill(alone, [[draft.tokens[node]]]).logits_BV
            torch.testing.assert_close(found[node], logits_BV[0], atol=1e-4, rtol=1e-4)
            seen.add(node)
    assert seen == set(range(len(draft)))
    assert (found - other).abs().max() > 1e-3


HEADS: dict[str, Callable[[Any], Any]] = {
    "eagle3": lambda model: test_eagle3.Eagle3Drafter(test_eagle3.make_heads(model), []),
    "medusa": lambda model: test_medusa.MedusaDrafter(
        test_medusa.make_heads(model), test_medusa.TREE
    ),
}


def open_int8(model: PreTrainedModel, name: str, draft: PreTrainedModel) -> Runner:
    if name not in HEADS:
        return open_on(model, name, draft, kv="int8:group=4")
    return Runner(model, draft=HEADS[name](model), kv="int8:group=4")


SAMPLED = {"temperature": 0.6, "verify": "token-match"}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *((name, {}) for name in (*ONE_OF_A_KIND, *HEADS)),
        *((name, SAMPLED) for name in ("ngram", "chain", "eagle3")),
    ],
)
def test_drafted_text_is_plain_text_of_the_same_store(
    tiny: Tiny, endless: Any, name: str, sampling: dict[str, Any]
) -> None:
    """Greedy, and sampled with the random numbers of plain decoding."""
    model, prompts = endless(tiny("llama-deep" if name == "skip" else "llama")), prompts_of(3)
    runner = open_int8(model, name, tiny("llama", 1))
    drafted = runner.generate(prompts, batch_size=3, max_new_tokens=20, **sampling)
    assert all(result.drafted and result.lossless for result in drafted)
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=20, **sampling)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]


@pytest.mark.parametrize("name", ["ngram", "skip", "rsd-s", "eagle3"])
def test_low_precision_stays_near_greedy(tiny: Tiny, endless: Any, name: str) -> None:
    """In bfloat16 every token is close to the best of single passes with the same store."""
    family = "llama-deep" if name == "skip" else "llama"
    model, draft = (copy.deepcopy(tiny(*made)).bfloat16() for made in ((family,), ("llama", 1)))
    runner = open_int8(endless(model), name, draft)
    (prompt,) = prompts_of(1)
    (result,) = runner.generate([prompt], max_new_tokens=24)
    assert result.drafted
    cache = runner.target.cache(1)
    logits_V = runner.target.prefill(cache, [prompt]).logits_BV[0].float()
    for token in result.token_ids:
        best = logits_V.max()
        ulp = 2.0 ** (torch.floor(torch.log2(best.abs())) - 7)
        assert best - logits_V[token] <= 8 * ulp
        logits_V = runner.target.prefill(cache, [[token]]).logits_BV[0].float()


def test_a_recurrent_state_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UnsupportedError, match="--kv int8 is not for mamba2") as caught:
        open_target(tiny("mamba2"), kv="int8")
    assert caught.value.hint == "leave out --kv"


def test_wrong_stores_are_refused() -> None:
    with pytest.raises(UsageError, match="no kv is called 'int4'; known: dense, int8"):
        parse_kv("int4")
    with pytest.raises(UsageError, match="unknown option 'bits'; known: group"):
        parse_kv("int8:bits=4")
    # On the command line before the model is loaded.
    with pytest.raises(UsageError, match="unknown option 'bits'; known: group"):
        CacheOptions(model="m", kv="int8:bits=4")
    store = parse_kv("int8:group=64")()
    assert isinstance(store, Int8Store) and store.config.group == 64
