"""Distillation of a decoder-only model into an encoder-decoder: its equations and its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.headers import TRAINING
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.distill.data.samples import Sample
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.cross import Cross, make_pair, read_targets, read_teacher
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model

Checkpoints = Callable[..., Path]
PAIRS = [
    Sample([5, 6, 7, 8, 9, 11], [False] * 4 + [True] * 2, given=4),
    Sample([12, 13, 14, 15, 16, 17, 18, 19, 20], [False] * 2 + [True] * 7, given=2),
    Sample([3, 4, 2], [False, True, True], given=1),
]


def objective_of(source: Path, pairs: list[Sample] = PAIRS, **options: Any) -> Cross:
    opened = open_checkpoint(source)
    task = WeightTask(
        name="cross", model=load_model(opened, dtype=torch.float32), source=opened,
        architecture=Architecture(opened),
        texts=TextBatches(pairs, lambda _: [list(range(len(pairs)))], [pairs], 32),
        device=torch.device("cpu"), seed=0, record={},
    )  # fmt: skip
    sizes = {"width": 32, "encoder_layers": 2, "decoder_layers": 1}
    objective = Cross(task, Cross.Config(**sizes, **options))
    # Pairs are given as they are to be read.
    for mine in (objective.task.texts.samples, *objective.task.texts.held_out):
        assert isinstance(mine, list)
        mine[:] = pairs
    return objective


@torch.no_grad()
def slow_means(objective: Cross) -> tuple[float, float]:
    """Return the means of -log p and KL, pair by pair without padding, from the definition."""
    nats, divergences = [], []
    start = objective.student_config.decoder_start_token_id
    student: Any = objective.module
    for pair in PAIRS:
        source, target = pair.tokens[: pair.given], pair.tokens[pair.given :]
        logp = (
            student(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([[start, *target[:-1]]]),
            )
            .logits[0]
            .log_softmax(-1)
        )
        for at, token in enumerate(target):
            # The teacher has read the source and the target's tokens before this one.
            ids = torch.tensor([source + target[:at]])
            other = objective.task.model(ids).logits[0, -1].log_softmax(-1)
            nats.append(-float(logp[at, token]))
            divergences.append(float((other.exp() * (other - logp[at])).sum()))
    return sum(nats) / len(nats), sum(divergences) / len(divergences)


@pytest.mark.parametrize("student", ["t5", "bart"])
def test_the_loss_is_that_of_the_equations(checkpoint: Checkpoints, student: str) -> None:
    objective = objective_of(checkpoint("llama"), student=student, alpha=0.7)
    objective.begin()
    nats, kl = slow_means(objective)
    found = objective.accumulate(0)
    assert found["loss"] == pytest.approx(0.7 * kl + 0.3 * nats, rel=1e-4)
    measured = objective.evaluate()
    assert measured["kl"] == pytest.approx(kl, rel=1e-4)
    assert measured["score"] == pytest.approx(-found["loss"], rel=1e-4)
    student_grads = [p.grad for p in objective.module.parameters()]
    assert any(g is not None and g.any() for g in student_grads)
    assert all(p.grad is None for p in objective.task.model.parameters())


def test_without_a_teacher_the_loss_is_that_of_transformers(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(checkpoint("llama"), PAIRS[:1], alpha=0)
    monkeypatch.setattr(objective.task.model, "forward", None)
    nats, kl = objective.losses(PAIRS[:1])
    pair = PAIRS[0]
    student: Any = objective.module
    done = student(
        input_ids=torch.tensor([pair.tokens[:4]]), labels=torch.tensor([pair.tokens[4:]])
    )
    assert kl is None and float(nats.detach()) == pytest.approx(float(done.loss.detach()), rel=1e-5)


def test_logits_are_aligned_and_padding_changes_nothing(checkpoint: Checkpoints) -> None:
    objective = objective_of(checkpoint("llama"))
    teacher, student = objective.task.model, objective.module

    def read(pairs: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        sources = [each.tokens[: each.given] for each in pairs]
        return read_teacher(teacher, pairs), read_targets(student, sources, pairs, 0)

    batched = read(PAIRS)
    alone = [torch.cat(parts) for parts in zip(*(read([each]) for each in PAIRS), strict=True)]
    for together, single in zip(batched, alone, strict=True):
        torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        whole = teacher(torch.tensor([PAIRS[0].tokens])).logits[0, 3:5]
    torch.testing.assert_close(batched[0][:2], whole, atol=1e-4, rtol=1e-4)


def test_a_start_token_that_prompts_have_not_is_no_source(checkpoint: Checkpoints) -> None:
    pair = Sample([0, 6, 7, 8, 9, 11], [False] * 4 + [True] * 2, given=4)
    objective = objective_of(checkpoint("llama"), [pair], alpha=0)
    nats, _ = objective.losses([pair])
    student: Any = objective.module
    done = student(input_ids=torch.tensor([[6, 7, 8]]), labels=torch.tensor([[9, 11]]))
    assert float(nats.detach()) == pytest.approx(float(done.loss.detach()), rel=1e-5)


def test_texts_become_pairs() -> None:
    question = Sample([0, 5, 6, 7, 8], [False, False, False, True, True])
    assert make_pair(question, 1, 9, 0).tokens == [0, 5, 6, 7, 8, 1]
    assert make_pair(question, 1, 9, 0).given == 3
    assert make_pair(question, 1, 5, 0).tokens == question.tokens, "cut at the end"
    assert make_pair(question, 8, 9, 0).tokens == question.tokens, "ended already"
    turns = Sample([0, 5, 6, 7, 8, 9], [False, True, False, False, True, True])
    assert make_pair(turns, None, 9, 0).given == 4
    asked_again = Sample([0, 5, 6, 7, 8, 9], [False, False, True, True, False, False])
    assert make_pair(asked_again, 1, 6, 0) == Sample([0, 5, 6, 7, 1], [False] * 2 + [True] * 3, 2)
    short = Sample([5, 6, 7, 8], [False, True, True, True])
    assert make_pair(short, 1, 9, None) == Sample([5, 6, 7, 8, 1], [False] + [True] * 4, 1)
    plain = Sample([0, 5, 6, 7, 8], [False, True, True, True, True])
    halves = Sample(plain.tokens, [False, False, True, True, True], given=2)
    assert make_pair(plain, 1, 9, 0) == halves


@pytest.mark.parametrize("student", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_the_command_writes_what_transformers_and_spectool_decode(
    checkpoint: Checkpoints, tmp_path: Path, student: str
) -> None:
    source, out, data = checkpoint("llama"), tmp_path / "out", tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"take {i} and {i + 1} in a row ",
            "completion": f"first {i}; then {i + 1}: {i}-{i + 1}, {i + 2}.",
        }
        for i in range(100, 160)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["distill", "cross", source, out, "--data", data, "--student", student, "--width", 32]
    words += ["--encoder-layers", 2, "--decoder-layers", 1, "--steps", 30, "--learning-rate", 0.01]
    words += ["--batch-tokens", 512, "--metrics", tmp_path / "metrics.jsonl", "--alpha", 0.5]
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["best"]["perplexity"] < 0.5 * found["initial"]["perplexity"]
    assert found["draft"] == "copy" and "plan: cross (student=" in done.stderr
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.config.model_type == student
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    again = dict(objective_of(source, student=student).module.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(again)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    (result,) = spectool.generate(out, [rows[0]["prompt"]], draft="copy", max_new_tokens=12)
    assert result.token_ids == expected
    record = json.loads((out / TRAINING).read_text())
    assert record["method"] == "cross" and record["best"] == found["best"]
    shown = CliRunner().invoke(app, ["inspect", str(out), "--checksums"])
    assert shown.exit_code == 0 and f"dense {student}" in shown.stdout
    assert "spectool distill cross" in shown.stdout


def test_what_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--width 40: expected a multiple of 32"):
        Cross.Config(width=40)
    data = tmp_path / "text.txt"
    data.write_text("some text to read and to write again\n" * 40)
    words = ["distill", "cross", checkpoint("llama"), tmp_path / "out", "--data", data]
    done = CliRunner().invoke(app, [*map(str, words), "--teacher", str(checkpoint("llama"))])
    assert done.exit_code == 2 and "--teacher: cross learns from" in done.stderr
    assert not (tmp_path / "out").exists()
