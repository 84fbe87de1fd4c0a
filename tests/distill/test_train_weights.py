"""Training of weights: what changes, what is written, what is refused, and resumption."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import TRAINING
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.distill.data.samples import Sample
from spectool.distill.objectives import base, consistency
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.lora import LoRA
from spectool.distill.train_weights import WeightsJob, WeightsReport, train_weights
from spectool.errors import CheckpointError, UnsupportedError, UsageError
from spectool.methods import import_method, list_methods
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model
from spectool.training import Training

from ..conftest import contents, flip
from ..stopping import count, stopped
from .conftest import storing_always

Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate a training four times, which takes longer than its steps."""
    monkeypatch.setattr(base, "_NUM_EVALUATIONS", 4)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Write a text that is regular enough to be learnt in a few steps."""
    path = tmp_path / "text.txt"
    path.write_text("def run(path: Path) -> None:\n    return path\n" * 200)
    return str(path)


def train(
    source: Path,
    out: Path,
    text: str,
    method: str = "lora",
    own: dict[str, Any] | None = None,
    **asked: Any,
) -> Any:
    given: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4},
        "consistency": {"block": 4, "new_tokens": 16, "prompts": 28},
        "sorted": {"exits": "1"},
        "cross": {"width": 32, "encoder_layers": 1, "decoder_layers": 1},
        "lexical-units": {"alpha": 0.0},
    }
    config = import_method(method, "objective").Config(**given.get(method, {}) | (own or {}))
    options = {
        "steps": 12, "seq_len": 48, "batch_tokens": 192, "held_out": 2, "learning_rate": 2e-2,
        **asked,
    }  # fmt: skip
    if method == "logits":
        options.setdefault("teacher", str(source))
    job = WeightsJob(method=method, config=config, data=(text,), **options)
    return train_weights(open_checkpoint(source), out, job)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3_moe"])
def test_the_linears_of_the_blocks_change_and_nothing_else(
    checkpoint: Checkpoints, tmp_path: Path, text: str, family: str
) -> None:
    """Files, shards and dtypes are the source's, and plain transformers loads what was measured."""
    source = checkpoint(family, dtype=torch.bfloat16, max_shard_size="20KB")
    out = tmp_path / "out"
    report: WeightsReport = train(source, out, text)
    assert report.best["perplexity"] < 0.7 * report.initial["perplexity"]
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()} | {TRAINING}
    for file in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    architecture = Architecture(open_checkpoint(source))
    trained = {
        architecture.origins[matrix.parameter].stored[0][0]
        for block in architecture.blocks
        for matrix in architecture.block_matrices(block)
        if matrix.expert is None
    }
    changed = set()
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        before, after = load_file(source / shard), load_file(out / shard)
        assert before.keys() == after.keys()
        assert all(before[key].dtype == after[key].dtype for key in before)
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == trained
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = load_model(open_checkpoint(out))
    assert plain.dtype == ours.dtype == torch.bfloat16
    theirs = dict(ours.named_parameters())
    assert all(torch.equal(value, theirs[key]) for key, value in plain.named_parameters())


