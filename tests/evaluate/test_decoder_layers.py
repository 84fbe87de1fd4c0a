"""Figures of decoder layers, beside what transformers' own forward shows of the same models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.options import CacheOptions
from spectool.errors import UsageError
from spectool.evaluate import layer_pairs
from spectool.evaluate.context import Context
from spectool.evaluate.measures.decoder_layers import DecoderLayers
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize
from spectool.report import LayersNotCompared

from ..heard import Heard

Checkpoints = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text()[:3000])
    return str(path)


def scramble(source: Path, out: Path, layer: str) -> Path:
    """Copy a checkpoint with the rows of one layer's matrices in another order."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if f".{layer}." in name and tensor.ndim == 2:
            tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def compare(model: Path, reference: Path, text: str, **options: Any) -> DecoderLayers:
    load = CacheOptions(model=str(model), dtype="float32", **options)
    given = EvalOptions(
        text=(text,), window=32, reference=str(reference), measure=("decoder_layers",)
    )
    (result,) = evaluate(Context(load, given)).measures
    assert isinstance(result, DecoderLayers)
    return result


def watch(path: Path, ids_BL: torch.Tensor) -> tuple[Any, Any, list[torch.Tensor]]:
    """The model, its outputs with hidden states and attention, and its gates by layer."""
    hf: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    gates: list[torch.Tensor] = []
    for layer in hf.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: gates.append(out))
    with torch.inference_mode():
        out = hf(ids_BL, output_hidden_states=True, output_attentions=True)
    return hf, out, gates


def test_figures_are_those_of_transformers_own_forward(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source = checkpoint("llama-deep")
    changed = scramble(source, tmp_path / "changed", "layers.3")
    found = compare(changed, source, text)
    load = CacheOptions(model=str(source))
    windows = Context(load, EvalOptions(text=(text,), window=32)).windows
    (ids_SL,) = windows.groups
    rows_S = torch.linspace(0, len(ids_SL) - 1, layer_pairs.SAMPLE_WINDOWS).long()
    ids_BL = ids_SL[rows_S]
    _, theirs, their_gates = watch(source, ids_BL)
    model, ours, our_gates = watch(changed, ids_BL)
    for index, layer in enumerate(found.decoder_layers):
        before, after = theirs.hidden_states[index], theirs.hidden_states[index + 1]
        # transformers applies the final norm to the last ones.
        if index < 4:
            own = ours.hidden_states[index + 1]
            error = (own - after).norm(dim=-1) / after.norm(dim=-1)
            assert layer.hidden_error.value == pytest.approx(
                float(error.mean()), rel=1e-4, abs=1e-6
            )
            cosine = cosine_similarity(own, after, -1)
            assert layer.hidden_cosine.value == pytest.approx(float(cosine.mean()), rel=1e-5)
            with torch.inference_mode():
                place = torch.arange(32)[None]
                mask = torch.full((32, 32), -torch.inf).triu(1)[None, None]
                alone = model.model.layers[index](
                    before,
                    attention_mask=mask,
                    position_embeddings=model.model.rotary_emb(before, place),
                )
            error = (alone - after).norm(dim=-1) / (after - before).norm(dim=-1)
            assert layer.error.value == pytest.approx(float(error.mean()), rel=1e-4, abs=1e-5)
        means = []
        for weights in (ours.attentions[index], theirs.attentions[index]):
            bits = torch.zeros(weights.shape[:3])
            for at in range(1, 32):
                row = weights[:, :, at, : at + 1].double()
                bits[:, :, at] = (
                    -(row * row.log()).nan_to_num().sum(-1) / torch.tensor(at + 1).log()
                )
            means.append(bits[:, :, 1:].mean((0, 2)))
        attention = layer.attention
        assert attention is not None and layer.gates is not None
        assert attention.entropy == pytest.approx(float(means[0].mean()), rel=1e-4)
        assert attention.reference_entropy == pytest.approx(float(means[1].mean()), rel=1e-4)
        change = float((means[0] - means[1]).mean())
        assert attention.change.value == pytest.approx(change, abs=1e-5)
        assert attention.collapsed == int((means[0] < 0.05).sum())
        assert attention.reference_overloaded == int((means[1] > 0.95).sum())
        same = (our_gates[index] > 0) == (their_gates[index] > 0)
        assert layer.gates.agreement.value == pytest.approx(float(same.float().mean()), abs=1e-5)
        size = their_gates[index].abs()
        clear = size > size.median(-1, keepdim=True).values
        agreement = float(same[clear].float().mean())
        assert layer.gates.clear_agreement.value == pytest.approx(agreement, abs=1e-5)
        untouched = index < 3
        assert (layer.hidden_error.value == 0) is untouched
    assert found.worst_layer.name == "model.layers.3"
    assert found.worst_layer.error.lower > 0.1
    # The error of later layers is that of their inputs alone.
    assert found.decoder_layers[4].error.value < 1e-5 < found.decoder_layers[4].hidden_error.value


def test_gates_agree_less_with_fewer_bits(
    checkpoint: Checkpoints, tmp_path: Path, text: str
) -> None:
    source, agreement, errors = checkpoint("llama"), [1.0], [0.0]
    for bits in (8, 2):
        out = tmp_path / f"packed{bits}"
        job = QuantizeJob(method="rtn", config=RTN.Config(bits=bits))
        quantize(open_checkpoint(source), out, job)
        worst = compare(out, source, text).worst_layer
        assert worst.gates is not None
        agreement.append(worst.gates.agreement.value)
        errors.append(worst.error.value)
    assert agreement == sorted(agreement, reverse=True) and errors == sorted(errors)
    assert 0.99 < agreement[1] < 1 and agreement[-1] < 0.95


def test_experts_have_attention_and_no_gates(checkpoint: Checkpoints, text: str) -> None:
    """Their activation function sees the tokens that were routed to each expert."""
    source = checkpoint("qwen3_moe")
    for layer in compare(source, source, text).decoder_layers:
        assert layer.error.value == 0 and layer.hidden_cosine.value == pytest.approx(1)
        assert layer.attention is not None and layer.attention.change.value == 0
        assert layer.gates is None


def test_layers_of_another_shape_are_not_compared(checkpoint: Checkpoints, text: str) -> None:
    source, other = str(checkpoint("llama")), str(checkpoint("llama-deep"))
    for options, reason in (
        ({"model": other}, "other widths, numbers or kinds of layers"),
        ({"model": source, "kv": "int8"}, "no cache"),
    ):
        heard = Heard()
        given: dict[str, Any] = {"text": (text,), "window": 32, "reference": source}
        load = CacheOptions(dtype="float32", **options)
        result = evaluate(Context(load, EvalOptions(**given), reporter=heard)).as_json()
        assert "kl" in result and "decoder_layers" not in result
        (event,) = heard.of(LayersNotCompared)
        assert reason in event.reason
        with pytest.raises(UsageError, match="decoder_layers needs --reference CHECKPOINT with"):
            evaluate(Context(load, EvalOptions(measure=("decoder_layers",), **given)))
