"""A whole training: its files, equal bytes every time, and refused input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from spectool.checkpoint.artifact import ArtifactWriter, listed_files
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import read_record
from spectool.distill import plan, training_data
from spectool.distill.data import texts
from spectool.distill.objectives.heads import HeadsObjective
from spectool.errors import CheckpointError, SpectoolError, TextError, UnsupportedError, UsageError
from spectool.quantize import run as quantizing
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.training import Training

from ..conftest import VOCAB, contents, tokenizer
from ..heard import Heard
from ..stopping import count, stopped
from .conftest import Losses, Train, storing_always


def test_what_is_written_is_whole_and_drafts(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("llama", dtype=torch.bfloat16)
    report = train(source)
    out = tmp_path / "out"
    assert sorted(contents(out)) == sorted(listed_files(out)) == [
        "heads.safetensors", "spectool_heads.json",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    tensors = load_file(out / "heads.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == report.parameters
    assert report.parameters == 3 * (32 * 32 + 32 + 320 * 32)
    record = read_record(out)
    assert record == report.record
    assert record.training["steps_done"] == report.steps == 8 and len(record.accuracy) == 3
    # The first head has none before it; a later one is measured where those were right.
    assert record.conditional[0] == record.accuracy[0] and len(record.conditional) == 3
    assert report.tokens_per_forward == pytest.approx(1 + sum(record.shares[:32]))
    text = (out / "spectool_heads.json").read_text()
    older = {key: part for key, part in json.loads(text).items() if key != "conditional"}
    (tmp_path / "spectool_heads.json").write_text(json.dumps(older))
    assert read_record(tmp_path).conditional == []
    (tmp_path / "spectool_heads.json").unlink()
    assert str(tmp_path) not in text and "seconds" not in text

    runner = Runner(source, dtype=torch.float32)
    (plain,) = runner.generate([[5, 6, 7]], max_new_tokens=40)
    runner.use(str(out))
    (result,) = runner.generate([[5, 6, 7]], max_new_tokens=40)
    assert result.token_ids == plain.token_ids and result.drafted > 0


def test_training_beats_no_training(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Text of a random target is hard to learn; slow tests require more on a real one."""
    source = checkpoint("llama")
    trained = train(source, steps=40, regenerate=True, temperature=0.0)
    untrained = train(source, "untrained", steps=0)
    assert untrained.steps == 0 and untrained.tokens_per_forward == pytest.approx(
        trained.initial["score"]
    )
    assert trained.tokens_per_forward > untrained.tokens_per_forward + 0.05
    assert trained.record.training["evaluations"][-1]["step"] == 40


