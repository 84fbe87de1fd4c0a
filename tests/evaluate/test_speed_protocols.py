"""The figures of published protocols, next to their definitions computed slowly."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from spectool.data.questions import read_questions
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.result import Result
from spectool.errors import UsageError
from spectool.evaluate import bench as bench_module
from spectool.evaluate.bench import Options, bench
from spectool.evaluate.speed_protocols import PROTOCOLS, Asked, most_new_tokens, score

from ..conftest import tokenizer

Tiny = Callable[..., PreTrainedModel]


def answer(*committed: int) -> Result:
    """A turn's result with so many tokens a forward, the prefill first."""
    return Result(
        token_ids=[7] * sum(committed),
        text="",
        finish_reason="length",
        forwards=len(committed),
        drafted=0,
        accepted=0,
        committed=list(committed),
    )


# Three questions, of which the first has two turns, and their seconds.
QUESTIONS = [[answer(1, 3, 2, 4), answer(1, 2)], [answer(1, 1, 1)], [answer(1, 4, 4, 4, 1)]]
SECONDS = [2.0, 1.0, 0.5]
PLAIN = [[answer(*[1] * 10), answer(*[1] * 3)], [answer(1, 1, 1)], [answer(*[1] * 14)]]
PLAIN_SECONDS = [4.0, 1.5, 3.0]


def ask(questions: Sequence[Sequence[Result]], seconds: Sequence[float]) -> list[Asked]:
    return [Asked([one], each) for one, each in zip(questions, seconds, strict=True)]


def count(question: Sequence[Result]) -> int:
    return sum(len(turn.token_ids) for turn in question)


def test_spec_bench_averages_speeds_over_questions_and_lengths_over_steps() -> None:
    scores = score("spec-bench", ask(QUESTIONS, SECONDS), ask(PLAIN, PLAIN_SECONDS))
    speeds = [count(one) / each for one, each in zip(QUESTIONS, SECONDS, strict=True)]
    plain = [count(one) / each for one, each in zip(PLAIN, PLAIN_SECONDS, strict=True)]
    assert scores.tokens_per_second == pytest.approx(statistics.mean(speeds))
    ratio = statistics.mean(speeds) / statistics.mean(plain)
    assert scores.speedup.value == pytest.approx(ratio)
    assert scores.speedup.lower < ratio < scores.speedup.upper
    steps = [3, 2, 4, 2, 1, 1, 4, 4, 4, 1]
    assert scores.accepted_length is not None
    assert scores.accepted_length.value == pytest.approx(statistics.mean(steps))


def test_speed_bench_averages_lengths_over_questions_and_sums_speeds() -> None:
    scores = score("speed-bench", ask(QUESTIONS, SECONDS), ask(PLAIN, PLAIN_SECONDS))
    speed = sum(map(count, QUESTIONS)) / sum(SECONDS)
    assert scores.tokens_per_second == pytest.approx(speed)
    plain = sum(map(count, PLAIN)) / sum(PLAIN_SECONDS)
    assert scores.speedup.value == pytest.approx(speed / plain)
    # Without prefills and last steps; a turn of nothing else is one step of 1.
    lengths = [statistics.mean([3, 2, 1]), 1.0, statistics.mean([4, 4, 4])]
    assert scores.accepted_length is not None
    assert scores.accepted_length.value == pytest.approx(statistics.mean(lengths))


