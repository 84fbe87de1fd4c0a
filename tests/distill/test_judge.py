"""Judge head: labels and decoding against slow references, fit, threshold, files, the command."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.control.bias import LogitBias
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.heads.judge import JudgeHead, open_judge
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.substitutions import Labelled, Labeller, Question, Rule, read_questions
from spectool.distill.objectives.judge import find_threshold, fit, fit_head, rank
from spectool.distill.train_judge import JudgeJob, JudgeReport, train_judge
from spectool.errors import CheckpointError, TextError, UsageError
from spectool.report import SILENT

from ..conftest import contents, tokenizer
from ..stopping import stopped

Checkpoints = Callable[..., Path]
PROMPTS = [[5, 6, 7], [9, 8], [40, 41, 42, 43]]
LENGTH = 10
# Any letter may end a reply of a random model: some substitutions change the last, others do not.
RULE = Rule(re.compile("[a-zA-Z]"), LENGTH)


def last_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    return logits


def state_at(model: Any, tokens: Sequence[int], position: int) -> Tensor:
    """Return the state [D] after the final norm at a position, by a pass of its own."""
    done = model(torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
    state: Tensor = done.hidden_states[-1][0, position]
    return state


def greedily(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """Continue a text by its most likely tokens, up to an end token (1)."""
    found = list(tokens)
    for _ in range(count):
        if found[-1] == 1:
            break
        found.append(int(last_logits(model, found).argmax()))
    return found


@torch.no_grad()
def walk_slowly(target: Any, draft: Any, prompt: list[int]) -> tuple[list[Tensor], list[bool]]:
    """Label the substitutions of one prompt as the module's docstring says, token by token."""
    text_of = tokenizer()

    def answer(text: list[int]) -> str | None:
        reply = [token for token in text[len(prompt) :] if token != 1]
        found = re.findall("[a-zA-Z]", text_of.decode(reply, skip_special_tokens=True))
        return found[-1] if found else None

    end = len(prompt) + LENGTH
    text = greedily(target, prompt, LENGTH)
    wanted, states, important = answer(text), [], list[bool]()
    at = len(prompt)
    while wanted is not None and at < len(text):
        token = int(last_logits(draft, text[:at]).argmax())
        if token != text[at]:
            begun = [*text[:at], token]
            states.append(torch.cat([state_at(each, begun, at) for each in (draft, target)]))
            changed = greedily(target, begun, end - len(begun))
            important.append(answer(changed) != wanted)
            text = text if important[-1] else changed
        at += 1
    return states, important


def test_labels_and_states_are_those_of_a_slow_walk(tiny: Any) -> None:
    target, draft = tiny("llama"), tiny("llama", 1)
    runner = Runner(target, tokenizer=tokenizer())
    questions = [Question(prompt, frozenset(), "x") for prompt in [*PROMPTS, [17, 3]]]
    labelled = Labeller(runner, AttentionTarget(draft), RULE)(questions)
    seen = set[bool]()
    for question, found in zip(questions, labelled, strict=True):
        states, important = walk_slowly(target, draft, question.tokens)
        assert found.important_R.tolist() == important
        assert len(states) == len(found.state_RD)
        for state_D, expected_D in zip(found.state_RD, states, strict=True):
            torch.testing.assert_close(state_D, expected_D, atol=1e-4, rtol=1e-4)
        seen.update(important)
    assert seen == {True, False}
    # The target itself never prefers another token.
    none = Labeller(runner, AttentionTarget(target), RULE)(questions)
    assert not any(len(found.important_R) for found in none)


def make_head(width: int, threshold: float, seed: int = 3) -> JudgeHead:
    torch.manual_seed(seed)
    head = JudgeHead(width, threshold)
    with torch.no_grad():
        head.judge.weight.normal_(std=0.4)
        head.mean.normal_(std=0.3)
        head.std.uniform_(0.5, 2)
    return head.requires_grad_(False)


def judged_runner(model: Any, draft: Any, head: JudgeHead, **options: Any) -> Runner:
    runner = Runner(model)
    config = DraftModelDrafter.Config(depth=4)
    drafter = DraftModelDrafter(draft, config, target=runner.target)
    drafter.set_judge(head)
    runner.use(drafter)
    return runner