@pytest.mark.parametrize("options", [{"draft_vocab": 30}, {"shared_head": True, "num_layers": 2}])
def test_smaller_heads(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    source = checkpoint("qwen3")
    report = train(source, options=options)
    tensors = load_file(tmp_path / "out" / "heads.safetensors")
    if "draft_vocab" in options:
        assert len(tensors["token_map"]) == 30 and tensors["heads.0.lm_head.weight"].shape[0] == 30
        assert torch.equal(tensors["token_map"], tensors["token_map"].unique())
    else:
        assert report.parameters == 3 * 2 * (32 * 32 + 32)
    runner = Runner(source)
    (plain,) = runner.generate([[5, 6, 7]], max_new_tokens=30)
    runner.use(str(tmp_path / "out"))
    assert runner.generate([[5, 6, 7]], max_new_tokens=30)[0].token_ids == plain.token_ids


def test_equal_seeds_give_equal_bytes_and_others_do_not(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("gpt2")
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(source, out, seed=seed, steps=2, regenerate=True, temperature=0.0)
    one, two, three = (contents(tmp_path / out) for out in ("one", "two", "three"))
    assert one == two and one["heads.safetensors"] != three["heads.safetensors"]


def test_metrics_are_a_line_a_step_also_over_a_stop(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = checkpoint("llama"), tmp_path / "metrics.jsonl"
    where = {"metrics": path}
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    with stopped(HeadsObjective, "accumulate", after=6):
        train(source, where=where)
    before = path.read_text()
    report = train(source, where=where)
    assert path.read_text().startswith(before)
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["method"] == "medusa" and [line["step"] for line in lines] == [*range(9)]
    assert lines[0] == {"step": 0, "held_out": report.initial}
    for line in lines[1:]:
        assert set(line) == {
            "step", "loss", "losses", "tokens", "learning_rate", "gradient_norm", "seconds",
            "tokens_per_second", "held_out",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(sum(line["losses"]) / 3)
        assert 0 < line["tokens"] <= 256 and line["gradient_norm"] > 0
    assert lines[1]["learning_rate"] == 1e-2 > lines[8]["learning_rate"]
    assert [line["held_out"] for line in lines] == report.record.training["evaluations"]
    with pytest.raises(UsageError, match="is not the metrics of this run"):
        train(source, "other", where=where, seed=1)
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """The run stops at the n-th shard that it writes: generated texts, states, the heads."""
    source = checkpoint("llama")
    monkeypatch.setattr(texts, "_GROUP", 8)
    written = count(monkeypatch, training_data, "regenerate")
    train(source, "whole", regenerate=True)
    all_texts = written[0]
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    with stopped(ArtifactWriter, "add_shard", after=stop):
        train(source, regenerate=True)
    assert not (tmp_path / "out").exists()
    shards = json.loads((tmp_path / "out.partial.json").read_text())["shards"]
    states = [entry["report"]["step"] for name, entry in shards.items() if "state" in name]
    written_texts = [name for name in shards if "state" not in name]
    assert len(shards) == min(stop, len(written_texts) + 2)

    written[0] = 0
    steps = count(monkeypatch, HeadsObjective, "accumulate")
    train(source, regenerate=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # What was recorded is not done again. One step more is taken for its time.
    assert written[0] == all_texts - len(written_texts)
    assert steps[0] == 1 + 8 - max(states, default=0)


def test_other_data_do_not_resume(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("llama")
    with stopped(Training, "run", after=0):
        train(source)
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, and long enough to be more than one text\n" * 30)
    with pytest.raises(UsageError, match="unfinished run with another data"):
        train(source, data=[str(other)])
    assert not (tmp_path / "out").exists()


def test_heads_of_a_packed_target_have_the_lineage_of_its_source(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, packed = checkpoint("llama"), tmp_path / "packed"
    quantizing.quantize(
        open_checkpoint(source), packed, QuantizeJob(method="rtn", config=RTN.Config())
    )
    train(source, "of-original")
    train(packed, "of-packed")
    original, compressed = (
        read_record(tmp_path / name).target for name in ("of-original", "of-packed")
    )
    assert original["lineage"] == compressed["lineage"] == original["fingerprint"]
    assert compressed["fingerprint"] != original["fingerprint"]


def test_heads_beside_a_checkpoint_are_found(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), source)
    assert Runner(source, draft="auto").drafter_name == "trigram+recycle"
    train(source)
    (tmp_path / "out").rename(source / "heads")
    assert Runner(source, draft="auto").drafter_name == "medusa"
    assert Runner(source, draft="auto:nodes=3").drafter.config.nodes == 3  # type: ignore


def test_too_little_data(train: Train, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(TextError, match="at least 2 are needed"):
        train(checkpoint("llama"), data=[str(path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]


def test_what_cannot_fit_is_refused_before_it_starts(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device: 1000)
    with pytest.raises(UnsupportedError, match=r"takes .* GB, and 0\.0 GB are free"):
        train(checkpoint("llama"))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_drafted_for_leaves_nothing(
    train: Train, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    source = tmp_path_factory.mktemp("bloom")
    transformers.BloomForCausalLM(config).save_pretrained(source)
    tokenizer().save_pretrained(source)
    with pytest.raises(UnsupportedError, match="bloom cannot be decoded"):
        train(source)
    assert not any(tmp_path.iterdir())


def test_a_recurrent_model_is_said_to_have_no_heads(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"mamba2 can neither be .* nor have heads trained"):
        train(checkpoint("mamba2"))
    assert not any(tmp_path.iterdir())


def test_a_target_that_repeats_itself_is_refused_before_its_texts_are_written(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    # All tokens are as likely, and the first of them is chosen for ever.
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    monkeypatch.setattr(training_data.DataPreparation, "_regenerate", None)
    with pytest.raises(TextError, match=r"to evaluate on: each .* repeats itself within 16 tokens"):
        train(source, regenerate=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_held_out_text_without_a_place_for_all_heads(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "_HELD_OUT_TOKENS", 16)
    with pytest.raises(TextError, match="generated too little text to evaluate on"):
        train(checkpoint("llama"), options={"num_heads": 16})
    assert not any(tmp_path.iterdir())


def test_a_loss_that_diverges_is_one_line(train: Train, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SpectoolError, match="training diverged"):
        train(checkpoint("llama"), learning_rate=1e30)


@pytest.mark.parametrize("method", ["medusa", "hydra"])
def test_heads_computed_in_bfloat16_learn_as_in_float32(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    """The heads' weights stay float32, so that steps too small for bfloat16 are not lost."""
    source, losses = checkpoint("llama"), Losses()
    for out, autocast in (("plain", None), ("one", "bfloat16"), ("two", "bfloat16")):
        asked = {"autocast": autocast, "learning_rate": 1e-4, "steps": 4}
        train(source, out, method=method, where=losses.watch(out), **asked)
    assert losses["one"] == losses["two"] != losses["plain"]
    assert losses["one"] == pytest.approx(losses["plain"], rel=0.02)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tensors = load_file(tmp_path / "one" / "heads.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_eight_bit_moments_learn_and_are_recorded(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    source, losses = checkpoint("llama"), Losses()
    for out, optimizer in (("plain", "adamw"), ("one", "adamw8bit"), ("two", "adamw8bit")):
        train(source, out, steps=4, optimizer=optimizer, where=losses.watch(out))
    assert losses["one"] == losses["two"] != losses["plain"]
    assert losses["one"] == pytest.approx(losses["plain"], rel=0.05)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read_record(tmp_path / "one").training["optimizer"] == "adamw8bit"


def test_the_plan_counts_what_the_options_take(
    checkpoint: Callable[..., Path], train: Train
) -> None:
    pytest.importorskip("bitsandbytes")
    heard = Heard()
    where = {"reporter": heard}
    source = checkpoint("llama")
    for number, options in enumerate(({}, {"optimizer": "adamw8bit"}, {"autocast": "bfloat16"})):
        train(source, f"out{number}", steps=0, where=where, **options)
    plain, eight, cast = (plan.memory_bytes for plan in heard.plans)
    assert (
        plain - eight == 6 * heard.plans[0].parameters
        and cast - plain == 2 * heard.plans[0].parameters
    )


def test_a_tokenizer_of_another_model_is_one_line(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"gives id \d+, but the model has only 200 tokens"):
        train(checkpoint("llama", vocab_size=200))
    assert not any(tmp_path.iterdir())


def test_heads_that_cannot_tell_texts_apart_refuse_packed_rows(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectool.decode.drafters.medusa.MedusaHeads.supports_packing", False)
    with pytest.raises(
        UsageError, match="--sequence-packing: medusa heads support only one text per sequence"
    ):
        train(checkpoint("llama"), sequence_packing=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_at_random_moments(checkpoint: Callable[..., Path], data: str, tmp_path: Path) -> None:
    """After eight SIGKILLs the finished run has the bytes of an uninterrupted one."""
    source = checkpoint("llama")

    def start(out: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "spectool", "train-heads", "medusa", str(source),
                 str(tmp_path / out), "--data", data, "--steps", "1500", "--seq-len", "64",
                 "--batch-tokens", "512", "--regenerate", "--threads", "1"]  # fmt: skip
        quick = (
            "import sys, spectool.training as t; t.Training.__init__.__kwdefaults__"
            "['save_seconds'] = 0.2; from spectool.cli import main; sys.argv = sys.argv[1:]; main()"
        )
        return subprocess.Popen([sys.executable, "-c", quick, *words[2:]])

    began = time.monotonic()
    assert start("whole").wait() == 0
    length = time.monotonic() - began
    rng = random.Random(0)
    killed = 0
    for _ in range(8):
        process = start("out")
        time.sleep(rng.uniform(0.25, 0.5) * length)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            break
    assert killed >= 2
    if not (tmp_path / "out").exists():
        assert start("out").wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "out/spectool_heads.json").read_text())["method"] == "medusa"