@pytest.mark.parametrize("family", ["llama-tied", "qwen3_moe"])
def test_all_weights_are_written_wherever_they_are_stored(
    checkpoint: Checkpoints, tmp_path: Path, text: str, family: str
) -> None:
    """A tied matrix that is stored twice stays tied; experts that are stored in parts stay."""
    source = Path(shutil.copytree(checkpoint(family), tmp_path / "source"))
    stored = load_file(source / "model.safetensors")
    if family == "llama-tied":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    teacher = str(checkpoint(family, seed=1))
    report: WeightsReport = train(source, tmp_path / "out", text, "logits", teacher=teacher)
    assert report.best["kl"] < 0.9 * report.initial["kl"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    same = {key for key in stored if torch.equal(stored[key], after[key])}
    assert same == {key for key in stored if ".experts." in key}
    if family == "llama-tied":
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
        assert not Architecture(open_checkpoint(tmp_path / "out")).untied
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = train(tmp_path / "out", tmp_path / "again", text, "logits", teacher=teacher, steps=1)
    assert again.initial["kl"] == pytest.approx(report.best["kl"], rel=1e-5)
    assert plain.config.tie_word_embeddings == (family == "llama-tied")


def test_a_step_is_the_gradient_of_the_equations(checkpoint: Checkpoints) -> None:
    """The loss is the mean over masked tokens of -log p or KL, and W' = W + B A / 4."""
    source = open_checkpoint(checkpoint("llama"))
    samples = [
        Sample([5, 6, 7, 8, 9, 11], [True, False, True, True, False, True]),
        Sample([12, 13, 14], [True, True, True]),
    ]
    for teacher in (None, load_model(open_checkpoint(checkpoint("llama", seed=1)))):
        model = load_model(source, dtype=torch.float32)
        plain = load_model(source, dtype=torch.float32)
        task = WeightTask(
            name="lora", model=model, source=source, architecture=Architecture(source),
            texts=TextBatches(samples, lambda _: [[0, 1]], [samples], 6), teacher=teacher,
            device=torch.device("cpu"), seed=0, record={},
        )  # fmt: skip
        objective = LoRA(task, LoRA.Config(rank=3))
        updates: Any = objective.module
        with torch.no_grad():
            for name, parameter in updates.named_parameters():
                if "lora_B" in name:
                    parameter += 0.05
        found = objective.evaluate()
        merged = objective.weights.changed()
        nats: list[float] = []
        divergences: list[float] = []
        with torch.no_grad():
            for name, weight in merged.items():
                plain.get_parameter(name).copy_(weight)
            for sample in samples:
                ids = torch.tensor([sample.tokens])
                logp = plain(ids).logits[0].log_softmax(-1)
                other = None if teacher is None else teacher(ids).logits[0].log_softmax(-1)
                for at in range(1, len(sample.tokens)):
                    if sample.loss_mask[at]:
                        nats.append(-float(logp[at - 1, sample.tokens[at]]))
                        if other is not None:
                            parts = other[at - 1].exp() * (other[at - 1] - logp[at - 1])
                            divergences.append(float(parts.sum()))
        assert len(nats) == 5
        assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 5), rel=1e-4)
        if teacher is not None:
            assert found["kl"] == pytest.approx(sum(divergences) / 5, rel=1e-3)


def test_updates_start_as_nothing_and_a_quarter_of_them_is_merged(checkpoint: Checkpoints) -> None:
    source = open_checkpoint(checkpoint("gpt2"))
    task = WeightTask(
        name="lora", model=load_model(source, dtype=torch.float32), source=source,
        architecture=Architecture(source), texts=TextBatches([], lambda _: [], [], 8),
        device=torch.device("cpu"), seed=0, record={},
    )  # fmt: skip
    objective = LoRA(task, LoRA.Config(rank=2))
    updates: Any = objective.module
    layer = updates.base_model.model.transformer.h[0].mlp.c_fc
    before = layer.base_layer.weight.detach().clone()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not b.any() and a.any()
    with torch.no_grad():
        b.copy_(torch.randn_like(b))
        update_nm = b @ a / 4
    merged = objective.weights.changed()["transformer.h.0.mlp.c_fc.weight"]
    torch.testing.assert_close(merged, before + update_nm.T)


