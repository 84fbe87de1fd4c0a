"""A widened copy computes what its source computes, in more and larger matrices."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks/widened.py"
# head_dim 8 and two query heads a key-value head, as in the source; 12 * 8 is not 84.
SIZES = {"hidden": 84, "intermediate": 123, "heads": 12}


def _load_widen() -> Callable[..., int]:
    """benchmarks/ is no package, so the script is imported by its path."""
    spec = importlib.util.spec_from_file_location("widened", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    widen: Callable[..., int] = script.widen
    return widen


widen = _load_widen()


def _load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module", params=["untied", "tied", "biases", "sharded"])
def source(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: Any
) -> Path:
    """A Llama whose norm weights and biases are not the ones and zeros they start as."""
    # Those would hide a weight that is padded wrongly.
    overrides = {"attention_bias": True, "mlp_bias": True} if request.param == "biases" else {}
    family = "llama-tied" if request.param == "tied" else "llama"
    model = _load(checkpoint(family, **overrides))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    path: Path = tmp_path_factory.mktemp(request.param)
    shard_size = "20KB" if request.param == "sharded" else "50GB"
    model.save_pretrained(path, max_shard_size=shard_size)
    AutoTokenizer.from_pretrained(checkpoint(family)).save_pretrained(path)
    return path


@torch.inference_mode()
def test_it_computes_the_same(source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    num_parameters = widen(source, tmp_path / "wide", dtype="float32", **SIZES)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before

    model, wide = _load(source), _load(tmp_path / "wide")
    assert sum(parameter.numel() for parameter in wide.parameters()) == num_parameters
    assert wide.config.num_key_value_heads == 6 and wide.config.head_dim == model.config.head_dim
    assert wide.config.tie_word_embeddings == model.config.tie_word_embeddings
    ids_BT = torch.randint(2, 320, (3, 42), generator=torch.Generator().manual_seed(1))
    logits_BTV, wide_BTV = model(ids_BT).logits, wide(ids_BT).logits
    assert (wide_BTV - logits_BTV).abs().max() < 1e-4 * logits_BTV.abs().max()
    assert torch.equal(
        wide.generate(ids_BT, do_sample=False, max_new_tokens=48),
        model.generate(ids_BT, do_sample=False, max_new_tokens=48),
    )


def test_eps_is_scaled(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """With an eps as large as this, one that was kept would show."""
    source = checkpoint("llama", rms_norm_eps=0.1)
    widen(source, tmp_path / "wide", dtype="float32", **SIZES)
    ids_BT = torch.arange(2, 44)[None]
    with torch.inference_mode():
        logits_BTV, wide_BTV = (_load(p)(ids_BT).logits for p in (source, tmp_path / "wide"))
    assert (wide_BTV - logits_BTV).abs().max() < 1e-4 * logits_BTV.abs().max()


def test_text_files_and_dtype_come_along(source: Path, tmp_path: Path) -> None:
    widen(source, tmp_path / "wide", dtype="bfloat16", **SIZES)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "wide" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "bfloat16"
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 28}, "hidden_size 28 is smaller than the source's 32"),
        ({"intermediate": 55}, "intermediate_size 55 is smaller"),
        ({"heads": 2}, "num_attention_heads 2 is smaller"),
        ({"heads": 7}, "7 heads are not a multiple of 2"),
        ({"heads": 10}, "84 is not a multiple of 10 heads"),
        ({"dtype": "int8"}, "dtype is int8, expected one of float32"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    sizes: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        widen(checkpoint("llama"), tmp_path / "wide", **{**SIZES, "dtype": "float32", **sizes})
    assert not (tmp_path / "wide").exists()


def test_other_models_and_full_folders_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="model_type qwen2, expected llama"):
        widen(checkpoint("qwen2"), tmp_path / "wide", dtype="float32", **SIZES)
    source = checkpoint("llama")
    with pytest.raises(ValueError, match="is not empty"):
        widen(source, source, dtype="float32", **SIZES)
