from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import spectool
from spectool.data.text import Prompt
from spectool.decode import engine
from spectool.decode.drafters.recycle import RecycleDrafter
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.errors import UsageError
from spectool.evaluate import turns
from spectool.evaluate.bench import Options, bench, loop_start
from spectool.evaluate.measures.losslessness import list_mismatches
from spectool.evaluate.results import as_json
from spectool.report import NoBaselines, PromptsLeftOut, Timing

from ..decode.conftest import Clock
from ..heard import Heard

Tiny = Callable[..., PreTrainedModel]
IDS = [[5, 6, 7, 5, 6], [9, 10, 11], [20, 21], [5, 6, 7, 8]]
PROMPTS = [Prompt(ids) for ids in IDS]


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ([], 0),
        ([1, 2, 3], 3),
        ([1, 2, 3, 1, 2, 3], 3),
        ([1, 2, 1, 2, 1, 2], 2),
        ([7, 7, 7, 7], 1),
        ([1, 2, 3, 9, 1, 2, 4], 7),
    ],
)
def test_loop_start_finds_the_first_repeated_run(tokens: list[int], start: int) -> None:
    assert loop_start(tokens, length=3 if start != 2 and start != 1 else 2) == start


def test_drafters_are_compared_in_order_on_the_same_limits(
    checkpoint: Callable[..., Path],
) -> None:
    path = checkpoint("llama")
    runner = Runner(spectool.load(path), tokenizer=None)
    drafts = ["ngram:nodes=4", str(checkpoint("llama", seed=1)) + ":depth=2"]
    result = bench(runner, PROMPTS[:2], Options(drafts=drafts, max_new_tokens=12))
    assert [row.name for row in result.drafters] == drafts
    assert result.baseline.tokens_per_forward == 1.0
    for row in result.drafters:
        assert row.identical == row.prompts == 2
        assert row.new_tokens == result.baseline.new_tokens
        assert row.lossless
    assert 0 < result.kept_share <= 1
    assert result.categories == result.baselines == []
    assert result.model == str(path) and result.runtime == "dense, float32"
    assert list_mismatches(result) == []


def test_answers_end_where_their_own_ends_are(tiny: Tiny) -> None:
    runner = Runner(tiny("llama"))
    free = runner.generate(IDS[:2], max_new_tokens=12)
    ends = [(), (free[1].token_ids[4],)]
    ended = runner.generate(IDS[:2], max_new_tokens=12, eos=ends)
    prompts = [
        replace(prompt, ends=frozenset(own)) for prompt, own in zip(PROMPTS[:2], ends, strict=True)
    ]
    result = bench(runner, prompts, Options(drafts=["ngram"], max_new_tokens=12, baselines=True))
    whole = sum(len(one.token_ids) for one in ended)
    assert len(ended[1].token_ids) <= 5 < len(free[1].token_ids)
    assert all(0 < row.new_tokens <= whole for row in result.rows)
    assert result.drafters[0].identical == result.baselines[0].identical == 2


def test_categories_add_up_to_the_whole(tiny: Tiny) -> None:
    heard = Heard()
    names = ["qa", None, "qa", "rag"]
    prompts = [replace(prompt, category=name) for prompt, name in zip(PROMPTS, names, strict=True)]
    options = Options(drafts=["ngram:nodes=4", "recycle"], max_new_tokens=12, baselines=True)
    result = bench(Runner(tiny("llama")), prompts, options, reporter=heard)
    parts = result.categories
    assert [part.category for part in parts] == ["qa", "other", "rag"]
    assert [part.baseline.prompts for part in parts] == [2, 1, 1]
    assert len(result.baselines) == 2
    for at, whole in enumerate(result.rows):
        by_category = [part.rows[at] for part in parts]
        assert {row.name for row in by_category} == {whole.name}
        for key in ("prompts", "new_tokens", "forwards", "drafted", "accepted", "seconds"):
            total = sum(getattr(row, key) for row in by_category)
            assert total == pytest.approx(getattr(whole, key))
        assert whole.identical == (None if at == 0 else 4)
        plain = result.baseline.tokens_per_second
        assert whole.speedup == pytest.approx(whole.tokens_per_second / plain)
    order = [(timing.category, timing.name) for timing in heard.of(Timing)]
    ways = ["none", "ngram:nodes=4", "recycle", *(row.name for row in result.baselines)]
    assert order == [(category, way) for category in ("qa", "other", "rag") for way in ways]


