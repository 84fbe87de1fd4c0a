"""Scores of tasks without lm-evaluation-harness; with it, see test_harness.py."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel
from typer.testing import CliRunner

import spectool
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.decode.target.open import open_target
from spectool.errors import UsageError
from spectool.evaluate.intervals import mcnemar, share
from spectool.evaluate.measures.tasks import compare, recover
from spectool.evaluate.tasks import scorer as scoring
from spectool.evaluate.tasks.answers import Answers, Question
from spectool.evaluate.tasks.kept import KeptAnswers
from spectool.evaluate.tasks.load import list_local
from spectool.evaluate.tasks.scorer import Likelihood, Pair, Scorer
from spectool.report import Reporter

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples/tiny-python"


def make_pairs(seed: int, contexts: int = 5, longest: int = 40) -> list[Pair]:
    """Make questions of random tokens, with choices that begin alike and a repeated one."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(2, 300) for _ in range(count)]

    pairs: list[Pair] = []
    for _ in range(contexts):
        context, begin = draw(rng.randrange(1, longest)), draw(3)
        choices = [begin + draw(rng.randrange(1, 6)) for _ in range(3)]
        pairs += [(context, choice) for choice in [*choices, begin, choices[0]]]
    return pairs


def score_all(scorer: Scorer, pairs: Sequence[Pair]) -> list[Likelihood]:
    found: dict[int, Likelihood] = {}
    for batch in scorer.plan(pairs):
        found |= scorer.run(batch)
    return [found[index] for index in range(len(pairs))]