@torch.no_grad()
def decode_slowly(
    target: Any, draft: Any, head: JudgeHead, prompt: list[int], *, off: int = 0
) -> list[int]:
    """Decode as the rule says: the longest prefix of accepted tokens, then one of the target.

    `off`: how many rows before its own a token's states are read.
    """
    text = [*prompt, int(last_logits(target, prompt).argmax())]
    end = len(prompt) + 12
    while len(text) < end:
        chain = greedily(draft, text, min(4, end - len(text) - 1))
        for at in range(len(text), len(chain)):
            own = int(last_logits(target, chain[:at]).argmax())
            states = [state_at(each, chain, at - off)[None] for each in (draft, target)]
            if chain[at] != own and float(head.probs(*states)) >= head.threshold:
                chain = chain[:at]
                break
        text = [*chain, int(last_logits(target, chain).argmax())]
    return text[len(prompt) : len(prompt) + 12]


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_decoding_is_that_of_the_rule_with_the_states_of_the_tokens_own_row(
    tiny: Any, endless: Any, family: str
) -> None:
    target, draft = endless(tiny(family)), tiny(family, 1)
    head = make_head(64, 0.5)
    runner = judged_runner(target, draft, head)
    results = runner.generate(PROMPTS, max_new_tokens=12, batch_size=2, lossy=True)
    expected = [decode_slowly(target, draft, head, prompt) for prompt in PROMPTS]
    assert [result.token_ids for result in results] == expected
    assert not any(result.lossless for result in results)
    assert any(result.accepted for result in results)
    # The judge accepts something, and a head that is one row off writes another text.
    plain = [greedily(target, prompt, 12)[len(prompt) :] for prompt in PROMPTS]
    off = [decode_slowly(target, draft, head, prompt, off=1) for prompt in PROMPTS]
    for other in (plain, off):
        assert sum(a != b for a, b in zip(expected, other, strict=True)) >= 2


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        pytest.param({"temperature": 0.7, "verify": "token-match"}, marks=pytest.mark.slow),
    ],
)
def test_threshold_0_is_the_verifier_alone(
    tiny: Any, endless: Any, sampling: dict[str, Any]
) -> None:
    target, draft = endless(tiny("llama")), tiny("llama", 1)
    runner = judged_runner(target, draft, make_head(64, 0.0))
    standard = Runner(target)
    standard.use(
        DraftModelDrafter(draft, DraftModelDrafter.Config(depth=4), target=standard.target)
    )
    given = {"max_new_tokens": 12, "batch_size": 2, "seed": 4, **sampling}
    judged, expected = (
        [(each.token_ids, each.accepted) for each in one.generate(PROMPTS, **more, **given)]
        for one, more in ((runner, {"lossy": True}), (standard, {}))
    )
    assert judged == expected


def test_equal_drafts_change_nothing_and_bans_hold(tiny: Any, endless: Any) -> None:
    target = endless(tiny("llama"))
    everything = make_head(64, 1.0)
    plain = Runner(target).generate(PROMPTS, max_new_tokens=12)
    same = judged_runner(target, tiny("llama"), everything)
    results = same.generate(PROMPTS, max_new_tokens=12, lossy=True, batch_size=2)
    assert [each.token_ids for each in results] == [each.token_ids for each in plain]
    other = judged_runner(target, tiny("llama", 1), everything)
    (free,) = other.generate(PROMPTS[:1], max_new_tokens=12, lossy=True)
    control = LogitBias(dict.fromkeys(free.token_ids[1:6], -math.inf))
    (banned,) = other.generate(PROMPTS[:1], max_new_tokens=12, lossy=True, controls=[[control]])
    assert banned.accepted and not {*free.token_ids[1:6]} & {*banned.token_ids}
    with pytest.raises(UsageError, match="the judge head accepts tokens that the target would not"):
        other.generate(PROMPTS, max_new_tokens=4)


def test_the_fit_is_a_minimum_and_ranks_by_the_equations() -> None:
    torch.manual_seed(0)
    state_RD = torch.randn(60, 5) * torch.tensor([1.0, 3.0, 0.1, 1.0, 0.0]) + 2
    important_R = (state_RD[:, 0] + 0.5 * torch.randn(60)) > 2.6
    head, _ = fit(state_RD, important_R, 0.1)
    x_RD = ((state_RD.double() - state_RD.double().mean(0)) /
            torch.tensor([*state_RD.double().std(0, correction=0)[:4], 1.0]))  # fmt: skip
    w_D = head.judge.weight[0].double().requires_grad_()
    b = head.judge.bias.double().requires_grad_()
    total = w_D.square().sum() / 2
    for x_D, label in zip(x_RD, important_R, strict=True):
        y = 1 if label else -1
        weight = 60 / (2 * float((important_R == label).sum()))
        total = total + 0.1 * weight * torch.log(1 + torch.exp(-y * (w_D @ x_D + b[0])))
    total.backward()  # type: ignore[no-untyped-call]
    assert w_D.grad is not None and b.grad is not None
    assert float(w_D.grad.abs().max()) < 1e-4 and float(b.grad.abs()) < 1e-4
    assert float(head.judge.weight[0, 4]) == 0
    score_R = head(state_RD).round(decimals=1)
    pairs = [
        0.5 * (float(above >= below) + float(above > below))
        for above in score_R[important_R]
        for below in score_R[~important_R]
    ]
    assert rank(score_R, important_R) == pytest.approx(sum(pairs) / len(pairs))
    assert 0.7 < rank(score_R, important_R) < 1