def test_time_is_split_and_compared_with_peers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A call of the runner takes 5 s besides, a forward 8 s, and a proposal 2 s."""
    clock, model = Clock(), tiny("llama")

    def lasting(seconds: float, run: Callable[..., Any]) -> Callable[..., Any]:
        def lasts(*given: Any, **options: Any) -> Any:
            clock.now += seconds
            return run(*given, **options)

        return lasts

    for module in (turns, engine):
        monkeypatch.setattr(module, "time", clock)
    request.addfinalizer(
        model.register_forward_pre_hook(lasting(8, lambda module, given: None)).remove
    )
    monkeypatch.setattr(RecycleDrafter, "propose", lasting(2, RecycleDrafter.propose))
    runner = Runner(model)
    monkeypatch.setattr(runner, "generate", lasting(5, runner.generate))
    options = Options(drafts=["recycle"], max_new_tokens=12, baselines=True)
    result = bench(runner, PROMPTS, options)
    for row in result.baselines:
        assert row.seconds == 8 * row.forwards and row.prompts == 4
    plain, lookup = result.baselines
    (recycle,) = result.drafters
    assert plain.forwards > recycle.forwards > 8
    # No draft is proposed for the last token of a text.
    for row, proposals in ((result.baseline, 0), (recycle, recycle.forwards - 4 - 3)):
        # The first token of each prompt comes from its own pass.
        seconds = {"host": 4 * 5, "prompt": 4 * 8, "target": 8 * (row.forwards - 4)}
        seconds["draft"] = 2 * proposals
        assert row.seconds == sum(seconds.values())
        shares = {name: getattr(row, f"{name}_share") * row.seconds for name in seconds}
        assert shares == pytest.approx(seconds)
        assert row.draft_ms == pytest.approx(2000 * proposals / row.forwards)
        speed = row.new_tokens / row.seconds
        assert row.tokens_per_second == speed
        over = [row.speedup_over_transformers, row.speedup_over_prompt_lookup]
        peers = [speed * peer.seconds / peer.new_tokens for peer in (plain, lookup)]
        assert over == pytest.approx(peers)
    speeds = [(row.new_tokens - 4) / (row.seconds - 4 * 8) for row in (recycle, result.baseline)]
    assert result.baseline.step_speedup == 1
    assert recycle.step_speedup == pytest.approx(speeds[0] / speeds[1]) != 1
    assert "draft_share" not in as_json(plain)


def test_baselines_run_at_batch_size_1_only(tiny: Tiny) -> None:
    heard = Heard()
    runner = Runner(tiny("llama"))
    options = Options(drafts=["ngram"], max_new_tokens=6, batch_size=2, baselines=True)
    result = bench(runner, PROMPTS, options, reporter=heard)
    assert result.baselines == [] and "speedup_over_transformers" not in as_json(result.drafters[0])
    assert heard.of(NoBaselines) == [NoBaselines(batch_size=2)]
    assert result.batch_size == 2 and result.drafters[0].identical == 4


def test_a_broken_promise_is_named_in_float32_only(tiny: Tiny) -> None:
    run = bench(Runner(tiny("llama")), PROMPTS[:2], Options(drafts=["ngram"], max_new_tokens=4))
    assert run.dtype == "float32" and list_mismatches(run) == []
    bad = replace(run.drafters[0], identical=1)
    assert list_mismatches(replace(run, drafters=[bad])) == ["ngram"]
    assert list_mismatches(replace(run, drafters=[bad], dtype="bfloat16")) == []
    assert list_mismatches(replace(run, drafters=[replace(bad, lossless=False)])) == []


def test_prompts_that_do_not_fit_are_left_out_and_counted(tiny: Tiny) -> None:
    heard = Heard()
    runner = Runner(tiny("llama"), context=20)
    # With 16 new tokens, 4 of the prompt fit; with the 15 asked for, 5.
    for most, num_left_out in ((30, 1), (15, 0)):
        result = bench(
            runner, PROMPTS, Options(drafts=["ngram"], max_new_tokens=most), reporter=heard
        )
        assert result.prompts_left_out == num_left_out
        assert result.drafters[0].identical == result.prompts == 4 - num_left_out
    (left_out,) = heard.of(PromptsLeftOut)
    assert left_out == PromptsLeftOut(left_out=1, total=4, room=16, context=20)
    with pytest.raises(UsageError, match=r"no prompt fits in the context of 20 .* has 21"):
        bench(runner, [Prompt(list(range(2, 23)))], Options())


def test_sampling_counts_nothing_identical(tiny: Tiny) -> None:
    options = Options(
        drafts=["ngram"],
        max_new_tokens=8,
        baselines=True,
        sampling=SamplingParams(temperature=0.8, top_k=9),
    )
    result = bench(Runner(tiny("llama")), PROMPTS[:2], options)
    assert all(row.identical is None for row in result.rows)
