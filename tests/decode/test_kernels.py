"""Decoding from int8 codes by the kernel: drafting changes no token, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.kernels import registry
from spectool.kernels.base import Kernel
from spectool.model.kernels import KernelLinear
from spectool.model.loading import describe_runtime, load_model

pytestmark = pytest.mark.skipif(
    registry.choose("int8", "cpu", torch.float32).kernel is None, reason="no kernel here"
)


@pytest.fixture(scope="module")
def artifact(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """Quantize a tiny model's attention to int8, the rest to 8-bit rtn."""
    folder = tmp_path_factory.mktemp("packed")
    rules, out = folder / "rules.yaml", folder / "out"
    rules.write_text("layers:\n- {match: self_attn, method: int8}\n")
    words = ["rtn", checkpoint("llama"), out, "--rules", rules]
    with pytest.raises(SystemExit) as done:
        app(["quantize", *map(str, words)])
    assert not done.value.code
    return open_checkpoint(out)


@pytest.mark.parametrize("draft", ["ngram", "recycle"])
def test_drafting_from_codes_is_plain_decoding(
    artifact: Checkpoint,
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    draft: str,
) -> None:
    calls: list[int] = []
    original = Kernel.linear

    def linear(self: Kernel, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(x.numel() // x.shape[-1])
        return original(self, x, *rest)

    monkeypatch.setattr(Kernel, "linear", linear)
    model = load_model(artifact, runtime="auto", for_decoding=True)
    model.generation_config.eos_token_id = None
    prompts = [prompt_of(20), prompt_of(33, seed=1)]
    plain = [Runner(model).generate([each], max_new_tokens=30)[0] for each in prompts]
    calls.clear()
    together = Runner(model, draft=draft).generate(prompts, max_new_tokens=30)
    assert max(calls[len(calls) // 2 :]) > len(prompts)
    for alone, found in zip(plain, together, strict=True):
        assert found.token_ids == alone.token_ids and found.lossless
        assert found.drafted > 0


def test_auto_keeps_packed_what_decoding_has_a_kernel_for(artifact: Checkpoint) -> None:
    decoding = load_model(artifact, runtime="auto", for_decoding=True)
    assert describe_runtime(decoding) == "8 linears packed (by kernel), float32"
    evaluated = load_model(artifact, runtime="auto")
    assert describe_runtime(evaluated) == "unpacked to dense once, float32"
    # Outside of decoding's passes both compute the same bits.
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        assert torch.equal(decoding(ids).logits, evaluated(ids).logits)
    choices = Runner(decoding).target.kernels
    assert str(choices["int8"]) == "kernel for up to 256 rows"
    assert not any(isinstance(module, KernelLinear) for module in evaluated.modules())
