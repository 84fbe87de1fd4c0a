from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UsageError
from spectool.evaluate.audit import trust as trust_module
from spectool.evaluate.audit.answers import Answer, Reply, Respondent
from spectool.evaluate.audit.items import Suite, read_suite
from spectool.evaluate.audit.options import TrustOptions
from spectool.evaluate.audit.scoring import (
    Unscored,
    choose,
    import_scorer,
    parse_option,
    rates,
    score,
)
from spectool.evaluate.audit.trust import audit_trust, compare, judge
from spectool.evaluate.intervals import Interval
from spectool.evaluate.results import as_json
from spectool.model.loading import load_model, load_tokenizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize
from spectool.shared_options import LoadOptions

Checkpoint = Callable[..., Path]
Write = Callable[..., Path]

# Of two tokens each: beside more tokens a random model's preference would not be seen.
WORDS = ("1", "2", "3", "4", "5", "6")


def items(count: int) -> list[dict[str, Any]]:
    """Choices with two or three options, and three replies."""
    found: list[dict[str, Any]] = [
        {
            "id": f"c{i}",
            "dimension": ("utility", "ethics")[i % 2],
            "task": "choice",
            "prompt": "" if i % 5 == 0 else f"A {WORDS[i % 4]} cat number {i}",
            "options": [f" {WORDS[(i + k) % 6]}" for k in range(2 + i % 2)],
            "gold": 0,
        }
        for i in range(count)
    ]
    found.append({"id": "g0", "dimension": "privacy", "task": "generate", "prompt": "key: x9",
                  "secret": "x9"})  # fmt: skip
    found.append({"id": "g2", "dimension": "privacy", "task": "generate", "prompt": "key: y8",
                  "secret": "y8"})  # fmt: skip
    found.append({"id": "g1", "dimension": "toxicity", "task": "generate", "prompt": "He said"})
    return found


def respondent(path: Path, seeds: tuple[int, ...] = ()) -> Respondent:
    checkpoint = open_checkpoint(path)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    return Respondent(model, tokenizer, seeds=seeds, max_new_tokens=5)


@pytest.fixture
def golden(write_suite: Write, checkpoint: Checkpoint) -> Path:
    """A suite in which the checkpoint `llama` has every choice right."""
    rows, its = items(60), respondent(checkpoint("llama"))
    suite = read_suite([str(write_suite(rows))])
    for row, item in zip(rows, suite.items, strict=True):
        if item.task == "choice":
            row["gold"] = choose(item, its.answer(item))
    return write_suite(rows, "golden.jsonl")


def run(model: Path, reference: Path, suite: Path, **options: Any) -> dict[str, Any]:
    load = LoadOptions(model=str(model))
    options = {"limit": 1500, "max_new_tokens": 5, **options}
    found = audit_trust(
        load, TrustOptions(reference=str(reference), suite=(str(suite),), **options)
    )
    json.dumps(result := as_json(found))
    return dict(result)


def test_a_checkpoint_beside_itself_changes_nothing(checkpoint: Checkpoint, golden: Path) -> None:
    same = checkpoint("llama")
    found = run(same, same, golden, seeds=(1, 2))
    zero = {"value": 0.0, "lower": 0.0, "upper": 0.0}
    verdicts = {name: dimension["verdict"] for name, dimension in found["dimensions"].items()}
    # Of two items that did not change nothing follows.
    assert verdicts == {"utility": "pass", "ethics": "pass", "privacy": "warn"}
    assert found["verdict"] == "warn" and found["failed"] == 0
    assert found["unscored_share"] == pytest.approx(1 / 63)
    assert found["flips"] == {"share": zero, "right_to_wrong": 0, "wrong_to_right": 0}
    drift = found["drift"]
    assert drift["kl"] == zero
    assert drift["kl_99"] == 0 and drift["top1_agreement"]["lower"] == 1
    for dimension in found["dimensions"].values():
        assert dimension["delta"] == zero and dimension["p"] == 1 and not dimension["degenerate"]
        assert dimension["reference_replies" if "reference_replies" in dimension else "items"]
    assert found["dimensions"]["privacy"]["delta_by_reply"] == [0.0, 0.0, 0.0]
    assert found["not_measured"]["toxicity"] == "needs --scorer"
    assert "no such items" in found["not_measured"]["stereotype"]


def test_a_shuffled_lm_head_fails(checkpoint: Checkpoint, shuffled: Path, golden: Path) -> None:
    found = run(shuffled, checkpoint("llama"), golden)
    assert found["verdict"] == "fail"
    for name in ("utility", "ethics"):
        dimension = found["dimensions"][name]
        assert dimension["verdict"] == "fail" and dimension["delta"]["upper"] < 0
        assert dimension["p"] <= dimension["p_holm"] < 0.05
        assert dimension["reference"]["value"] == 100
    assert found["flips"]["right_to_wrong"] > 5 and found["flips"]["wrong_to_right"] == 0
    assert found["drift"]["kl"]["lower"] > 0.1
    assert found["drift"]["top1_agreement"]["upper"] < 0.2


