"""Trainings of packed models: codes stay, fields learn, and the file keeps its bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from spectool.checkpoint import checksums
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import PACKED_INDEX, TRAINING
from spectool.checkpoint.tensors import open_checkpoint, read_tensor
from spectool.cli import app
from spectool.distill.objectives.base import TextBatches, WeightTask
from spectool.distill.objectives.logits import Logits
from spectool.distill.train_weights import WeightsJob, WeightsReport, train_weights
from spectool.errors import UnsupportedError
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model
from spectool.model.packed import packed_modules
from spectool.quantize.base import parse_quantizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize
from spectool.training import Training

from ..conftest import contents
from ..stopping import stopped
from .conftest import storing_always

Checkpoints = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    whole = Path(__file__).parents[2] / "core/data/calibration/code.txt"
    path.write_text(whole.read_text()[:4000])
    return str(path)


def pack(source: Path, out: Path, method: str, **more: Any) -> Path:
    choice = parse_quantizer(method)
    fitted = {"samples": 4, "seq_len": 32} if choice.name in ("ptq161", "gptq", "jlcm") else {}
    job = QuantizeJob(method=choice.name, config=choice.config, **fitted, **more)
    quantize(open_checkpoint(source), out, job)
    return out


def repair(packed: Path, out: Path, teacher: Path, text: str, **asked: Any) -> WeightsReport:
    options = {"steps": 12, "seq_len": 48, "batch_tokens": 192, "held_out": 2, **asked}
    config = import_method("logits", "objective").Config()
    job = WeightsJob(
        method="logits", config=config, data=(text,), teacher=str(teacher),
        learning_rate=5e-3, **options,
    )  # fmt: skip
    report = train_weights(open_checkpoint(packed), out, job)
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("rtn:bits=2,group_size=16", "llama"),
        ("scalar:bits=2", "gpt2"),
        *(
            pytest.param(method, family, marks=pytest.mark.slow)
            for method, family in (
                ("rtn:bits=3,group_size=16,symmetric=true", "qwen3_moe"),
                ("hqq:bits=2,group_size=16", "qwen3"),
                ("gptq:bits=2,group_size=16", "llama"),
                ("jlcm:bits=2", "llama"),
                ("olive:bits=4", "opt"),
                ("rtn:bits=2", "gemma2"),
                ("ptq161", "llama"),
            )
        ),
    ],
)
def test_fields_learn_and_codes_stay(
    checkpoint: Checkpoints, tmp_path: Path, text: str, method: str, family: str
) -> None:
    """Dtypes, shapes and codes are those before, and what is read back is what was measured."""
    source = checkpoint(family)
    packed, out = pack(source, tmp_path / "packed", method), tmp_path / "out"
    report = repair(packed, out, source, text)
    assert report.best["kl"] < 0.995 * report.initial["kl"] and report.best["step"] > 0
    before, after = (open_checkpoint(path).layout for path in (packed, out))
    assert before.tensors.keys() == after.tensors.keys() and before.modules == after.modules
    changed = set()
    for name, entry in before.tensors.items():
        old, new = read_tensor(entry), read_tensor(after.tensors[name])
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        if not torch.equal(old, new):
            changed.add(name)
            assert new.is_floating_point() and (".q." in name or new.ndim == 1)
    fields = {name for name in changed if ".q." in name}
    learnt = {name.partition(".q.")[0] for name in fields}
    # Not every expert is used.
    assert learnt == set(before.modules) or "moe" in family
    assert {p.name for p in out.iterdir()} == {p.name for p in packed.iterdir()} | {TRAINING}
    checksums.verify(out, after.checksums)
    again = repair(out, tmp_path / "again", source, text, steps=1)
    assert again.initial["kl"] == pytest.approx(report.best["kl"], rel=1e-4)


def test_a_scales_gradient_is_that_of_its_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """For w = s (q - z): dL/ds is the sum over the group of dL/dw (q - z), here w / s."""
    source = checkpoint("llama")
    packed = open_checkpoint(pack(source, tmp_path / "packed", "rtn:bits=3,group_size=16"))
    trained = load_model(packed, dtype=torch.float32, keep_fields=True)
    task = WeightTask(
        name="logits", model=trained, source=packed,
        architecture=Architecture(packed), texts=TextBatches([], lambda _: [], [], 64),
        device=torch.device("cpu"), seed=0, record={},
    )  # fmt: skip
    module: Any = Logits(task, Logits.Config()).module
    dense: Any = load_model(packed, dtype=torch.float32, runtime="dense")
    ids = torch.arange(2, 34)[None]
    for model in (module, dense):
        model.requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
    for name, linear in packed_modules(module).items():
        weight: Any = dense.get_submodule(name).weight
        product_nm = weight.grad * weight.detach()
        padded_nm = F.pad(product_nm, (0, -product_nm.shape[1] % 16))
        by_hand_ng = padded_nm.unflatten(1, (-1, 16)).sum(-1) / linear.q.scale.detach()
        torch.testing.assert_close(linear.q.scale.grad, by_hand_ng, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_stopped_repair_goes_on_to_the_same_bytes(
    checkpoint: Checkpoints, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    packed = pack(
        source, tmp_path / "packed", "rtn:bits=2,group_size=16", embeddings=parse_quantizer("rtn")
    )
    repair(packed, tmp_path / "whole", source, text)
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    with stopped(ArtifactWriter, "add_shard", after=4, only="state"):
        repair(packed, tmp_path / "out", source, text)
    repair(packed, tmp_path / "out", source, text)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_packed_embedding_learns_too(checkpoint: Checkpoints, tmp_path: Path, text: str) -> None:
    """One of its own, without the lm_head's fields."""
    source, tables = checkpoint("llama"), parse_quantizer("rtn:bits=2,group_size=16")
    packed = pack(source, tmp_path / "packed", "rtn:bits=2,group_size=16", embeddings=tables)
    repair(packed, tmp_path / "out", source, text)
    before, after = (open_checkpoint(path).layout.tensors for path in (packed, tmp_path / "out"))
    for name in ("model.embed_tokens.q.scale", "lm_head.q.scale"):
        assert not torch.equal(read_tensor(before[name]), read_tensor(after[name]))