@torch.inference_mode()
def read_slowly(model: PreTrainedModel, context: Sequence[int], end: Sequence[int]) -> Likelihood:
    logits_LV = model(input_ids=torch.tensor([[*context, *end]]), use_cache=False).logits[0]
    logp_LV = torch.log_softmax(logits_LV.double(), -1)[len(context) - 1 : -1]
    value = sum(float(logp_V[token]) for logp_V, token in zip(logp_LV, end, strict=True))
    return Likelihood(value, logp_LV.argmax(-1).tolist() == list(end))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "recurrent_gemma"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_scores_are_those_of_whole_texts(
    kind: str,
    chunk: int,
    tiny: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A small chunk splits the continuations into several passes, and long ones into pieces.
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    model, pairs = tiny(kind), make_pairs(0)
    greedy = model.generate(torch.tensor([pairs[0][0]]), max_new_tokens=9, do_sample=False)
    pairs.append((pairs[0][0], greedy[0, len(pairs[0][0]) :].tolist()))
    expected = [read_slowly(model, *pair) for pair in pairs]
    found = score_all(Scorer(open_target(model)), pairs)
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    assert found[-1].greedy and not found[0].greedy
    for each, slow in zip(found, expected, strict=True):
        assert each.value == pytest.approx(slow.value, abs=1e-4)


def test_no_bit_of_a_score_depends_on_the_batch_size() -> None:
    target = open_target(spectool.load(TINY, dtype="bfloat16"), forward="fused")
    assert target.rows_are_independent
    pairs = make_pairs(1, contexts=11)
    alone = score_all(Scorer(target, 1), pairs)
    for size in (3, 8):
        assert score_all(Scorer(target, size), pairs) == alone
    random.Random(0).shuffle(order := list(range(len(pairs))))
    shuffled = score_all(Scorer(target, 4), [pairs[index] for index in order])
    assert shuffled == [alone[index] for index in order]


def test_a_long_context_loses_its_first_tokens(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("llama")
    context, end = list(range(2, 62)), [5, 6, 7]
    (found,) = score_all(Scorer(open_target(model, context=32)), [(context, end)])
    assert found.value == pytest.approx(read_slowly(model, context[-30:], end).value, abs=1e-4)


class Killer(Reporter):
    """Ends the run when so many batches are done."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def progress(self, done: float, total: int, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Modules of torch: what passes together moves the last bits, unless it is the same again.
    runner = Runner(tiny("gpt2"))
    pairs = make_pairs(2, contexts=12)
    questions = [
        Question(tokens=list(context), max_new_tokens=5, sampling={"temperature": temperature})
        for context, _ in pairs[::5]
        for temperature in (0.0, 0.8)
    ]
    make = partial(Answers, runner, batch_size=4)
    whole = make(KeptAnswers(None, {}))
    expected = whole.score(pairs), whole.write(questions)
    file, settings = tmp_path / "answers", {"checkpoint": "a"}
    ran: list[int] = []
    run = Scorer.run
    monkeypatch.setattr(Scorer, "run", lambda self, batch: ran.append(1) or run(self, batch))
    for batches in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            answers = make(KeptAnswers(file, settings), reporter=Killer(batches))
            answers.score(pairs), answers.write(questions)
        # The kill tore the last line, of a batch that runs again as a whole.
        file.write_bytes(file.read_bytes()[:-9])
    assert len(ran) > 2
    again = make(KeptAnswers(file, settings))
    assert (again.score(pairs), again.write(questions)) == expected
    ran.clear()
    last = make(KeptAnswers(file, settings))
    assert (last.score(pairs), last.write(questions)) == expected and not ran
    # Answers of another checkpoint are none of this one's.
    assert len(KeptAnswers(file, {"checkpoint": "b"})) == 0
    assert len(KeptAnswers(file, settings)) == len(last.kept)


def test_a_drafter_writes_what_plain_decoding_writes(tiny: Callable[..., PreTrainedModel]) -> None:
    questions = [
        Question(tokens=list(context) * 2, max_new_tokens=20) for context, _ in make_pairs(3)[::5]
    ]
    texts, forwards = [], []
    for draft in (None, "recycle+ngram"):
        runner = Runner(tiny("llama"), draft=draft)
        verify, passes = runner.target.verify, list[int]()
        runner.target.verify = lambda *given, n=passes, run=verify: n.append(1) or run(*given)
        texts.append(Answers(runner, KeptAnswers(None, {})).write(questions))
        forwards.append(len(passes))
    assert texts[0] == texts[1] and forwards[1] < forwards[0]


def test_a_file_of_something_else_is_not_appended_to(tmp_path: Path) -> None:
    for content in ("a text\n", '{"question": 1}\n', "[1]\n", "a text without an end"):
        (tmp_path / "file").write_text(content)
        with pytest.raises(UsageError, match=r"line( 1)? is no answer"):
            KeptAnswers(tmp_path / "file", {})
        assert (tmp_path / "file").read_text() == content


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def perplexity(values: Sequence[float]) -> float:
    return math.exp(-mean(values))


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def test_answers_are_compared_item_by_item() -> None:
    own, reference = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1]
    found = compare(own, reference, mean, higher=True)
    assert found.score == share(5, 8) and found.reference == share(7, 8)
    assert found.difference is not None and found.recovery is not None
    assert found.difference.value == pytest.approx(-2 / 8)
    assert found.recovery.value == pytest.approx(5 / 7)
    assert (found.lost, found.gained, found.p) == (3, 1, mcnemar(3, 1))
    same = compare(own, own, mean, higher=True)
    assert same.difference is not None and same.recovery is not None
    assert (same.difference.lower, same.difference.upper) == (0, 0)
    assert (same.recovery.lower, same.recovery.upper) == (1, 1)


def test_metrics_that_are_no_shares_are_compared_too() -> None:
    own, reference = [-1.0, -2.5, -3.0], [-1.0, -2.0, -2.0]
    found = compare(own, reference, perplexity, higher=False)
    assert found.score.value == pytest.approx(perplexity(own)) and found.p is None
    assert found.recovery is not None
    # Lower is better: a recovery below 1 is a loss here as well.
    assert found.recovery.value == pytest.approx(perplexity(reference) / perplexity(own))
    bare = compare(own, reference, median, higher=True)
    assert bare.score.value == -2.5 and math.isnan(bare.score.lower) and bare.recovery is None


def test_recovery_is_of_the_mean_over_tasks_in_every_resample() -> None:
    def repeat(count: int, own: float, reference: float) -> dict[str, torch.Tensor]:
        return {"acc": torch.tensor([[own, reference]] * count, dtype=torch.float64)}

    # Of tasks whose items are all alike no resample has another mean, whatever their sizes.
    found = recover({"long": repeat(400, 0.9, 1), "short": repeat(5, 0.1, 0.5)})
    assert [found.value, found.lower, found.upper] == pytest.approx([1 / 1.5] * 3)


def test_the_local_tasks_are_complete() -> None:
    folder = ROOT / "evaluate/tasks/local"
    assert len(list_local()) == 8
    for name in list_local():
        config = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert config["task"] == name
        assert list(config["dataset_kwargs"]["data_files"]) == [config["test_split"]]


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["eval", str(TINY), "--task", "local_piqa", "--json"])
    assert done.exit_code == 2
    assert "tasks need lm-evaluation-harness" in json.loads(done.stdout)["error"]["message"]
    assert "pip install 'spectool[tasks]'" in done.stderr