def test_a_teacher_is_followed_where_the_text_is_not(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, teacher = checkpoint("llama"), checkpoint("llama", seed=1)
    report = train(source, tmp_path / "out", text, teacher=str(teacher), steps=20)
    assert report.best["kl"] < 0.8 * report.initial["kl"]
    record = json.loads((tmp_path / "out" / TRAINING).read_text())
    assert record["teacher"] == open_checkpoint(teacher).fingerprint()
    assert str(tmp_path) not in (tmp_path / "out" / TRAINING).read_text()


def test_a_teacher_may_pad_the_vocabulary_and_have_a_shorter_context(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    """Sizes of one family differ in both; texts are cut to what both models take."""
    vocab = open_checkpoint(checkpoint("llama")).layout.config["vocab_size"]
    teacher = checkpoint("gpt2", seed=1, vocab_size=vocab + 8, n_positions=40)
    report = train(checkpoint("llama"), tmp_path / "out", text, teacher=str(teacher))
    assert report.plan.seq_len == 40
    assert report.best["kl"] < report.initial["kl"]


def test_the_result_is_that_of_the_stored_weights(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    """Updates this small are mostly lost in bfloat16."""
    source, out = checkpoint("llama", dtype=torch.bfloat16), tmp_path / "out"
    report = train(source, out, text, learning_rate=3e-4)
    record = json.loads((out / TRAINING).read_text())
    again = train(out, tmp_path / "again", text, steps=1)
    assert report.best == record["best"]
    assert report.best["perplexity"] == pytest.approx(again.initial["perplexity"], rel=1e-6)
    measured = min(each["perplexity"] for each in record["evaluations"])
    assert abs(measured / report.best["perplexity"] - 1) > 1e-4


@pytest.mark.parametrize("method", list_methods("objective"))
def test_a_stopped_run_goes_on_to_the_same_bytes(
    checkpoint: Checkpoints,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    source = checkpoint("llama")
    train(source, tmp_path / "whole", text, method, steps=6)
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    with stopped(ArtifactWriter, "add_shard", after=4, only="state"):
        train(source, tmp_path / "out", text, method, steps=6)
    assert not (tmp_path / "out").exists()
    train(source, tmp_path / "out", text, method, steps=6)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_trajectories_that_were_collected_are_not_collected_again(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped while the model generates ends with the same bytes too."""
    source = checkpoint("llama")
    monkeypatch.setattr("spectool.distill.data.texts._GROUP", 8)
    groups = count(monkeypatch, consistency, "collect")
    train(source, tmp_path / "whole", text, "consistency", steps=2)
    total = groups[0]
    assert total > 3
    with stopped(ArtifactWriter, "add_shard", after=2, only="trajectories"):
        train(source, tmp_path / "out", text, "consistency", steps=2)
    # Two groups were stored, and the third was lost.
    assert groups[0] == total + 3
    train(source, tmp_path / "out", text, "consistency", steps=2)
    assert groups[0] == total + 3 + total - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_kept_trajectories_serve_later_runs(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are those of a run that collects its own, also where the collection was stopped."""
    source, kept = checkpoint("llama"), tmp_path / "kept"
    monkeypatch.setattr("spectool.distill.data.texts._GROUP", 8)
    groups = count(monkeypatch, consistency, "collect")
    train(source, tmp_path / "whole", text, "consistency", steps=2)
    asked: dict[str, Any] = {"method": "consistency", "steps": 2, "own": {"trajectories": kept}}
    with stopped(ArtifactWriter, "add_shard", after=2, only="trajectories"):
        train(source, tmp_path / "out", text, **asked)
    assert not kept.exists()
    train(source, tmp_path / "out", text, **asked)
    made = groups[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    asked["own"] |= {"variant": "cllm"}
    planned = train(source, tmp_path / "cllm", text, **asked).plan
    assert groups[0] == made and planned.generated_tokens == 0
    flip(kept / "trajectories-00000.safetensors")
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        train(source, tmp_path / "other", text, **asked)
    asked["own"] |= {"block": 8}
    with pytest.raises(UsageError, match="holds trajectories made with another block"):
        train(source, tmp_path / "other", text, **asked)
    (tmp_path / "empty").mkdir()
    asked["own"] |= {"trajectories": tmp_path / "empty"}
    with pytest.raises(UsageError, match="empty: holds no trajectories"):
        train(source, tmp_path / "other", text, **asked)
    assert not (tmp_path / "other").exists()


def test_what_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    other = tmp_path / "other"
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(other)
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    for path in source.glob("tokenizer*"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match="its tokenizer is not that of"):
        train(source, out, text, teacher=str(other))
    with pytest.raises(UsageError, match="OUT must lie outside"):
        train(source, source / "inside", text)
    with monkeypatch.context() as patch:
        patch.setattr("spectool.distill.train_weights.available_memory", lambda device: 1000)
        with pytest.raises(UnsupportedError, match="training in float32 takes about"):
            train(source, out, text)
    with monkeypatch.context() as patch:
        patch.setattr("spectool.distill.train_weights.free_for", lambda out: 1000)
        with pytest.raises(UnsupportedError, match="the training stores about"):
            train(source, out, text)
    train(source, out, text, steps=1)
    with pytest.raises(UsageError, match="exists already"):
        train(source, out, text)
    assert not list(tmp_path.glob("out.*"))


def test_the_command_shows_its_plan_trains_and_says_what_changed(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    words = ["distill", "lora", str(source), str(out), "--data", text, "--rank", "4", "--steps"]
    words += ["6", "--seq-len", "48", "--batch-tokens", "192", "--learning-rate", "0.02"]
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0 and "plan: lora (rank=4)" in done.stderr and not out.exists()
    planned = json.loads(done.stdout)
    assert planned["dry_run"] and planned["steps"] == 6
    weights_bytes = (source / "model.safetensors").stat().st_size
    # Two states of four float32 tensors.
    assert planned["disk_bytes"] == weights_bytes + 32 * planned["trained"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["parameters"] == planned["parameters"]
    assert result["best"]["perplexity"] < result["initial"]["perplexity"]
    weights = nn.ModuleDict({"m": load_model(open_checkpoint(out))})
    assert sum(p.numel() for p in weights.parameters()) == result["parameters"]
    done = CliRunner().invoke(app, [*words, "--overwrite", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["best"] == result["best"]