def test_questions_decoded_together_are_one_of_their_sums() -> None:
    together = [Asked(QUESTIONS[:2], 3.0), Asked(QUESTIONS[2:], 0.5)]
    plain = [Asked(PLAIN[:2], 5.5), Asked(PLAIN[2:], 3.0)]
    scores = score("spec-bench", together, plain)
    first = sum(map(count, QUESTIONS[:2])) / 3
    assert scores.tokens_per_second == pytest.approx((first + count(QUESTIONS[2]) / 0.5) / 2)
    alone = score("spec-bench", ask(QUESTIONS, SECONDS), ask(PLAIN, PLAIN_SECONDS))
    assert scores.accepted_length is not None and alone.accepted_length is not None
    assert scores.accepted_length.value == pytest.approx(alone.accepted_length.value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_steps_that_are_not_known_have_no_length(name: str) -> None:
    unknown = [[Result(token_ids=[1], text="", finish_reason="length", forwards=1, drafted=0,
                       accepted=0)]]  # fmt: skip
    scores = score(name, ask(unknown, [1.0]), ask(PLAIN[:1], [1.0]))
    assert scores.accepted_length is None


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    texts = [["from pathlib import Path", "def run("], ["import os"], ["class Reader:", "return"]]
    names = ["writing", "qa", "coding"]
    lines = [json.dumps({"turns": t, "category": n}) for t, n in zip(texts, names, strict=True)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(("size", "name"), [(1, "spec-bench"), (2, "speed-bench")])
def test_every_turn_is_answered_after_the_own_answers(
    tiny: Tiny, rows: Path, size: int, name: str
) -> None:
    runner = Runner(tiny("llama"), tokenizer=tokenizer())
    questions = read_questions(str(rows), tokenizer(), field="turns")
    drafts = ["ngram", "recycle"]
    options = Options(
        drafts=drafts, max_new_tokens=12, batch_size=size, protocol=name, baselines=size == 1
    )
    run = bench(runner, questions, options)
    # Slowly: turn by turn, a prompt at a time.
    forwards, tokens, accepted, offered = 0, 0, [0] * 12, [0] * 12
    runner.use("ngram")
    for question in questions:
        prompt, turn = question, question
        while True:
            (result,) = runner.generate([prompt.given], max_new_tokens=12)
            forwards, tokens = forwards + result.forwards, tokens + len(result.token_ids)
            for depth, (given, taken) in enumerate(
                zip(result.offered_at, result.accepted_at, strict=True)
            ):
                offered[depth] += given
                accepted[depth] += taken
            if turn.follow is None:
                break
            text = tokenizer().decode(result.token_ids, skip_special_tokens=True).strip()
            prompt = turn = turn.follow(text)
    ngram = run.drafters[0]
    assert run.turns == 5 and run.turns_left_out == 0 and run.prompts == 3
    assert (ngram.forwards, ngram.new_tokens) == (forwards, tokens)
    shares = [taken / given for taken, given in zip(accepted, offered, strict=True) if given]
    assert ngram.acceptance_by_depth == pytest.approx(shares)
    assert [row.identical for row in run.drafters] == [3, 3]
    assert [part.category for part in run.categories] == ["conversation", "qa"]
    assert [part.baseline.prompts for part in run.categories] == [2, 1]
    for row in run.rows:
        assert row.scores is not None and row.scores.tokens_per_second > 0
    assert run.baseline.scores is not None and run.baseline.scores.speedup.value == pytest.approx(1)
    assert run.definitions["scores"] == PROTOCOLS[name].definition
    assert run.kept_share == 1 and run.prompts_cut == 0


def test_nothing_is_cut_by_a_protocol(
    tiny: Tiny, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "loop_start", lambda tokens: 3)
    runner = Runner(tiny("llama"), tokenizer=tokenizer())
    questions = read_questions(str(rows), tokenizer(), field="turns")[1:2]
    tokens = [
        bench(runner, questions, Options(max_new_tokens=9, protocol=name)).baseline.new_tokens
        for name in (None, "spec-bench")
    ]
    assert tokens == [3, 9]


def test_turns_without_room_are_left_out_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"turns": ["def " * 20, "def " * 300, "end"]}))
    (question,) = read_questions(str(path), tokenizer(), field="turns")
    runner = Runner(tiny("llama"), tokenizer=tokenizer())
    run = bench(runner, [question], Options(max_new_tokens=4, protocol="spec-bench"))
    assert (run.turns, run.turns_left_out) == (1, 2)


def test_bounds_are_the_protocols_own() -> None:
    assert [most_new_tokens(name) for name in (None, "spec-bench", "speed-bench")] == [
        128, 1024, 4096,
    ]  # fmt: skip


def test_spec_bench_is_greedy(tiny: Tiny, rows: Path) -> None:
    runner = Runner(tiny("llama"), tokenizer=tokenizer())
    questions = read_questions(str(rows), tokenizer(), field="turns")
    sampling = SamplingParams(temperature=0.8)
    with pytest.raises(UsageError, match="decodes greedily"):
        bench(runner, questions, Options(protocol="spec-bench", sampling=sampling))