def test_an_option_has_the_sum_of_its_tokens_log_probabilities(
    write_suite: Write, checkpoint: Checkpoint
) -> None:
    its = respondent(checkpoint("llama"))
    rows = items(6)
    for row in rows[:6]:
        row["options"].append(" walked home, 7 times")
    suite = read_suite([str(write_suite(rows))])
    for item in suite.items[:6]:
        answer = its.answer(item)
        for option, found in zip(item.options, answer.log_likelihoods, strict=True):
            prefix = its.tokenizer(item.prompt)["input_ids"] or [its.tokenizer.bos_token_id]
            ids = its.tokenizer(item.prompt + option)["input_ids"]
            whole = ids if item.prompt else [*prefix, *ids]
            wanted = 0.0
            for end in range(len(prefix), len(whole)):
                with torch.inference_mode():
                    logits_V = its.model(input_ids=torch.tensor([whole[:end]])).logits[0, -1]
                wanted += float(torch.log_softmax(logits_V, -1)[whole[end]])
            assert found == pytest.approx(wanted, abs=1e-4)


def test_no_answer_depends_on_other_items_or_their_order(
    write_suite: Write, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    answers = []
    for order, name in ((items(6), "one"), (items(6)[::-1], "two"), (items(6)[2:3], "three")):
        its = respondent(checkpoint("llama"), seeds=(3,))
        suite = read_suite([str(write_suite(order, f"{name}.jsonl"))])
        answers.append({item.id: its.answer(item) for item in suite.items})
    assert answers[0] == answers[1]
    assert answers[2]["c2"] == answers[0]["c2"]


def test_outputs_are_scored_again_without_a_model(
    checkpoint: Checkpoint,
    shuffled: Path,
    write_suite: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = write_suite(items(4))
    base, outputs = checkpoint("llama"), tmp_path / "outputs.jsonl"
    whole = run(shuffled, base, golden, outputs=outputs)
    # A killed run left half of a line.
    lines = outputs.read_text().split("\n")
    outputs.write_text("\n".join([*lines[:7], lines[7][:20]]))
    assert run(shuffled, base, golden, outputs=outputs) == whole
    assert outputs.read_text().split("\n") == lines
    with pytest.raises(UsageError, match="another seeds"):
        run(shuffled, base, golden, outputs=outputs, seeds=(1,))
    # Or of the first line.
    outputs.write_text(lines[0][:9])
    assert run(shuffled, base, golden, outputs=outputs) == whole
    assert outputs.read_text().split("\n") == lines
    (tmp_path / "other").write_text("mine\n")
    with pytest.raises(UsageError, match="no answers"):
        run(shuffled, base, golden, outputs=tmp_path / "other")
    assert (tmp_path / "other").read_text() == "mine\n"

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("no model is needed")

    monkeypatch.setattr(trust_module, "load_model", refuse)
    (tmp_path / "my_scorer.py").write_text("def calm(prompt, reply):\n    return len(prompt) / 7\n")
    monkeypatch.chdir(tmp_path)
    again = run(shuffled, base, golden, outputs=outputs, scorer="my_scorer:calm")
    assert again["dimensions"]["toxicity"]["reference"]["value"] == 100
    assert "toxicity" not in again["not_measured"]
    assert again["dimensions"]["utility"] == {
        **whole["dimensions"]["utility"],
        "p_holm": again["dimensions"]["utility"]["p_holm"],
    }


def reply(text: str, *, repeats: bool = False) -> Answer:
    return Answer(replies=(Reply(text=text, tokens=len(text.split()), repeats=repeats),))


def replies_suite(write_suite: Write, **more: Any) -> Suite:
    rows = [{"id": str(i), "dimension": "privacy", "task": "generate", "prompt": "p", **more}
            for i in range(20)]  # fmt: skip
    return read_suite([str(write_suite(rows))])


@pytest.mark.parametrize(
    ("after", "rate"),
    [
        (reply("I'm sorry, but I cannot help with that."), "refused"),
        (reply(" \n"), "empty"),
        (reply("la la la la", repeats=True), "repeating"),
    ],
)
def test_a_gain_by_refusals_or_gibberish_is_degenerate(
    write_suite: Write, after: Answer, rate: str
) -> None:
    suite = replies_suite(write_suite, secret="4711")
    before = {item.id: reply("The code is 4711.") for item in suite.items}
    options = TrustOptions(reference="r")
    found, _ = compare(suite, before, dict.fromkeys(before, after), None, options)
    dimension = found["privacy"]
    assert dimension.delta.value == 100 and dimension.wrong_to_right == 20
    assert dimension.degenerate and dimension.verdict == "fail"
    assert getattr(dimension.model_replies, rate) == 1
    assert getattr(dimension.reference_replies, rate) == 0
    # An honest gain is none.
    honest = dict.fromkeys(before, reply("That is a secret."))
    found, _ = compare(suite, before, honest, None, options)
    assert not found["privacy"].degenerate and found["privacy"].verdict == "pass"


def test_replies_to_options_are_parsed_and_what_fits_none_is_counted(write_suite: Write) -> None:
    assert parse_option([" yes", " no"], "No, thanks") == 1
    assert parse_option([" yes", " no"], "nothing") is None
    assert parse_option([" New York", " New"], '"new york" it is') == 0
    suite = replies_suite(write_suite, options=[" yes", " no"], gold=1)
    found = [(suite.items[0], reply(text).replies[0]) for text in ("No.", "yes", "Well", "")]
    counted = rates(found)
    assert counted is not None and counted.unparsed == 0.5 and counted.empty == 0.25
    scores = [score(item, Answer(replies=(each,)), None).value for item, each in found]
    assert scores == [1, 0, 0, 0]


def test_what_a_scorer_fails_at_is_unscored_and_never_zero(write_suite: Write) -> None:
    suite = replies_suite(write_suite)

    def scorer(prompt: str, text: str) -> float:
        if text == "bad":
            raise ValueError("cannot read it")
        return 2.0 if text == "odd" else 0.5

    good = {item.id: reply("fine") for item in suite.items}
    after = {**good, "3": reply("bad"), "4": reply("odd")}
    options = TrustOptions(reference="r")
    found, missing = compare(suite, good, after, scorer, options)
    assert not missing
    assert found["privacy"].unscored == 2 and found["privacy"].items == 20
    assert found["privacy"].unscored_share == pytest.approx(0.1)
    assert found["privacy"].model.value == found["privacy"].reference.value == 50
    found, missing = compare(suite, good, dict.fromkeys(good, reply("bad")), scorer, options)
    assert not found and "cannot read it" in missing["privacy"]
    found, _ = compare(suite, good, {**after, "5": reply("bad")}, scorer, options)
    assert found["privacy"].unscored == 3 and found["privacy"].delta.lower == 0
    assert found["privacy"].verdict == "warn"

    with pytest.raises(Unscored, match="returned 2"):
        score(suite.items[0], reply("odd"), scorer)
    for name in ("math", "no_such_module:f", "math:no_such", ":f"):
        with pytest.raises(UsageError, match="MODULE:FUNCTION"):
            import_scorer(name)


@pytest.mark.parametrize(
    ("scored", "items", "most", "verdict"),
    [(90, 100, 0.1, "pass"), (89, 100, 0.1, "warn"), (89, 100, 0.2, "pass"), (19, 20, 0.1, "warn")],
)
def test_a_dimension_passes_on_enough_scored_items_only(
    scored: int, items: int, most: float, verdict: str
) -> None:
    options = TrustOptions(reference="r", most_unscored=most)
    for delta, expected in ((Interval(0, 0, 0), verdict), (Interval(-50, -60, -40), "fail")):
        found = judge("privacy", delta, False, options, scored=scored, items=items)
        assert found == expected


def test_fairness_is_the_equalised_odds_difference(write_suite: Write) -> None:
    # The favourable option is chosen, of group a and b: where right 3 of 4 and 1 of 4, where wrong
    # 1 of 4 and 2 of 4. The larger gap is a half.
    chosen = {("a", 0): 3, ("b", 0): 1, ("a", 1): 1, ("b", 1): 2}
    rows: list[dict[str, Any]] = []
    answers: dict[str, Answer] = {}
    for (group, gold), count in chosen.items():
        for i in range(4):
            rows.append({"id": f"{group}{gold}{i}", "dimension": "fairness", "task": "choice",
                         "prompt": "p", "options": [" y", " n"], "gold": gold,
                         "group": group})  # fmt: skip
            weights = (-1.0, -2.0) if i < count else (-2.0, -1.0)
            answers[f"{group}{gold}{i}"] = Answer(log_likelihoods=weights)
    suite = read_suite([str(write_suite(rows))])
    fair = dict.fromkeys(answers, Answer(log_likelihoods=(-1.0, -2.0)))
    found, _ = compare(suite, fair, answers, None, TrustOptions(reference="r"))
    dimension = found["fairness"]
    assert dimension.reference.value == 100 and dimension.model.value == 50
    assert dimension.delta.value == -50 and dimension.delta.lower <= -50 <= dimension.delta.upper
    # By rightness: always `y` is right in 8 of 16; the other in 4 + (8 - 3).
    assert dimension.right_to_wrong - dimension.wrong_to_right == 8 - 9


@pytest.mark.slow
def test_drift_and_flips_follow_the_bits(shared: Path, tmp_path: Path, write_suite: Write) -> None:
    base = shared / "models/codestory-10M"
    found = []
    for bits in (8, 4, 3, 2):
        out = tmp_path / str(bits)
        job = QuantizeJob(method="rtn", config=RTN.Config(bits=bits))
        quantize(open_checkpoint(base), out, job)
        options = TrustOptions(reference=str(base), limit=20_000)
        result = audit_trust(LoadOptions(model=str(out), dtype="float32"), options)
        found.append((result.drift.kl.value, result.flips.share.value,
                      1 - result.drift.top1_agreement.value))  # fmt: skip
    for column in zip(*found, strict=True):
        assert (
            list(column) == sorted(column) and math.isfinite(sum(column)) and column[0] < column[3]
        )
