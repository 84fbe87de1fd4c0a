"""What must hold on a CUDA device as on a processor. `make gpu`; never part of `make test`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spectool
from spectool.methods import resolve
from spectool.quantize.run import Job, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8"])
def test_packed_on_the_device_as_on_the_processor(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    job = Job(
        method=method,
        config=resolve(method, "quantizer").Config(),
        calibration=[__file__],
        samples=4,
        seq_len=32,
    )
    source = checkpoint("llama", num_hidden_layers=4)
    reports = {
        device: quantize(source, tmp_path / device, job, device=device)
        for device in ("cpu", "cuda")
    }
    for ours, theirs in zip(reports["cpu"].blocks, reports["cuda"].blocks, strict=True):
        assert ours["layers"] == theirs["layers"]
        assert theirs["output_error"] == pytest.approx(ours["output_error"], rel=0.05)
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        here = spectool.load(tmp_path / "cuda")(ids).logits
        there = spectool.load(tmp_path / "cuda", device="cuda")(ids.cuda()).logits.cpu()
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_drafting_keeps_the_text(family: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    model = spectool.load(path, device="cuda")
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10, 11]]
    plain = spectool.generate(model, prompts=prompts, max_new_tokens=40)
    for draft in ("ngram", f"{checkpoint(family, seed=1)}:depth=3"):
        ours = spectool.generate(
            model, prompts=prompts, draft=draft, max_new_tokens=40, batch_size=2
        )
        assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