@pytest.mark.parametrize("recall", [0.0, 0.25, 0.5, 0.74, 0.9, 1.0])
@pytest.mark.parametrize("gap", [0.0, 0.4, -2.0])
def test_the_threshold_catches_enough_and_accepts_the_most(recall: float, gap: float) -> None:
    torch.manual_seed(1)
    important_R = torch.rand(40) < 0.4
    prob_R = (0.5 * torch.rand(40) + gap * important_R).clamp(0, 1)
    prob_R[torch.nonzero(important_R)[:3]] = 0.25 + max(gap, 0)
    found = find_threshold(prob_R, important_R, recall)
    best = (0.0, 0.0)
    for threshold in [0.0, *prob_R[important_R].tolist(), 1.0]:
        caught = float((prob_R[important_R] >= threshold).float().mean())
        accepted = float((prob_R[~important_R] < threshold).float().mean())
        if caught >= recall - 1e-6:
            best = max(best, (accepted, caught))
    assert (found["accepted"], found["recall"]) == pytest.approx(best)


def test_what_cannot_be_learnt_is_refused() -> None:
    def labelled(*important: bool) -> Labelled:
        return Labelled(torch.randn(len(important), 4), torch.tensor(important), True)

    config = JudgeHead.Config()
    both = [labelled(True, False, True), labelled(False)]
    fit_head(both, both, config)
    with pytest.raises(TextError, match="2 different tokens changes the answer of a held-out"):
        fit_head(both, [labelled(False, False)], config)
    with pytest.raises(TextError, match="1 different tokens keeps the answer of a training"):
        fit_head([labelled(True)], both, config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"prompt": f"def run{i}(", "answer": "The letter x"} for i in range(30)]
    # A repeated prompt is one prompt, or it could be on both sides of the split.
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:9]]))
    return str(path)


def train(
    source: Path, draft: Path, out: Path, data: str, where: Any = None, **asked: Any
) -> JudgeReport:
    given: dict[str, Any] = {"answer": "[a-zA-Z]", "max_new_tokens": 6, "held_out": 6, **asked}
    job = JudgeJob(config=JudgeHead.Config(), draft_model=str(draft), data=(data,), **given)
    return train_judge(open_checkpoint(source), out, job, **(where or {}))


def test_rows_are_read_with_their_answers(data: str, tmp_path: Path) -> None:
    def read(path: str, answer: str = "letter (.)") -> list[Question]:
        job = JudgeJob(config=JudgeHead.Config(), draft_model="", data=(path,), answer=answer)
        return read_questions(job, Rule.of(job), tokenizer(), SILENT)

    found = read(data)
    assert len(found) == 30 and {each.answer for each in found} == {"x"}
    assert found[7].tokens == tokenizer()("def run7(")["input_ids"]
    # Without a match the whole answer is the right one.
    assert read(data, "#### (.*)")[0].answer == "The letter x"
    assert Rule(re.compile("#### (.*)"), 1).find("1 #### 2\n#### 3 ") == "3"
    assert Rule(re.compile(r"is (\d+)|= (\d+)"), 1).find("it is 2, so x = 3") == "3"
    for row, message in (
        ({"prompt": "a"}, "prompt 1 has no answer"),
        ({"prompt": "a", "answer": 5}, "prompt 1 has no answer"),
        ({"prompt": "a", "answer": "b"}, "1 different prompts; at least 2 are needed"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row))
        with pytest.raises(TextError, match=message):
            read(str(path))


