"""Lexical unit distillation: units, the loss against a pass for each unit, and what it changes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from typer.testing import CliRunner

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import TRAINING
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.distill.data.samples import Sample
from spectool.distill.data.units import (
    UnitText,
    as_tensors,
    as_units,
    find_units,
    most_placeholders,
)
from spectool.distill.objectives import base, lexical_units
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.lexical_units import LexicalUnits, choose_placeholder, mine
from spectool.distill.train_weights import WeightsJob, WeightsReport, train_weights
from spectool.errors import TextError, UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model

from ..conftest import contents
from ..stopping import count, stopped

Checkpoints = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate a training four times, which takes longer than its steps."""
    monkeypatch.setattr(base, "_NUM_EVALUATIONS", 4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def run(path: Path) -> None:\n    return path\n" * 60)
    return path


def make_objective(path: Path, **options: Any) -> LexicalUnits:
    source = open_checkpoint(path)
    task = WeightTask(
        name="lexical-units", model=load_model(source, dtype=torch.float32), source=source,
        architecture=Architecture(source), texts=TextBatches([], lambda _: [], [], 64),
        device=CPU, seed=0, record={},
    )  # fmt: skip
    return LexicalUnits(task, LexicalUnits.Config(**options))


def test_runs_are_cut_into_units_from_their_start() -> None:
    marks = "0 11 0 1 00 11111 0 1111111 0"
    sure = [mark == "1" for mark in marks.replace(" ", "")]
    # Of seven sure tokens the last one is alone; so is the fourth token of the text.
    assert find_units(sure, 3) == [(1, 2), (7, 3), (10, 2), (13, 3), (16, 3)]
    assert find_units([True] * 3, 64) == [(0, 3)]
    assert find_units([], 4) == [] == find_units([False, True], 4)


@pytest.mark.parametrize("longest", [2, 3, 4])
def test_no_text_has_more_placeholders_than_there_is_room_for(longest: int) -> None:
    for length in range(14):
        units = find_units([False] * (length > 0) + [True] * (length - 1), longest)
        placed = sum(size - 1 for _, size in units)
        assert placed == most_placeholders(length, longest)


def test_units_come_back_from_tensors() -> None:
    found = [[(3, 2), (9, 4)], [], [(1, 3)]]
    assert as_units(as_tensors(found)) == found
    assert as_units(as_tensors([[], []])) == [[], []]


def test_mined_tokens_are_in_the_loss_and_likelier_than_alpha(checkpoint: Checkpoints) -> None:
    model, rng = (
        load_model(open_checkpoint(checkpoint("llama")), dtype=torch.float32),
        random.Random(0),
    )
    samples = []
    for length in (30, 9):
        tokens = [rng.randrange(320)]
        while len(tokens) < length:
            # Mostly what the model finds likeliest.
            best = int(logits_after(model, tokens).argmax())
            tokens.append(best if rng.random() < 0.8 else rng.randrange(320))
        samples.append(Sample(tokens, [rng.random() < 0.9 for _ in tokens]))
    probs = [
        [0.0]
        + [
            float(logits_after(model, s.tokens[:at]).softmax(-1)[s.tokens[at]])
            for at in range(1, len(s.tokens))
        ]
        for s in samples
    ]
    alpha = sorted(probs[0])[15]
    found = mine(model, samples, alpha=alpha * 1.001, longest=3, device=CPU)
    assert found == [
        find_units([p > alpha * 1.001 and m for p, m in zip(row, s.loss_mask, strict=True)], 3)
        for row, s in zip(probs, samples, strict=True)
    ]
    assert len(found[0]) > 2


@torch.no_grad()
def logits_after(model: Any, ids: list[int]) -> Tensor:
    """Return the logits [V] after a text, by a pass of its own."""
    last: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return last


def losses_by_definition(
    model: Any, texts: list[UnitText], placeholder: int
) -> tuple[Tensor, Tensor]:
    """Return both terms of the loss by a pass for every unit, and one for every text."""
    in_units, in_text = [], []
    for text in texts:
        for start, size in text.units:
            ids = [*text.tokens[:start], *[placeholder] * (size - 1)]
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 :]
            labels = torch.tensor(text.tokens[start : start + size])
            in_units.append(F.cross_entropy(logits, labels, reduction="none"))
        logits = model(torch.tensor([text.tokens]), use_cache=False).logits[0, :-1]
        nats = F.cross_entropy(logits, torch.tensor(text.tokens[1:]), reduction="none")
        in_text.append(nats[torch.tensor(text.loss_mask[1:])])
    return torch.cat(in_units).mean(), torch.cat(in_text).mean()


