"""Sorted distillation: its loss and its thresholds against slow references, and what it writes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from spectool.checkpoint.headers import TRAINING
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.distill.data.samples import Sample
from spectool.distill.objectives import base
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.sorted import Costs, Sorted, calibrate
from spectool.distill.train_weights import WeightsJob, train_weights
from spectool.errors import UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model

from ..conftest import tokenizer
from ..decode.conftest import first_layers

Checkpoints = Callable[..., Path]

FAMILIES = ["llama-deep", "gemma3-deep", "qwen3-deep", "gpt2-deep"]
SAMPLES = [
    Sample([5, 6, 7, 8, 9, 11], [True, False, True, True, False, True]),
    Sample([12, 13, 14], [True, True, True]),
]


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate a training twice, which takes longer than its steps."""
    monkeypatch.setattr(base, "_NUM_EVALUATIONS", 2)
    monkeypatch.setattr("spectool.distill.objectives.sorted.MEASURED_TOKENS", 16)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("def run(path: Path) -> None:\n    return path\n" * 200)
    return str(path)


def train(source: Path, out: Path, text: str, exits: str | None = "1,3", **asked: Any) -> Any:
    own = {"exits": exits, **({"loss": asked.pop("loss")} if "loss" in asked else {})}
    job = WeightsJob(
        method="sorted", config=Sorted.Config(**own), data=(text,),
        **{"steps": 12, "seq_len": 48, "batch_tokens": 192, "held_out": 2, "learning_rate": 1e-2}
        | asked,
    )  # fmt: skip
    return train_weights(open_checkpoint(source), out, job)


