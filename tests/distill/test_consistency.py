"""Consistency distillation: its loss against the equations, its points, and what it changes."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from spectool.checkpoint.headers import TRAINING
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.distill.data.noisy import NoisyRow, correct_half, noise
from spectool.distill.data.samples import Sample
from spectool.distill.data.trajectories import Trajectory
from spectool.distill.objectives import base
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.consistency import Consistency
from spectool.distill.train_weights import WeightsJob, WeightsReport, train_weights
from spectool.errors import TextError, UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model

Checkpoints = Callable[..., Path]


def make_objective(path: Path, samples: Sequence[Sample] = (), **options: Any) -> Consistency:
    source = open_checkpoint(path)
    task = WeightTask(
        name="consistency", model=load_model(source, dtype=torch.float32), source=source,
        architecture=Architecture(source), texts=TextBatches(samples, lambda _: [], [], 64),
        device=torch.device("cpu"), seed=0, record={},
    )  # fmt: skip
    return Consistency(task, Consistency.Config(**options))


def logits_after(model: Any, ids: list[int]) -> Tensor:
    """Return the logits [V] after a text, by a pass of its own."""
    last: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return last


def losses_by_equation(
    model: Any, original: Any, rows: list[NoisyRow], block: int, decay: float
) -> tuple[Tensor, Tensor]:
    """Return both terms of the loss by a pass for every token."""
    divergences, weights, anchors = [], [], []
    for row in rows:
        whole = [(row.prompt + row.text)[:at] for at in range(1, len(row.prompt + row.text) + 1)]
        whole += [row.prompt + row.anchor[:at] for at in range(1, len(row.anchor) + 1)]
        for ids in whole if original is not None else []:
            with torch.no_grad():
                before = logits_after(original, ids).log_softmax(-1)
            now = logits_after(model, ids).log_softmax(-1)
            anchors.append((before.exp() * (before - now)).sum())
        for at, label in enumerate(row.labels if original is None else []):
            logits = logits_after(model, row.prompt + (row.anchor or row.text)[:at])
            anchors.append(F.cross_entropy(logits, torch.tensor(label)))
        versions = zip(row.noisy, row.windows, strict=True)
        for (noisy, window), at in itertools.product(versions, range(len(row.text) - 1)):
            start = at // (block * window) * block * window
            seen = slice(start, at + 1)
            same = [a == b for a, b in zip(noisy[seen], row.text[seen], strict=True)]
            if all(same):
                continue
            first = start + same.index(False)
            weights.append(decay ** (at - max(first, at - at % block)))
            given = row.prompt + row.text[:start] + noisy[seen]
            with torch.no_grad():
                teacher = logits_after(model, row.prompt + row.text[: at + 1]).log_softmax(-1)
            student = logits_after(model, given).log_softmax(-1)
            divergences.append((teacher.exp() * (teacher - student)).sum())
    weights_R = torch.tensor(weights)
    return weights_R @ torch.stack(divergences) / weights_R.sum(), torch.stack(anchors).mean()


@pytest.mark.parametrize(
    "family",
    ["gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "qwen3", "gpt2"))],
)
@pytest.mark.parametrize(
    "options",
    [{"variant": "cllm", "anchor": "data"}, {"variant": "forcing", "window": 2, "decay": 0.5}],
    ids=["cllm", "forcing"],
)
def test_loss_and_gradient_are_those_of_the_equations(
    checkpoint: Checkpoints, family: str, options: dict[str, Any]
) -> None:
    """Rows of different lengths in one batch, a last block that is cut, a window layer."""
    objective = make_objective(checkpoint(family), block=4, **options)
    rng, window = random.Random(1), 1 if options["variant"] == "cllm" else 2
    rows = []
    for prompt, length in ((5, 19), (3, 10), (9, 4)):
        text = [rng.randrange(320) for _ in range(length)]
        noisy = [
            text[:2] + [token if rng.random() < 0.4 else rng.randrange(320) for token in text[2:]]
            for _ in range(2)
        ]
        anchor = [rng.randrange(320) for _ in range(length - 3)]
        given = [rng.randrange(320) for _ in range(prompt)]
        rows.append(NoisyRow(given, text, noisy, [window, 1], anchor, anchor))
    # One row learns its own text, in windows of three blocks.
    rows[1] = NoisyRow(rows[1].prompt, rows[1].text, rows[1].noisy[:1], [3], list(rows[1].text))
    original = None
    if options["variant"] == "forcing":
        # Another model plays the one before training.
        original = objective.original = load_model(
            open_checkpoint(checkpoint(family, seed=1)), dtype=torch.float32
        )
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    results = []
    for losses in (
        objective.row_losses(rows),
        losses_by_equation(objective.module, original, rows, 4, options.get("decay", 1.0)),
    ):
        objective.module.zero_grad()
        torch.autograd.backward(losses[0] + 10 * losses[1])
        results.append((losses, [p.grad.clone() for p in parameters if p.grad is not None]))
    (found, found_grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert wanted[0].item() > 0.01 and len(found_grads) == len(wanted_grads) == len(parameters)
    for ours, theirs in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_half_of_the_wrong_tokens_are_corrected_but_never_the_first() -> None:
    fixed, point = list(range(10)), [0, 1, 99, 3, 98, 97, 96, 95, 8, 9]
    chosen = set()
    for seed in range(60):
        made = correct_half(point, fixed, random.Random(seed))
        changed = [at for at in range(10) if made[at] != point[at]]
        assert len(changed) == 2 and all(made[at] == fixed[at] for at in changed)
        chosen |= set(changed)
    assert chosen == {4, 5, 6, 7}
    assert correct_half(fixed, fixed, random.Random(0)) == fixed


def test_noise_rises_along_a_window_of_forcing(checkpoint: Checkpoints) -> None:
    fixed = [1, 2, 3, 4]
    points = [[9, 9, 9, 9], [1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 9], fixed]
    assert [noise(point, fixed) for point in points] == [1, 0.75, 0.5, 0.25, 0]
    objective = make_objective(checkpoint("llama"), variant="forcing", window=5, block=4)
    rng = random.Random(0)
    found = [noise(objective._choose(points, number, 5, rng), fixed) for number in range(7)]
    assert found == [0, 0.25, 0.5, 0.75, 1, 0, 0.25]
    assert [noise(objective._choose(points, at, 3, rng), fixed) for at in range(3)] == [0, 0.5, 1]
    # Windows of one, two and five blocks, of even sizes: six blocks are two windows of three.
    assert {objective._choose_window(6, rng) for _ in range(60)} == {1, 2, 3}
    assert {objective._choose_window(1, rng) for _ in range(60)} == {1}
    plain = make_objective(checkpoint("llama"), variant="cllm", block=4)
    assert {plain._choose_window(6, rng) for _ in range(60)} == {1}
    drawn = {tuple(plain._choose(points, 0, 1, rng)) for _ in range(80)}
    assert drawn == {tuple(point) for point in points[:-1]}


@pytest.mark.parametrize(("family", "lora"), [("gpt2", None), ("llama", 4)])
def test_an_unchanged_model_is_at_its_anchor(
    checkpoint: Checkpoints, family: str, lora: int | None
) -> None:
    """Also in a step of a model with dropout, and under updates that are zero at the start."""
    objective = make_objective(checkpoint(family), block=4, lora=lora)
    objective.original = copy.deepcopy(objective.task.model)
    objective.trajectories = [Trajectory([5, 6], [[[7, 8, 9, 10]] * 2], [11, 12, 13, 14])]
    objective.batches = [[0]]
    metrics = objective.accumulate(0)
    # The model before training passes over fewer columns, so sums are rounded differently.
    assert metrics["anchor"] == pytest.approx(0.0, abs=1e-6) and metrics["consistency"] == 0


def test_prompts_are_drawn_from_all_of_the_data(checkpoint: Checkpoints) -> None:
    """The plan counts what is generated from them: up to 16 tokens, or what the context holds."""
    samples = [Sample([at] * 9 + [7] * 20, [False] * 9 + [True] * 20) for at in range(40)]
    options = {"block": 4, "new_tokens": 16}
    objective = make_objective(checkpoint("llama"), samples, prompts=5, **options)
    drawn = [prompt.tokens[0] for prompt in objective.given]
    assert len(set(drawn)) == 5 and max(drawn) > 5
    assert objective.generated_tokens == 5 * 16
    assert len(make_objective(checkpoint("llama"), samples, **options).given) == 40
    long = [Sample([1] * 50 + [2] * 14, [False] * 50 + [True] * 14)]
    assert make_objective(checkpoint("llama"), long, **options).generated_tokens == 14


def test_a_bin_far_from_the_data_is_replaced_in_the_labels(checkpoint: Checkpoints) -> None:
    objective = make_objective(
        checkpoint("llama"), mixed_labels=2.0, bins="100:50", anchor="generated", block=4
    )
    trajectory = Trajectory(
        [5], [[[100, 120, 7, 149], [100, 120, 7, 149]], [[101]]], [102, 123, 9, 200]
    )
    row = objective.make_row(trajectory, random.Random(0))
    # Within the distance; beyond it; no bin; the data's token is no bin; no data.
    assert row.labels == [100, 123, 7, 149, 101] and row.text == [100, 120, 7, 149, 101]
    plain = make_objective(checkpoint("llama"), block=4).make_row(trajectory, random.Random(0))
    assert plain.labels == plain.anchor == [102, 123, 9, 200]


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate a training four times, which takes longer than its steps."""
    monkeypatch.setattr(base, "_NUM_EVALUATIONS", 4)