@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "qwen3", "gpt2"))],
)
def test_loss_and_gradient_are_those_of_a_pass_for_each_unit(
    checkpoint: Checkpoints, family: str
) -> None:
    """Texts of different lengths in one batch, one without a unit, units side by side."""
    objective = make_objective(checkpoint(family), longest=5, placeholder=11)
    rng, texts = random.Random(1), []
    for length, units in (
        (24, [(1, 2), (3, 5), (8, 3), (20, 4)]),
        (7, []),
        (30, [(12, 5), (25, 5)]),
    ):
        tokens = [rng.randrange(320) for _ in range(length)]
        texts.append(UnitText(tokens, [rng.random() < 0.8 for _ in tokens], units))
    objective.module.eval()
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    results = []
    for losses in (
        objective.row_losses(texts),
        losses_by_definition(objective.module, texts, objective.placeholder),
    ):
        objective.module.zero_grad()
        torch.autograd.backward(losses[0] + 0.7 * losses[1])
        results.append((losses, [p.grad.clone() for p in parameters if p.grad is not None]))
    (found, found_grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert len(found_grads) == len(wanted_grads) == len(parameters)
    for ours, theirs in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    # A step in which no text has a unit.
    assert objective.row_losses(texts[1:2])[0] == 0


def test_the_row_of_the_padding_token_learns(checkpoint: Checkpoints) -> None:
    """torch gives it no gradient, which would leave a placeholder as it is, often zero."""
    objective = make_objective(checkpoint("llama", pad_token_id=5))
    assert objective.placeholder == 5
    tokens = list(range(20, 40))
    units, _ = objective.row_losses([UnitText(tokens, [True] * 20, [(4, 3)])])
    units.backward()
    table: Any = objective.task.model.get_input_embeddings()
    assert table.weight.grad[5].abs().max() > 0


def test_placeholders_are_padding_or_an_end_by_default(tiny: Callable[..., Any]) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.config.pad_token_id, model.config.eos_token_id = 5, [9, 2]
    assert choose_placeholder(model, None) == 5 and choose_placeholder(model, 0) == 0
    model.config.pad_token_id = None
    assert choose_placeholder(model, None) == 9
    model.config.eos_token_id = None
    with pytest.raises(UsageError, match="has no padding token"):
        choose_placeholder(model, None)
    with pytest.raises(UsageError, match="has 320 tokens, not 320"):
        choose_placeholder(model, 320)


def train(source: Path, out: Path, data: Path, **asked: Any) -> WeightsReport:
    own = {"alpha": 0.0, "beta": 0.05, "loss_limit": 9.0, **asked.pop("own", {})}
    options = {
        "steps": 30, "seq_len": 64, "batch_tokens": 512, "held_out": 3, "learning_rate": 1e-2,
        **asked,
    }  # fmt: skip
    job = WeightsJob(
        method="lexical-units", config=LexicalUnits.Config(**own), data=(str(data),), **options
    )
    report = train_weights(open_checkpoint(source), out, job)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {"placeholder": 7, "longest": 3}),
        pytest.param("qwen3", {}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"lora": 8}, marks=pytest.mark.slow),
    ],
)
def test_guesses_come_true_and_the_text_is_that_of_plain_decoding(
    checkpoint: Checkpoints, tmp_path: Path, text: Path, family: str, own: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    rate = 3e-2 if "lora" in own else 1e-2
    report = train(checkpoint(family), out, text, own=own, learning_rate=rate)
    assert report.best["tokens_per_forward"] > 1.1 * report.initial["tokens_per_forward"]
    assert report.best["threshold_tokens_per_forward"] > 1
    record = json.loads((out / TRAINING).read_text())
    units = record["units"]
    assert (units["alpha"], units["beta"], units["longest"]) == (0, 0.05, own.get("longest", 4))
    draft = "units:longest={longest},placeholder={placeholder}".format(**units)
    assert record["draft"] == report.draft == draft
    assert record["best"] == report.best
    prompts = ["def run(", "return path", "None:\n"]
    runner = Runner(out, dtype=torch.float32)
    plain = runner.generate(prompts, max_new_tokens=40)
    for given in ("units", draft):
        runner.use(given)
        drafted = runner.generate(prompts, max_new_tokens=40, batch_size=3)
        assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
        assert sum(r.forwards for r in drafted) < 0.9 * sum(r.forwards for r in plain)
    # Any tool reads the checkpoint.
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([runner.target.model.config.bos_token_id or 1, 5, 6])[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, runner.target.model(ids).logits)


def test_mined_units_are_not_mined_again(
    checkpoint: Checkpoints, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped while it mines ends with the same bytes too."""
    monkeypatch.setattr("spectool.distill.data.texts._GROUP", 2)
    groups, source = count(monkeypatch, lexical_units, "mine"), checkpoint("llama")
    train(source, tmp_path / "whole", text, steps=1, batch_tokens=1024)
    total = groups[0]
    assert total > 3
    with stopped(ArtifactWriter, "add_shard", after=2, only="units"):
        train(source, tmp_path / "out", text, steps=1, batch_tokens=1024)
    # Two groups were stored, and the third was lost.
    assert groups[0] == total + 3
    train(source, tmp_path / "out", text, steps=1, batch_tokens=1024)
    assert groups[0] == total + 3 + total - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command_says_what_is_lossless(
    checkpoint: Checkpoints, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "out"
    words = ["distill", "lexical-units", checkpoint("llama"), out, "--data", text, "--seq-len", 48,
             "--alpha", 0.001, "--placeholder", 7, "--held-out", 2, "--steps", 8,
             "--learning-rate", "1e-2", "--loss-limit", 9]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    lines = " ".join(result.output.split())
    assert " units in " in lines and " tokens a unit" in lines
    assert "held-out threshold tokens per forward: " in lines
    assert f"decode with --draft units:longest=4,placeholder=7: the text is that of {out}" in lines
    assert "and not that of MODEL" in lines
    shown = CliRunner().invoke(app, ["generate", str(out), "--prompt", "def", "--draft",
                                     "units:beta=0.5", "--lossy", "--json",
                                     "--max-new-tokens", "6"])  # fmt: skip
    assert shown.exit_code == 0 and json.loads(shown.stdout)["lossless"] is False


def test_what_is_refused(checkpoint: Checkpoints, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TextError, match=r"no unit of two tokens in .* more than 1$"):
        train(checkpoint("llama"), out, text, own={"alpha": 1.0})
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(UsageError, match="learns from the model itself"):
        train(checkpoint("llama"), out, text, teacher=str(checkpoint("llama")))
    with pytest.raises(UnsupportedError):
        train(checkpoint("mamba"), out, text)