def make_task(source: Path, config: Sorted.Config, teacher: PreTrainedModel | None) -> WeightTask:
    student, _ = Sorted.choose_student(open_checkpoint(source), config)
    return WeightTask(
        name="sorted", model=load_model(student, dtype=torch.float32), source=student,
        architecture=Architecture(student), teacher=teacher,
        texts=TextBatches(SAMPLES, lambda _: [[0, 1]], [SAMPLES], 6),
        device=torch.device("cpu"), seed=0, record={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "loss"),
    [
        ("gemma3-deep", "kl"),
        *(
            pytest.param(family, loss, marks=pytest.mark.slow)
            for family in FAMILIES
            for loss in ("kl", "ce")
            if (family, loss) != ("gemma3-deep", "kl")
        ),
    ],
)
def test_the_loss_is_the_mean_over_truncated_models(
    checkpoint: Checkpoints, family: str, loss: str
) -> None:
    """Compare gradients too, those of the shared norm and lm_head included."""
    source = checkpoint(family)
    teacher = load_model(open_checkpoint(source), dtype=torch.float32)
    config: Any = Sorted.Config(exits="1,2,4", loss=loss)
    objective = Sorted(make_task(source, config, teacher), config)
    nats, kl = objective.losses(SAMPLES)
    (nats if kl is None else kl).backward()  # type: ignore[no-untyped-call]
    whole = load_model(open_checkpoint(source), dtype=torch.float32)
    grads: dict[str, Tensor] = {}
    expected = 0.0
    for count in (1, 2, 4):
        cut = first_layers(whole, count)
        cut.requires_grad_(True)
        total = torch.zeros(())
        for sample in SAMPLES:
            ids = torch.tensor([sample.tokens])
            logp = cut(ids).logits[0].log_softmax(-1)
            with torch.no_grad():
                other = teacher(ids).logits[0].log_softmax(-1)
            for at in range(1, len(sample.tokens)):
                if sample.loss_mask[at]:
                    divergence = (other[at - 1].exp() * (other[at - 1] - logp[at - 1])).sum()
                    total = total + (
                        divergence if loss == "kl" else -logp[at - 1, sample.tokens[at]]
                    )
        mean = total / 5 / 3
        mean.backward()  # type: ignore[no-untyped-call]
        expected += float(mean.detach())
        for name, parameter in cut.named_parameters():
            if parameter.grad is not None:
                grads[name] = grads.get(name, torch.zeros(())) + parameter.grad
    assert float((nats if kl is None else kl).detach()) == pytest.approx(expected, rel=1e-4)
    found = {name: p.grad for name, p in objective.module.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, grads[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3-deep", {"max_shard_size": "20KB"}),
        *(
            pytest.param(family, options, marks=pytest.mark.slow)
            for family, options in (
                ("llama-deep", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
                ("qwen3-deep", {}),
                ("gpt2-deep", {"tie_word_embeddings": True}),
            )
        ),
    ],
)
def test_plain_transformers_loads_the_first_layers(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
) -> None:
    """Compare the perplexity of each exit with the measured one, and draft for MODEL."""
    source, out, worth = checkpoint(family, **options), tmp_path / "out", itertools.count(1)
    # Random models' own text is unlike the text: the last weights would rarely draft best.
    monkeypatch.setattr(
        Sorted, "_measure", lambda *given: {"tokens_per_forward": 1, "tokens_per_cost": next(worth)}
    )
    report = train(source, out, text, loss="ce")
    for layer in (1, 3):
        key = f"perplexity_at_{layer}"
        assert report.best[key] < 0.2 * report.initial[key]
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.num_hidden_layers == 3
    if "gemma3" in family:
        assert plain.config.layer_types == ["sliding_attention"] * 3
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {*index["weight_map"].values()} == {p.name for p in out.glob("*.safetensors")}
        assert len({*index["weight_map"].values()}) > 1
    thresholds = [report.best["threshold_at_1"], report.best["threshold_at_3"]]
    assert plain.config.exits == {"layers": [1, 3], "thresholds": thresholds}
    record = json.loads((out / TRAINING).read_text())
    assert record["teacher"] == record["source"]["fingerprint"]
    assert not list(tmp_path.glob("*partial*"))
    again = train(out, tmp_path / "again", text, exits="1,2", steps=1, teacher=str(source))
    assert again.initial["perplexity_at_1"] == pytest.approx(
        report.best["perplexity_at_1"], rel=2e-3
    )
    runner = Runner(source, dtype=torch.float32, draft=f"{out}:exits=auto")
    prompts = [[5, 6, 7], [9, 8] * 4]
    drafted = runner.generate(prompts, max_new_tokens=16)
    runner.use(None)
    expected = runner.generate(prompts, max_new_tokens=16)
    assert [each.token_ids for each in drafted] == [each.token_ids for each in expected]
    assert all(each.lossless for each in drafted) and sum(each.drafted for each in drafted)


@pytest.mark.slow
def test_a_draft_learns_its_teacher_and_is_measured_drafting(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    report = train(checkpoint("gpt2-deep"), tmp_path / "out", text, steps=30)
    assert report.is_draft and report.best["step"] > 0
    assert report.best["tokens_per_cost"] > report.initial["tokens_per_cost"]
    for layer in (1, 3):
        assert report.best[f"kl_at_{layer}"] < 0.6 * report.initial[f"kl_at_{layer}"]
        assert report.best[f"agreement_at_{layer}"] > report.initial[f"agreement_at_{layer}"]
    assert report.best["kl"] == pytest.approx((report.best["kl_at_1"] + report.best["kl_at_3"]) / 2)


@pytest.mark.slow
def test_one_draft_serves_targets_of_its_tokenizer(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    """Made of a Llama, it drafts for a GPT-2 and a Qwen3."""
    out = tmp_path / "out"
    train(checkpoint("llama-deep"), out, text, exits="1,2,3", steps=2)
    prompts = [tokenizer()("def run(path")["input_ids"], [9, 8] * 4]
    for family in ("gpt2", "qwen3"):
        runner = Runner(checkpoint(family), dtype=torch.float32)
        plain = runner.generate(prompts, max_new_tokens=20, batch_size=2)
        runner.use(f"{out}:exits=.04/.04/0")
        drafted = runner.generate(prompts, max_new_tokens=20, batch_size=2)
        assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
        draft: Any = runner.drafter.draft_model
        assert 0 < draft.row_passes[-1] < draft.row_passes[0]
        assert all(result.lossless for result in drafted)


def test_thresholds_are_worth_most_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every combination, played token by token; a sure exit that is right is taken."""
    grid = [0.0, 0.35, 0.6, 0.85]
    monkeypatch.setattr("spectool.distill.objectives.sorted._GRID", grid)
    costs = Costs({1: 10, 2: 25, 4: 60}, 5, 300)
    generator = torch.Generator().manual_seed(3)
    for share in (0.0, 0.5, 1.0):
        sure_ER = torch.rand(3, 200, generator=generator)
        noise_ER = torch.rand(3, 200, generator=generator)
        # Right as often as it is sure, or as often whatever it says.
        right_ER = noise_ER < share * sure_ER + (1 - share) * torch.tensor([[0.4], [0.5], [0.6]])

        def play(thresholds: tuple[float, ...], sure_ER: Tensor, right_ER: Tensor) -> float:
            cost = agreed = 0
            for sure, right in zip(sure_ER.T.tolist(), right_ER.T.tolist(), strict=True):
                read = 0
                for at, size in enumerate((10, 25, 60)):
                    if thresholds[at] == 1:
                        continue
                    cost, read = cost + size - read + 5, size
                    if sure[at] > thresholds[at]:
                        agreed += right[at]
                        break
            a = agreed / 200
            return (1 - a**5) / (1 - a) / (1 + 4 * cost / 200 / 300)

        found = tuple(calibrate(sure_ER, right_ER, costs))
        every = [(*pair, 0.0) for pair in itertools.product((*grid, 1.0), repeat=2)]
        best = max(play(each, sure_ER, right_ER) for each in every)
        assert play(found, sure_ER, right_ER) == pytest.approx(best, rel=0.01)
    assert any(0 < threshold < 1 for threshold in found)


def test_exits_have_defaults_and_limits(checkpoint: Checkpoints, tmp_path: Path, text: str) -> None:
    assert Sorted.Config().layers(32) == [6, 9, 12]
    assert Sorted.Config().layers(8) == [2, 3]
    assert Sorted.Config().layers(2) == [1]
    for exits in ("", "0,1", "2,1", "1,1", "1,x", "-1"):
        with pytest.raises(UsageError, match="expected rising numbers"):
            Sorted.Config(exits=exits).layers(8)
    with pytest.raises(UsageError, match="MODEL has 5 layers, and a draft has fewer"):
        train(checkpoint("llama-deep"), tmp_path / "out", text, exits="1,5")
    with pytest.raises(UnsupportedError):
        train(checkpoint("bamba"), tmp_path / "out", text, exits="1")
    assert not list(tmp_path.glob("out*"))


def test_the_command_plans_and_says_how_to_draft(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, out = checkpoint("llama-deep"), tmp_path / "out"
    words = ["distill", "sorted", str(source), str(out), "--data", text, "--exits", "1,3"]
    words += ["--steps", "2", "--seq-len", "48", "--batch-tokens", "96", "--held-out", "2"]
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0 and "plan: sorted (exits=1,3, loss=kl)" in done.stderr
    planned = json.loads(done.stdout)
    whole = sum(p.numel() for p in load_model(open_checkpoint(source)).parameters())
    assert planned["parameters"] == planned["trained"] < whole
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert f"decode MODEL with --draft {out}:exits=auto: the text is MODEL's own" in done.stdout
    assert "held-out perplexity at 1:" in done.stdout
    said = CliRunner().invoke(app, ["inspect", str(out)])
    assert said.exit_code == 0 and "trained with sorted (exits=1,3, loss=kl)" in said.stdout
    bad = CliRunner().invoke(app, [*words[:7], "1,9", "--overwrite"])
    assert bad.exit_code == 2 and "MODEL has 5 layers" in bad.stderr
    assert math.isfinite(train(source, tmp_path / "ce", text, loss="ce", steps=1).best["kl"])
