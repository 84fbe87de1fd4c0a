"""Loading of checkpoints: dtypes, runtimes, devices, tokenizers, and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError, InputError, UsageError
from spectool.kernels import build
from spectool.model.kernels import ProductLinear
from spectool.model.loading import default_dtype, describe_runtime, load_model, load_tokenizer
from spectool.model.packed import PackedExperts, packed_modules
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize

Checkpoints = Callable[..., Path]
HAS_KERNEL = build.missing() is None


@pytest.fixture
def artifact(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    out = tmp_path / "artifact"
    quantize(
        open_checkpoint(checkpoint("llama")), out, QuantizeJob(method="rtn", config=RTN.Config())
    )
    return out


def test_public_face() -> None:
    assert spectool.__all__ == sorted(spectool.__all__)
    assert set(spectool.__all__) <= set(dir(spectool))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16, None])
def test_dtype_of_activations_and_dense_weights(artifact: Path, dtype: Any) -> None:
    model = spectool.load(artifact, dtype=dtype)
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert model.dtype == want and model.lm_head.weight.dtype == want
    assert not model.training
    for module in packed_modules(model).values():
        assert isinstance(module, ProductLinear) == (want != torch.float16 and HAS_KERNEL)
        if not isinstance(module, ProductLinear):
            assert module.q.scale.dtype == torch.float16 and module.q.codes.dtype == torch.uint8
    assert model(input_ids=torch.tensor([[5, 6]])).logits.dtype == want


def test_runtimes(artifact: Path, checkpoint: Checkpoints) -> None:
    packed = spectool.load(artifact, runtime="packed", activations="exact")
    rounded = spectool.load(artifact, activations="int8")
    fields = load_model(open_checkpoint(artifact), keep_fields=True)
    dense = spectool.load(artifact, runtime="dense")
    assert len(packed_modules(packed)) == 14 and not packed_modules(dense)
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    for model, way in (
        (packed, "by kernel, exact activations" if HAS_KERNEL else "unpacked each time"),
        (rounded, "by kernel, int8 activations" if HAS_KERNEL else "unpacked each time"),
        (fields, "unpacked each time"),
    ):
        assert describe_runtime(model) == f"14 linears packed ({way}), float32"
    assert describe_runtime(dense) == "unpacked to dense once, float32"
    assert describe_runtime(spectool.load(checkpoint("llama"))) == "dense, float32"


def test_a_packed_model_can_be_copied(artifact: Path) -> None:
    ids = torch.arange(2, 30)[None]
    for model in (spectool.load(artifact), load_model(open_checkpoint(artifact), keep_fields=True)):
        with torch.inference_mode():
            assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_dense_experts_take_the_place_of_packed_ones(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    job = QuantizeJob(method="rtn", config=RTN.Config(), allow_dense=True)
    quantize(open_checkpoint(checkpoint("mixtral")), tmp_path / "out", job)
    packed, dense = (
        spectool.load(tmp_path / "out", runtime=runtime, activations="exact")
        for runtime in ("packed", "dense")
    )
    assert any(isinstance(part, PackedExperts) for part in packed.modules())
    assert not any(isinstance(part, PackedExperts) for part in dense.modules())
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        for model in (packed, load_model(open_checkpoint(tmp_path / "out"), keep_fields=True)):
            torch.testing.assert_close(
                dense(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype int4: expected float32"),
        ({"runtime": "fast"}, "runtime fast: expected one of auto"),
        ({"activations": "int4"}, "activations int4: expected one of auto, exact, int16, int8"),
        ({"device": "abacus"}, "device abacus: expected cpu"),
    ],
)
def test_wrong_options(artifact: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spectool.load(artifact, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_device_that_is_not_there(artifact: Path) -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        spectool.load(artifact, device="cuda")


@pytest.mark.parametrize("change", ["missing", "reshaped", "nonsense"])
def test_dense_checkpoint_that_does_not_fit_its_architecture(
    checkpoint: Checkpoints, tmp_path: Path, change: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "reshaped":
        tensors[name] = tensors[name][1:].clone()
    else:
        (source / "model.safetensors").write_bytes(b"nonsense")
    if change != "nonsense":
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        spectool.load(source)
    assert "\n" not in str(caught.value)


def test_strangers_in_a_dense_checkpoint_are_left_alone(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = {**load_file(source / "model.safetensors"), "stranger": torch.zeros(3)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    spectool.load(source)


def test_places_without_a_model(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError) as caught:
            spectool.load(path)
        assert "\n" not in str(caught.value)


def test_tokenizer(checkpoint: Checkpoints, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(checkpoint("llama")))
    assert tokenizer.decode(tokenizer.encode("def test", add_special_tokens=False)) == "def test"
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    for path in source.glob("tokenizer*"):
        path.unlink()
    for damage in (None, b"{", b"{}"):
        if damage is not None:
            (source / "tokenizer.json").write_bytes(damage)
        with pytest.raises(CheckpointError, match="no tokenizer that transformers can load") as e:
            load_tokenizer(open_checkpoint(source))
        assert "\n" not in str(e.value)


def test_auto_unpacks_what_has_no_kernel_where_memory_allows(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(packed_modules(spectool.load(artifact, runtime="auto"))) == 14 * HAS_KERNEL
    monkeypatch.setattr("spectool.model.kernels.explain_missing", lambda *_: "no compiler")
    assert not packed_modules(spectool.load(artifact, runtime="auto"))
    monkeypatch.setattr("spectool.machine.available_memory", lambda device: 1000)
    assert len(packed_modules(spectool.load(artifact, runtime="auto"))) == 14


@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "want"),
    [
        (torch.float32, False, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_a_command_runs_in_the_own_dtype_unless_it_crawls(
    stored: torch.dtype,
    has_bfloat16: bool,
    want: torch.dtype,
    checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectool.kernels.cpu.has_bfloat16", lambda: has_bfloat16)
    path = checkpoint("llama", dtype=stored)
    assert default_dtype(read_layout(path), torch.device("cpu")) == want
    assert default_dtype(read_layout(path), torch.device("cuda")) == stored
    assert spectool.load(path).dtype == stored


def test_merges_without_their_prefix_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The tokenizers package would abort the process on this file."""
    source = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    tokenizer = json.loads((source / "tokenizer.json").read_bytes())
    tokenizer["model"].update(continuing_subword_prefix="0", vocab={"a": 0, "Ġ": 1}, merges=["a Ġ"])
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="its merge 'a Ġ' ends without"):
        load_tokenizer(open_checkpoint(source))
    tokenizer["model"].update(vocab={"a": 0, "0b": 1, "ab": 2}, merges=["a 0b"])
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(open_checkpoint(source)).convert_tokens_to_ids("ab") == 2
