"""Teachers whose log-probabilities are in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.data.stored_log_probs import kept_kl
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.logits import Logits
from spectool.distill.stored_teacher import StoredTeacher
from spectool.errors import CheckpointError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model

Checkpoints = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("def run(path: Path) -> None:\n    return path\n" * 12)
    return str(path)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def save(model: Path, text: str, out: Path, top_k: int = 0) -> Path:
    """Store what a model gives for windows of 24 tokens of a text."""
    words = ("--window", 24, "--save-reference", out, "--save-top-k", top_k)
    result = run("eval", model, "--text", text, "--dtype", "float32", *words)
    assert result.exit_code == 0, result.output
    return out


def gradients(objective: Logits, samples: Any) -> tuple[float, list[Tensor]]:
    loss = objective.losses(samples)[1]
    assert loss is not None
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    return float(loss.detach()), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("top_k", [0, 5])
def test_losses_and_gradients_are_those_of_the_model_that_was_stored(
    checkpoint: Checkpoints, tmp_path: Path, text: str, top_k: int
) -> None:
    """Compare with the KL of K + 1 events: each kept token, and any other."""
    source, teacher = open_checkpoint(checkpoint("llama")), checkpoint("llama", seed=1)
    model = load_model(open_checkpoint(teacher), dtype=torch.float32)
    vocabulary = model.config.vocab_size
    stored = StoredTeacher(save(teacher, text, tmp_path / "file", top_k), source, vocabulary)
    # A text cut short, and one whose loss leaves tokens out.
    whole = stored.samples(24)[1]
    texts = [stored.samples(10)[0], replace(whole, loss_mask=[at % 3 == 0 for at in range(24)])]
    task = WeightTask(
        name="logits", model=load_model(source, dtype=torch.float32), source=source,
        architecture=Architecture(source), texts=TextBatches([], lambda _: [], [], 24),
        device=torch.device("cpu"), seed=0, record={}, stored=stored,
    )  # fmt: skip
    objective = Logits(task, Logits.Config())
    loss, found = gradients(objective, texts)
    total, count = torch.zeros(()), 0
    for sample in texts:
        ids = torch.tensor([sample.tokens])
        ours_LV = objective.module(ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            theirs_LV = model(ids).logits[0].log_softmax(-1)
        for at in range(1, len(sample.tokens)):
            if not sample.loss_mask[at]:
                continue
            p_V, q_V = theirs_LV[at - 1].exp(), ours_LV[at - 1].exp()
            if top_k:
                kept = p_V.topk(top_k).indices
                p_V = torch.cat([p_V[kept], 1 - p_V[kept].sum(0, keepdim=True)])
                q_V = torch.cat([q_V[kept], 1 - q_V[kept].sum(0, keepdim=True)])
            total, count = total + (p_V * (p_V / q_V).log()).sum(), count + 1
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total / count, parameters)
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-3)


def test_a_small_rest_of_the_student_has_a_gradient() -> None:
    """A rest of 1e-9, which 1 minus float32 probabilities cannot tell from nothing."""
    logits_RV = torch.tensor([[21.0, 0.0, 0.0]], requires_grad=True)
    ref_RK, kept_RK = torch.tensor([[0.9]]).log(), torch.tensor([[0]])
    kl = kept_kl(ref_RK, logits_RV.log_softmax(-1), kept_RK).sum()
    rest = 2 * math.exp(-21) / (1 + 2 * math.exp(-21))
    expected = 0.9 * math.log(0.9) + 0.1 * math.log(0.1 / rest)
    assert float(kl.detach()) == pytest.approx(expected, rel=1e-5)
    (slope_RV,) = torch.autograd.grad(kl, logits_RV)
    # The gradient of a KL with respect to logits is q - p, shared here by the two other tokens.
    torch.testing.assert_close(slope_RV, torch.tensor([[0.1, -0.05, -0.05]]), atol=1e-5, rtol=0)


def test_a_file_trains_as_its_model_does(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, teacher = checkpoint("llama"), checkpoint("llama", seed=1)
    file = save(teacher, text, tmp_path / "file")
    how = ("--steps", 6, "--learning-rate", 0.01, "--batch-tokens", 96)
    result = run("distill", "logits", source, tmp_path / "out", "--teacher", file, *how, "--json")
    assert result.exit_code == 0, result.output
    shown = run("inspect", tmp_path / "out")
    assert f"from the teacher {open_checkpoint(teacher).fingerprint()}" in shown.output
    assert "--teacher TEACHER" in shown.output and "--data" not in shown.output
    kl = []
    for model in (source, tmp_path / "out"):
        compared = run("eval", model, "--reference", file, "--dtype", "float32", "--json")
        assert compared.exit_code == 0, compared.output
        kl.append(json.loads(compared.stdout)["kl"]["value"])
    assert kl[1] < 0.8 * kl[0]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", ("--data", "TEXT"), "contains the texts; leave --data out"),
        ("vocabulary", (), "has probabilities of"),
        ("sorted", (), "sorted needs the model itself"),
    ],
)
def test_what_does_not_fit_is_refused(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text: str,
    family: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    file = save(checkpoint("llama", seed=1), text, tmp_path / "file", 4)
    source = checkpoint("llama")
    if family == "vocabulary":
        size = open_checkpoint(source).layout.config["vocab_size"]
        source = checkpoint("llama", vocab_size=size + 8)
    method = "sorted" if family == "sorted" else "logits"
    given = [text if word == "TEXT" else word for word in options]
    result = run("distill", method, source, tmp_path / "out", "--teacher", file, *given)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_another_file_is_refused(checkpoint: Checkpoints, tmp_path: Path, text: str) -> None:
    source = open_checkpoint(checkpoint("llama"))
    with pytest.raises(CheckpointError, match="not a reference file"):
        StoredTeacher(checkpoint("llama") / "model.safetensors", source, 8)