def test_no_prompt_is_on_both_sides_and_a_stopped_run_goes_on_to_the_same_bytes(
    checkpoint: Checkpoints, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, draft = checkpoint("llama"), checkpoint("llama", seed=1)
    sides: list[list[Question]] = []
    original = Labeller.__call__

    def noting(self: Labeller, questions: Sequence[Question]) -> list[Labelled]:
        sides.append(list(questions))
        return original(self, questions)

    monkeypatch.setattr("spectool.distill.data.texts._GROUP", 12)
    monkeypatch.setattr(Labeller, "__call__", noting)
    train(source, draft, tmp_path / "whole", data)
    assert [len(side) for side in sides] == [12, 12, 6]
    assert len({tuple(each.tokens) for side in sides for each in side}) == 30
    where = {"metrics": tmp_path / "metrics.jsonl"}
    with stopped(Labeller, "__call__", after=2):
        train(source, draft, tmp_path / "out", data, where)
    with pytest.raises(UsageError, match="another answer"):
        train(source, draft, tmp_path / "out", data, answer="[a-z]")
    sides.clear()
    train(source, draft, tmp_path / "out", data, where)
    assert [len(side) for side in sides] == [6]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    lines = [json.loads(line) for line in where["metrics"].read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == [*range(1, 7)] and lines[0]["C"] == 1e-5


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_and_what_its_result_is_for(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    source, draft, out = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "head"
    words = ["train-heads", "judge", source, out, "--draft-model", draft, "--data", data]
    words += ["--answer", "[a-zA-Z]", "--max-new-tokens", 6, "--held-out", 6, "--recall", 0.8]
    done = run(*words, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["lossless"] and "plan: judge (recall=0.8" in done.stderr
    assert found["held_out_prompts"]["standard"]["accuracy"] <= 1
    chosen = next(row for row in found["curve"] if row["threshold"] == found["threshold"])
    assert chosen["recall"] >= 0.8
    for shown in (done.stderr, run("inspect", out).stdout):
        assert "decoding  accuracy  accepted of a chain" in shown and "<- used" in shown
    assert set(load_file(out / HEADS_FILE)) == {"judge.weight", "judge.bias", "mean", "std"}

    asked = ["generate", source, "--prompt", "def run(", "--max-new-tokens", 9]
    judged = ["--draft", f"{draft}:judge={out},judge_threshold=1,depth=8"]
    done = run(*asked, *judged, "--lossy")
    assert done.exit_code == 0 and "drafter draft_model, lossy" in done.stderr, done.stderr
    lossy = json.loads(run(*asked, *judged, "--lossy", "--json").stdout)
    assert not lossy["lossless"] and lossy["results"][0]["accepted"]
    for wrong, message in (
        (judged[1], "the judge head accepts tokens that the target would not choose"),
        (f"{draft}:judge={out},tree=iid", "the head takes chains, not tree=iid"),
        (f"{draft}:judge_threshold=0.5", "judge_threshold is the threshold of a head"),
        (f"{draft}:acceptance={out}", "holds judge heads, no acceptance head"),
        (f"{source}:judge={out}", "was trained for another draft model than"),
        (f"{out}", "its judge head drafts nothing itself"),
    ):
        done = run(*asked, "--draft", wrong)
        assert done.exit_code == 2 and done.stderr.count("error:") == 1, (wrong, done.stderr)
        assert message in done.stderr, (wrong, done.stderr)
    for option, message in (
        (["--answer", "["], "no regular expression"),
        (["--answer", "a{9999999999999999}"], "no regular expression"),
        (["--answer", r"\d*"], "matches an empty text"),
        (["--answer", "no such answer"], "nothing can be learnt"),
        (["--max-new-tokens", 255], "are more than the context of 256"),
    ):
        done = run(*[tmp_path / "new" if w == out else w for w in words], *option)
        assert done.exit_code == 2 and done.stderr.count("error:") == 1, done.stderr
        assert message in done.stderr and not list(tmp_path.glob("new*"))


@pytest.mark.slow
def test_the_command_that_inspect_prints_gives_the_same_bytes(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    source, draft, out = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "head"
    train(source, draft, out, data)
    again = json.loads(run("inspect", out, "--json").stdout)["command"]
    places = {"MODEL": source, "OUT": tmp_path / "again", "DATA": data, "DRAFT": draft}
    done = run(*[places.get(w, w) for w in shlex.split(again)[1:]])
    assert done.exit_code == 0, done.stderr
    assert contents(tmp_path / "again") == contents(out)


def test_files_that_do_not_fit_are_refused(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    source, draft, out = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "head"
    report = train(source, draft, out, data)
    target, drafting = Runner(source).target, Runner(draft).target

    def opened(path: Path, to: Any = target, **options: Any) -> JudgeHead:
        options = {"allow_other_target": False, **options}
        return open_judge(path, draft=drafting, target=to, tokenizer=None, **options)

    assert opened(out).threshold == report.found["threshold"]
    runner = Runner(target, draft=f"{draft}:judge={out},tune", tune=True)
    # The text would depend on time.
    assert runner.drafter.policies == [] and not runner.is_tuned
    with pytest.raises(CheckpointError, match="trained for another checkpoint than"):
        opened(out, drafting)
    opened(out, drafting, allow_other_target=True)
    tensors = load_file(out / HEADS_FILE)
    for number, (change, message) in enumerate((
        ({"mean": torch.full((64,), math.nan)}, "NaN or infinite"),
        ({"judge.bias": torch.zeros(2)}, "are not those of its options"),
    )):  # fmt: skip
        damaged = Path(shutil.copytree(out, tmp_path / f"damaged-{number}"))
        save_file({**tensors, **change}, damaged / HEADS_FILE)
        with pytest.raises(CheckpointError, match=message):
            opened(damaged, checksums=False)
    record = json.loads((out / HEADS).read_text())
    record["training"]["threshold"] = "high"
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    (damaged / HEADS).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="its threshold is high, expected 0 to 1"):
        opened(damaged)