def test_only_files_of_a_packed_checkpoint_are_copied(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    """Whatever its index lists, and although its README is gone."""
    source = checkpoint("llama")
    packed = pack(source, tmp_path / "packed", "rtn:bits=2,group_size=16")
    index = json.loads((packed / PACKED_INDEX).read_text())
    index["metadata"]["files"] += ["../side.txt", "code.py", "/etc/hostname"]
    (packed / PACKED_INDEX).write_text(json.dumps(index))
    (packed / "README.md").unlink()
    (packed / "code.py").touch()
    (tmp_path / "side.txt").touch()
    out = tmp_path / "deep" / "out"
    repair(packed, out, source, text, steps=1)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not (out / "code.py").exists() and not (out / "README.md").exists()
    assert "../side.txt" not in (out / PACKED_INDEX).read_text()


def test_what_has_no_gradient_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    packed = pack(source, tmp_path / "packed", "nf4:block_size=64")
    with pytest.raises(UnsupportedError, match="the fields of nf4 cannot be trained"):
        repair(packed, out, source, text)
    with pytest.raises(UnsupportedError, match="is quantized already"):
        job = WeightsJob(
            method="lora", config=import_method("lora", "objective").Config(), data=(text,)
        )
        train_weights(open_checkpoint(packed), out, job)
    assert not list(tmp_path.glob("out*"))


def test_the_command_repairs_and_the_result_is_like_any_packed_checkpoint(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    packed = pack(source, tmp_path / "packed", "rtn:bits=2,group_size=16")
    words = ["distill", "logits", packed, out, "--data", text, "--teacher", source, "--steps", "8",
             "--seq-len", "48", "--batch-tokens", "192", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"]["kl"] < result["initial"]["kl"]
    done = CliRunner().invoke(app, ["inspect", str(out), "--checksums"])
    assert done.exit_code == 0 and "distill logits" in done.stdout + done.stderr
    words = ["generate", str(out), "--prompt", "def", "--max-new-tokens", "4", "--draft", "ngram"]
    assert CliRunner().invoke(app, words).exit_code == 0