TEXT = "def run(path: Path) -> None:\n    return path\n" * 60


def train(source: Path, out: Path, data: Path, **asked: Any) -> WeightsReport:
    own = {"block": 6, "new_tokens": 24, "loss_limit": 9.0, "ar_weight": 1.0}
    own |= asked.pop("own", {})
    options = {
        "steps": 40, "seq_len": 64, "batch_tokens": 512, "held_out": 4, "learning_rate": 5e-3,
        **asked,
    }  # fmt: skip
    job = WeightsJob(
        method="consistency", config=Consistency.Config(**own), data=(str(data),), **options
    )
    report = train_weights(open_checkpoint(source), out, job)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {"variant": "cllm"}),
        pytest.param("qwen3", {}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"lora": 8}, marks=pytest.mark.slow),
    ],
)
def test_fewer_passes_solve_a_window_and_jacobi_equals_plain_decoding(
    checkpoint: Checkpoints, tmp_path: Path, family: str, own: dict[str, Any]
) -> None:
    source, out, data = checkpoint(family), tmp_path / "out", tmp_path / "text.txt"
    data.write_text(TEXT)
    report = train(source, out, data, own=own)
    assert report.best["tokens_per_forward"] > 1.05 * report.initial["tokens_per_forward"]
    record = json.loads((out / TRAINING).read_text())
    assert record["best"] == report.best and record["options"]["block"] == 6
    runner = Runner(out, dtype=torch.float32)
    prompts = ["def run(", "return path", "None:\n"]
    plain = runner.generate(prompts, max_new_tokens=40)
    runner.use("jacobi:window=6")
    drafted = runner.generate(prompts, max_new_tokens=40, batch_size=3)
    assert [r.token_ids for r in plain] == [r.token_ids for r in drafted]
    assert sum(r.forwards for r in drafted) < sum(r.forwards for r in plain)


