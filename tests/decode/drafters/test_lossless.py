"""Every drafter's greedy text is plain text, token for token, whatever the family and the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from spectool import methods
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner

from ..conftest import plain_text, with_exits

Tiny = Callable[..., PreTrainedModel]
FAMILIES = ["llama", "gemma3", "qwen3", "gpt2", "opt", "gpt_neox", "mixtral"]

SPECS = {
    "ngram": "ngram",
    "copy": "copy",
    "recycle": "recycle",
    "trigram": "trigram",
    "jacobi": "jacobi:window=6",
    "jacobi joined": "jacobi:window=6+recycle",
    "units": "units:longest=4,placeholder=7",
    "skip": "skip:search=4",
    "combined": "ngram+recycle+trigram",
    "tuned": "ngram+recycle:tune",
    "jacobi tuned": "jacobi:tune",
    "chain": DraftModelDrafter.Config(),
    "iid": DraftModelDrafter.Config(tree="iid"),
    "rsd-c": DraftModelDrafter.Config(tree="rsd-c", width=2, depth=3),
    "rsd-s": DraftModelDrafter.Config(tree="rsd-s"),
    "exits": DraftModelDrafter.Config(exits="auto"),
}


# One drafter of each kind: lookup, heads, skip, a chain, a tree; the others run as slow tests.
ONE_OF_A_KIND = ["ngram", "jacobi", "skip", "chain", "rsd-s", "exits"]
JOINED = ["jacobi joined", "combined", "tuned", "jacobi tuned"]
MOST_SLOW = [
    pytest.param(name, marks=[] if name in ONE_OF_A_KIND else pytest.mark.slow) for name in SPECS
]


def test_all_drafters_are_here() -> None:
    known = {
        name for name in methods.list_methods("drafter") if not methods.METHODS[name].trainable
    }
    assert known - {"none", "draft_model"} <= set(SPECS)


def open_on(model: PreTrainedModel, name: str, draft: PreTrainedModel, kv: str = "dense") -> Runner:
    how, runner = SPECS[name], Runner(model, kv=kv)
    if isinstance(how, DraftModelDrafter.Config):
        draft = with_exits(draft, [1, 2], [0.04, 0]) if how.exits else draft
        runner.use(DraftModelDrafter(draft, how, target=runner.target))
    else:
        runner.use(how)
    return runner


def prompts_of(size: int) -> list[list[int]]:
    """Make prompts of unequal length that partly repeat themselves."""
    rng = random.Random(size)
    made = []
    for _ in range(size):
        part = [rng.randrange(2, 40) for _ in range(rng.randint(3, 12))]
        made.append([*part, rng.randrange(2, 320), *part])
    return made


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "llama") for name in SPECS), *((name, "gemma3") for name in ONE_OF_A_KIND)],
)
def test_greedy_text_is_plain_text(tiny: Tiny, endless: Any, name: str, family: str) -> None:
    check(tiny, endless, name, family, size=3, length=20)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_greedy_text_of_50_prompts(tiny: Tiny, endless: Any, name: str, family: str) -> None:
    check(tiny, endless, name, family, size=50, length=60)


def check(tiny: Tiny, endless: Any, name: str, family: str, *, size: int, length: int) -> None:
    model = endless(tiny(family) if name != "skip" else tiny(f"{family}-deep"))
    prompts = prompts_of(size)
    plain = [plain_text(model, prompt, length) for prompt in prompts]
    runner = open_on(model, name, tiny(family, 1))
    for batch_size in (1, 3):
        results = runner.generate(prompts, max_new_tokens=length, batch_size=batch_size)
        assert [r.token_ids for r in results] == plain
        assert sum(r.drafted for r in results) > 0 or "tuned" in name
        assert all(r.lossless for r in results)


# Those that join or tune others run as slow tests.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in JOINED else []) for name in SPECS],
)
def test_the_context_ends_a_drafted_text_where_it_ends_a_plain_one(
    tiny: Tiny, endless: Any, name: str
) -> None:
    model = endless(tiny("llama-deep" if name == "skip" else "llama"))
    runner = open_on(model, name, tiny("llama", 1))
    runner.target.context = 40
    prompts = prompts_of(2)
    drafted = runner.generate(prompts, max_new_tokens=99, batch_size=2)
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=99, batch_size=2)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert {r.finish_reason for r in drafted} == {"context"}


@pytest.mark.parametrize("name", MOST_SLOW)
def test_penalties_leave_drafted_text_plain(tiny: Tiny, endless: Any, name: str) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    model = endless(tiny("llama-deep" if name == "skip" else "llama"))
    runner, prompts = open_on(model, name, tiny("llama", 1)), prompts_of(2)
    drafted = runner.generate(prompts, max_new_tokens=20, batch_size=2, **options)
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=20, **options)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
