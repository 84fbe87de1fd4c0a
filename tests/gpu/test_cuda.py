"""What must hold on a CUDA device as on a processor. `make gpu`; never part of `make test`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.methods import import_method, list_methods
from spectool.quantize.base import parse_quantizer
from spectool.quantize.budget import list_widths
from spectool.quantize.job import Budget, QuantizeJob
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.rules import Rule
from spectool.quantize.run import quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Checkpoint = Callable[..., Path]
# `ptq161` takes whole rows of 128 inputs.
WIDE = {"hidden_size": 128, "intermediate_size": 160}
OPTIONS: dict[str, dict[str, Any]] = {
    "jlcm": {"epochs": 1}, "scalar": {"epochs": 1}, "ptq161": {"epochs": 1}, "vq": {"codes": 16},
}  # fmt: skip
HEADS = ("medusa", "hydra", "eagle3", "clover", "chimera", "ppd", "hidden-transfer")


def job(method: str = "rtn", **more: Any) -> QuantizeJob:
    config = import_method(method, "quantizer").Config(**OPTIONS.get(method, {}))
    text = [str(Path(spectool.__file__).parent / "calibration/mixed.txt")]
    return QuantizeJob(
        method=method, config=config, calibration=text, samples=4, seq_len=32, **more
    )


def tensors(artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(artifact.glob("*.safetensors"))}


def logits(artifact: Path, device: str, **more: Any) -> torch.Tensor:
    ids_BL = torch.arange(5, 40)[None].to(device)
    with torch.inference_mode():
        model = spectool.load(artifact, device=device, activations="exact", **more)
        return model(ids_BL).logits.float().cpu()


@pytest.mark.parametrize("method", list_methods("quantizer"))
def test_packed_on_the_device_as_on_the_processor(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    if method in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    source = checkpoint("llama", **WIDE)
    reports = {
        device: quantize(open_checkpoint(source), tmp_path / device, job(method), device=device)
        for device in ("cpu", "cuda")
    }
    for ours, theirs in zip(reports["cpu"].blocks, reports["cuda"].blocks, strict=True):
        assert theirs["output_error"] == pytest.approx(ours["output_error"], rel=0.1)
    again = tmp_path / "again"
    quantize(open_checkpoint(source), again, job(method), device="cuda")
    assert tensors(again) == tensors(tmp_path / "cuda")
    for runtime in ("dense", "packed"):
        here, there = (logits(again, device, runtime=runtime) for device in ("cpu", "cuda"))
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3", "qwen3_moe"])
def test_everything_at_once(
    family: str, dtype: torch.dtype, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A budget beside a rule that trains, packed embeddings and a learnt head."""
    choice = parse_quantizer("gptq")
    wanted = job(
        "gptq",
        budget=Budget(4.5, list_widths(choice, 4.5)),
        rules=[Rule("*.0.*", parse_quantizer("jlcm:epochs=1"), "a rule")],
        embeddings=parse_quantizer("int8"),
        head=parse_quantizer("vq:codes=16,epochs=1"),
    )
    source = checkpoint(family, dtype=dtype)
    for place in ("once", "again"):
        quantize(open_checkpoint(source), tmp_path / place, wanted, device="cuda", dtype=dtype)
    assert tensors(tmp_path / "once") == tensors(tmp_path / "again")
    here, there = (logits(tmp_path / "once", d, dtype="float32") for d in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)


def test_preprocessed_on_the_device(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text = job().calibration
    assert text is not None
    wanted = job("ptq161", preprocess=Preprocess(text=text, steps=4, rate=1e-3))
    report = quantize(
        open_checkpoint(checkpoint("llama", **WIDE)), tmp_path / "out", wanted, device="cuda"
    )
    assert report.preprocess is not None
    assert all(value > 1 for value in report.preprocess.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_drafting_keeps_the_text(family: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    model = spectool.load(path, device="cuda")
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10, 11]]
    plain = spectool.generate(model, prompts=prompts, max_new_tokens=40)
    for draft in ("ngram", "recycle", "jacobi", "skip", f"{checkpoint(family, seed=1)}:depth=3"):
        ours = spectool.generate(
            model, prompts=prompts, draft=draft, max_new_tokens=40, batch_size=2
        )
        assert [r.token_ids for r in ours] == [r.token_ids for r in plain]


@pytest.mark.parametrize("method", HEADS)
def test_heads_taught_and_used_on_the_device(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """On a packed checkpoint, from the command line."""
    packed = tmp_path / "packed"
    quantize(open_checkpoint(checkpoint("llama-deep")), packed, job(), device="cuda")
    on_device = ("--device", "cuda", "--json")

    def run(*words: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*map(str, words), *on_device])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    heads, text = tmp_path / "heads", (job().calibration or [])[0]
    taught = run(
        "train-heads", method, packed, heads, "--data", text, "--steps", 4, "--seq-len", 64
    )
    assert taught["steps"] == 4
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b c\nthe cat\n")
    found = run(
        "bench", packed, "--prompts", prompts, "--max-new-tokens", 20, "--draft", heads,
        "--dtype", "float32", "--batch-size", 2,
    )  # fmt: skip
    assert found["drafters"][0]["identical"] == 2