def test_the_command_says_what_is_lossless(checkpoint: Checkpoints, tmp_path: Path) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "out"
    data.write_text(TEXT)
    words = ["distill", "consistency", checkpoint("llama"), out, "--data", data, "--seq-len", 64,
             "--block", 4, "--new-tokens", 16, "--prompts", 6,
             "--held-out", 3, "--steps"]  # fmt: skip
    result = CliRunner().invoke(app, [*map(str, words), "1"])
    assert result.exit_code == 0, result.output
    assert "no trained weights were better" in result.output and "--draft" not in result.output
    words += ["20", "--learning-rate", "1e-2", "--loss-limit", "9", "--overwrite"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    assert "generates up to 96 tokens to train on" in result.output
    assert "held-out agreement: 1.0000 to " in result.output
    assert f"that of {out} without a drafter, and not that of MODEL" in " ".join(
        result.output.split()
    )
    record = json.loads((out / TRAINING).read_text())
    assert record["draft"] == "jacobi:window=8"


def test_weights_that_lost_too_much_are_not_kept(checkpoint: Checkpoints, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    own = {"loss_limit": 0.0, "anchor": "generated"}
    report = train(
        checkpoint("llama"), tmp_path / "out", data, steps=10, learning_rate=0.3, own=own
    )
    assert report.best["step"] == 0


def test_what_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "out"
    data.write_text(TEXT)
    with pytest.raises(UsageError, match="expected FIRST:COUNT"):
        Consistency.Config(mixed_labels=1.0, bins="7", anchor="generated")
    with pytest.raises(UsageError, match="mixes the data's labels"):
        Consistency.Config(mixed_labels=1.0, bins="7:9")
    with pytest.raises(UsageError, match="belong together"):
        Consistency.Config(bins="7:3")
    own = {"mixed_labels": 1.0, "bins": "300:50", "anchor": "generated"}
    with pytest.raises(UsageError, match="--bins 300:50: the model has 320 tokens"):
        train(checkpoint("llama"), out, data, own=own)
    with pytest.raises(UsageError, match="learns from the model itself"):
        train(checkpoint("llama"), out, data, teacher=str(checkpoint("llama")))
    with pytest.raises(UnsupportedError):
        train(checkpoint("mamba"), out, data)
    monkeypatch.setattr("spectool.distill.data.trajectories._RUN", 1)
    with pytest.raises(TextError, match="prompts is left"):
        train(checkpoint("llama"), out, data)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(TextError, match="no prompt leaves room"):
        train(checkpoint("llama"), out, data, seq_len=32, own={"block": 30})
    words = ["distill", "logits", str(checkpoint("llama")), str(out), "--data", str(data)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "no teacher to learn from" in result.output
