"""The transcoder beside its equations, the MLPs that it reads, and figures of known values."""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.windows import cut
from spectool.decode.options import CacheOptions
from spectool.errors import (
    CheckpointError,
    InputError,
    NotFinite,
    TextError,
    UnsupportedError,
    UsageError,
)
from spectool.evaluate import context as contexts
from spectool.evaluate import suite, transcoder_plan
from spectool.evaluate.context import Context
from spectool.evaluate.intervals import Interval
from spectool.evaluate.measures import transcoder as measure
from spectool.evaluate.measures.perplexity import Perplexity
from spectool.evaluate.measures.transcoder import TranscoderFigures
from spectool.evaluate.mlp import TappedMlp, find_mlp
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import Evaluation, evaluate
from spectool.evaluate.transcoder import PENALTY, Trained, Transcoder, take_step, train
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize
from tests.shrunken import build, tiny_config

Checkpoints = Callable[..., Path]
ROOT = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "measure": ("transcoder",),
    "window": 64,
    "limit": 16_000,
    "transcoder_width": 2,
    "transcoder_tokens": 4096,
}


def run(
    model: Path,
    reference: Path | None,
    *,
    runtime: str = "dense",
    dtype: str = "float32",
    **options: Any,
) -> Evaluation:
    # Packed matrices are multiplied with in the slow tests: the kernels take long to build.
    load = CacheOptions(model=str(model), dtype=dtype, runtime=runtime)
    given = {**SMALL, "reference": None if reference is None else str(reference), **options}
    return evaluate(Context(load, EvalOptions(**given)))


def compare(model: Path, reference: Path, **options: Any) -> TranscoderFigures:
    (result,) = run(model, reference, **options).measures
    assert isinstance(result, measure.TranscoderFidelity)
    return result.transcoder


def pack(source: Path, out: Path, bits: int) -> Path:
    quantize(open_checkpoint(source), out, QuantizeJob(method="rtn", config=RTN.Config(bits=bits)))
    return out


def double(features: int = 7, width: int = 5) -> Transcoder:
    """A transcoder in float64 whose features are active now and then."""
    made = Transcoder(features, width).double()
    made.begin(torch.linspace(-1, 1, width), seed=3)
    made.b_dec.copy_(torch.linspace(0.5, -0.5, width))
    # They were made in float32.
    made.W_dec.data /= made.W_dec.data.norm(dim=-1, keepdim=True)
    return made


def slow_loss(made: Transcoder, x_BD: Tensor, y_BD: Tensor) -> Tensor:
    """The loss as the equations have it, number by number."""
    total = torch.zeros((), dtype=torch.float64)
    for x_D, y_D in zip(x_BD, y_BD, strict=True):
        out, size = [made.b_dec_out[at] for at in range(len(y_D))], torch.zeros(())
        for row_D, bias, vector_D in zip(made.W_enc, made.b_enc, made.W_dec, strict=True):
            z = bias + sum(w * (x - b) for w, x, b in zip(row_D, x_D, made.b_dec, strict=True))
            if z > 0:
                out = [each + z * v for each, v in zip(out, vector_D, strict=True)]
                size = size + z
        error = sum((each - y) ** 2 for each, y in zip(out, y_D, strict=True))
        total = total + error / sum(y * y for y in y_D) ** 0.5 + PENALTY * size
    return total / len(x_BD)


def test_a_step_is_that_of_the_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, y_BD = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    made, slow = double(), double()
    loss, z_BF = take_step(made, torch.optim.SGD(made.parameters(), lr=0.1), x_BD, y_BD)
    expected = slow_loss(slow, x_BD, y_BD)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert 0 < int((z_BF > 0).sum()) < z_BF.numel()
    expected.backward()
    for name, parameter in slow.named_parameters():
        assert parameter.grad is not None
        after = parameter.detach().clone()
        for row, grad in zip(after.view(-1, after.shape[-1]), parameter.grad, strict=False):
            if name == "W_dec":
                grad = grad - (grad @ row) * row
                assert abs(float(grad @ row)) < 1e-12
                row -= 0.1 * grad
                row /= row.norm()
        if name != "W_dec":
            after -= 0.1 * parameter.grad
        torch.testing.assert_close(made.get_parameter(name).detach(), after, rtol=1e-10, atol=1e-12)


def test_vectors_stay_of_length_1_and_the_penalty_is_free_of_scale() -> None:
    """Outputs a thousand times as large have features a thousand times as large, the same ones."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(1500, 12, generator=generator)
    y_TD = torch.tanh(x_TD @ torch.randn(12, 12, generator=generator))
    given: dict[str, Any] = {"features": 40, "tokens": 20_000, "device": torch.device("cpu")}
    small, large = (train(x_TD * by, y_TD * by, **given).transcoder for by in (1, 1024))
    lengths_F = small.W_dec.norm(dim=-1)
    torch.testing.assert_close(lengths_F, torch.ones(40))
    torch.testing.assert_close(large.W_dec, small.W_dec, rtol=1e-3, atol=1e-3)
    z_TF, large_z_TF = small.encode(x_TD), large.encode(x_TD * 1024)
    assert ((z_TF > 0) == (large_z_TF > 0)).double().mean() > 0.999
    torch.testing.assert_close(large_z_TF / 1024, z_TF, rtol=1e-2, atol=1e-3)
    error, spread = (small(x_TD) - y_TD).square().sum(), (y_TD - y_TD.mean(0)).square().sum()
    assert error < 0.5 * spread


def test_the_same_seed_gives_the_same_bits_and_unused_features_are_dead() -> None:
    generator = torch.Generator().manual_seed(0)
    # In one half-space: features of the other one have nothing to answer to.
    x_TD = torch.randn(600, 1, generator=generator).abs() * torch.ones(6) + 5 * torch.eye(6)[0]
    given: dict[str, Any] = {"features": 30, "tokens": 5120, "device": torch.device("cpu")}
    first, again, other = (train(x_TD, x_TD, **given, seed=seed) for seed in (0, 0, 1))
    for name, parameter in first.transcoder.named_parameters():
        assert torch.equal(parameter, again.transcoder.get_parameter(name))
    assert not torch.equal(first.transcoder.W_enc, other.transcoder.W_enc)
    assert first.tokens == 5120 and first.dead == again.dead
    never = int((first.transcoder.encode(x_TD) > 0).logical_not().all(0).sum())
    assert 0 < first.dead <= never + 2


MATRICES = {
    "llama": ("model.layers.1.mlp", "gate_proj", "down_proj"),
    "gpt2": ("transformer.h.1.mlp", "c_fc", "c_proj"),
    "opt": ("model.decoder.layers.1", "fc1", "fc2"),
    # Their MLPs add the residual.
    "bloom": ("transformer.h.1.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "mpt": ("transformer.blocks.1.ffn", "up_proj", "down_proj"),
    "apertus": ("model.layers.1.mlp", "up_proj", "down_proj"),
    "codegen": ("transformer.h.1.mlp", "fc_in", "fc_out"),
    "lfm2": ("model.layers.1.feed_forward", "w1", "w2"),
    "gptj": ("transformer.h.1.mlp", "fc_in", "fc_out"),
    "nemotron": ("model.layers.1.mlp", "up_proj", "down_proj"),
    "arcee": ("model.layers.1.mlp", "up_proj", "down_proj"),
    "persimmon": ("model.layers.1.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_neox": ("gpt_neox.layers.1.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "gemma2": ("model.layers.1.mlp", "gate_proj", "down_proj"),
    "gemma3_text": ("model.layers.1.mlp", "gate_proj", "down_proj"),
    "phi3": ("model.layers.1.mlp", "gate_up_proj", "down_proj"),
    "qwen3": ("model.layers.1.mlp", "gate_proj", "down_proj"),
}
QUICK = ("llama", "gpt2", "opt", "bloom", "mpt", "apertus")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MATRICES],
)
def test_an_mlp_is_read_and_replaced(family: str) -> None:
    model = build(tiny_config(family))
    holder, first, last = MATRICES[family]
    names = find_mlp(model, holder if family == "opt" else holder.rpartition(".")[0])
    assert names is not None
    assert (names.first, names.last) == (f"{holder}.{first}", f"{holder}.{last}")
    mlp, ids_L = TappedMlp(model, names), torch.arange(3, 40)
    x_ND, y_ND = mlp.read(ids_L)
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(names.first).register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        ),
        model.get_submodule(names.last).register_forward_hook(
            lambda module, args, out: seen.append(out)
        ),
    ]
    with torch.inference_mode():
        logits_LV = model(input_ids=ids_L[None]).logits[0].float()
    for handle in handles:
        handle.remove()
    assert torch.equal(x_ND, seen[0].reshape(37, -1)[1:])
    assert torch.equal(y_ND, seen[1].reshape(37, -1)[1:]) and x_ND.shape == y_ND.shape
    loss_N = -logits_LV.log_softmax(-1)[:-1].gather(1, ids_L[1:, None])[:, 0]
    torch.testing.assert_close(mlp.score(ids_L), loss_N)
    # The MLP's own output changes nothing, and zeros do what a last matrix of zeros does.
    assert torch.equal(mlp.score(ids_L, lambda _: y_ND), mlp.score(ids_L))
    zeros_N = mlp.score(ids_L, torch.zeros_like)
    assert (zeros_N - loss_N).abs().max() > 1e-3 and torch.equal(zeros_N[:1], loss_N[:1])
    assert not model.get_submodule(names.last)._forward_hooks and not model.training


def test_an_overflow_behind_the_mlp_is_no_figure(tiny: Callable[..., Any]) -> None:
    model, ids_L = copy.deepcopy(tiny("llama")), torch.arange(3, 40)
    names = find_mlp(model, "model.layers.0")
    assert names is not None
    mlp = TappedMlp(model, names)
    with pytest.raises(NotFinite, match=r"the stand-in of model\.layers\.0 is the first"):
        mlp.score(ids_L, lambda x_ND: x_ND / 0)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e38
    with pytest.raises(NotFinite, match=r"model\.layers\.1 is the first"):
        mlp.score(ids_L)


def test_figures_are_those_of_the_definitions() -> None:
    """Two windows of three tokens, with the sums written out."""
    made = double().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)

    theirs, ours = (draw(), draw()), (draw(), draw())
    # No feature of either is active for this token.
    theirs[0][0, 0] = ours[0][0, 0] = made.b_dec
    found = measure._compare(made, theirs, ours)
    means_D = theirs[1].flatten(0, 1).mean(0)
    for window in range(2):
        error, spread, shared, some, moved = [], [], [], [], []
        for x_D, y_D, our_x_D in zip(*(each[window] for each in (*theirs, ours[0])), strict=True):
            z_F, our_z_F = (
                torch.relu(made.W_enc @ (each - made.b_dec) + made.b_enc) for each in (x_D, our_x_D)
            )
            error.append(float(((made.W_dec.T @ z_F + made.b_dec_out - y_D) ** 2).sum()))
            spread.append(float(((y_D - means_D) ** 2).sum()))
            on, our_on = ({i for i, each in enumerate(z) if each > 0} for z in (z_F, our_z_F))
            shared.append(len(on & our_on) / max(1, len(on | our_on)))
            some.append(bool(on | our_on))
            moved.append(float((made.W_dec.T @ (our_z_F - z_F)).norm()))
        for name, values in (
            ("error", error),
            ("spread", spread),
            ("shared", shared),
            ("any", some),
            ("moved", moved),
        ):
            assert float(found[name][window]) == pytest.approx(sum(values) / 3, abs=1e-6), name
    one = Trained(transcoder=made, tokens=256, dead=0, seconds=1.0)
    losses = {"loss": [2.0, 3.0], "spliced": [2.1, 3.3], "ablated": [3.0, 4.0]}
    described = measure._describe(
        "layer", one, found | {name: torch.tensor(each) for name, each in losses.items()}
    )
    # The token without features is in no mean.
    assert float(found["any"].mean()) == pytest.approx(5 / 6)
    expected = float(found["shared"].sum() / found["any"].sum())
    assert described.overlap.value == pytest.approx(expected, rel=1e-6)
    total = 1 - float(found["error"].sum() / found["spread"].sum())
    assert described.reference.explained_variance.value == pytest.approx(total)
    change = described.model.explained_variance.value - total
    assert described.change.value == pytest.approx(change)
    assert described.loss_rise.value == pytest.approx(0.2, rel=1e-6)
    assert described.loss_recovered.value == pytest.approx(0.8, rel=1e-6)
    assert described.loss_recovered.lower == pytest.approx(0.7, rel=1e-5)
    # Without any active feature there is no overlap, which holds no gate.
    made.b_enc.fill_(-100)
    silent = measure._compare(made, theirs, ours)
    described = measure._describe(
        "layer", one, silent | {name: torch.tensor(each) for name, each in losses.items()}
    )
    for figure in (described.overlap, described.feature_error):
        assert math.isnan(figure.value) and math.isnan(figure.lower)
    assert described.reference.active.value == 0


def check_same(found: TranscoderFigures) -> None:
    """Check that the models of a comparison have the same features."""
    ones, zeros = Interval(1.0, 1.0, 1.0), Interval(0.0, 0.0, 0.0)
    assert (found.overlap, found.change, found.feature_error) == (ones, zeros, zeros)
    assert found.reference == found.model and found.model.active.value > 0
    assert found.tokens == 4096 and found.features == 64


@pytest.fixture(scope="module")
def kept(
    checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TranscoderFigures]:
    """A file with a transcoder of the Llama, and what was found when it was trained."""
    source, path = checkpoint("llama"), tmp_path_factory.mktemp("kept") / "kept.safetensors"
    return path, compare(source, source, transcoder_file=path)


def test_identical_weights_keep_every_feature(
    kept: tuple[Path, TranscoderFigures], checkpoint: Checkpoints
) -> None:
    path, found = kept
    check_same(found)
    # Read from the file; neither that nor the size of a batch changes a bit.
    source = checkpoint("llama")
    assert compare(source, source, transcoder_file=path, batch_size=3) == found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_identical_weights_of_other_families(family: str, checkpoint: Checkpoints) -> None:
    source = checkpoint(family)
    found = compare(source, source)
    check_same(found)
    again = compare(source, source, batch_size=3)
    assert dataclasses.replace(again, seconds=found.seconds) == found


@pytest.mark.slow
def test_fewer_bits_keep_fewer_features_and_gates_see_it(
    kept: tuple[Path, TranscoderFigures], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source, found = checkpoint("llama"), [kept[1]]
    for bits in (8, 2):
        packed = pack(source, tmp_path / f"packed{bits}", bits)
        gate = ("transcoder.overlap.lower>=0.9",)
        evaluation = run(packed, source, transcoder_file=kept[0], gate=gate)
        (result,) = evaluation.measures
        assert isinstance(result, measure.TranscoderFidelity)
        found.append(result.transcoder)
        assert evaluation.gates[0].holds is (bits == 8)
    same, eight, two = found
    assert 1 > eight.overlap.value > 0.9 > two.overlap.value > 0
    assert 0 < eight.feature_error.value < two.feature_error.value
    assert eight.reference == two.reference == same.reference
    assert eight.loss_recovered == two.loss_recovered == same.loss_recovered


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a refusal that comes after another measure has run fail the test."""

    def run(cls: type[Perplexity], context: Context) -> Perplexity:
        raise AssertionError("another measure ran first")

    monkeypatch.setattr(Perplexity, "run", classmethod(run))
    monkeypatch.setitem(SMALL, "measure", ("perplexity", "transcoder"))


def test_a_file_of_something_else_is_refused_at_once(
    kept: tuple[Path, TranscoderFigures],
    checkpoint: Checkpoints,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("llama")
    for options, name in (
        ({"transcoder_layer": 0}, "layer is model.layers.1, and this run's is model.layers.0"),
        ({"limit": 15_000}, "text is sha256"),
        ({"dtype": "bfloat16"}, "dtype is float32, and this run's is bfloat16"),
    ):
        with pytest.raises(UsageError, match=name):
            run(source, source, transcoder_file=kept[0], **options)
    with pytest.raises(CheckpointError, match="not a transcoder's file"):
        run(source, source, transcoder_file=source / "model.safetensors")
    with pytest.raises(UsageError, match="there is no folder"):
        run(source, source, transcoder_file=source / "absent" / "kept.safetensors")

    def refuse(**given: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(transcoder_plan.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        run(source, source, transcoder_file=source / "kept.safetensors")


def test_what_a_transcoder_cannot_be_trained_on_is_refused_at_once(
    checkpoint: Checkpoints, alone: None
) -> None:
    source, experts = checkpoint("llama"), checkpoint("qwen3_moe")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1: found no dense MLP"):
        run(experts, experts)
    for options, error, words in (
        ({"transcoder_layer": 2}, UsageError, "no decoder layer 2: it has 0 to 1"),
        ({"limit": 4000}, TextError, "a transcoder needs 8 or more, and 4096 tokens"),
        ({"transcoder_tokens": 4095}, UsageError, "must be at least 4096"),
        ({"stride": 16}, UsageError, "that do not overlap: no --stride"),
        ({"reference": None}, UsageError, "transcoder needs --reference CHECKPOINT, which fits"),
        ({"reference": checkpoint("llama-deep")}, UsageError, "has another width, number or"),
        ({"blockwise": True}, UsageError, "transcoder needs --reference CHECKPOINT, which fits"),
    ):
        with pytest.raises(error, match=words):
            run(source, options.pop("reference", source), **options)
    load = CacheOptions(model=str(source), dtype="float32", kv="int8")
    with pytest.raises(UsageError, match="leave --kv and --forward out"):
        evaluate(Context(load, EvalOptions(**SMALL, reference=str(source))))


def test_an_mlp_whose_output_does_not_vary_is_refused(
    kept: tuple[Path, TranscoderFigures], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source, idle = checkpoint("llama"), tmp_path / "idle"
    shutil.copytree(source, idle)
    tensors = load_file(idle / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, idle / "model.safetensors", metadata={"format": "pt"})
    for model, reference, path in ((source, idle, None), (idle, source, kept[0])):
        with pytest.raises(UnsupportedError, match=r"model\.layers\.1: the MLP's output does not"):
            run(model, reference, transcoder_file=path)


def test_memory_that_is_gone_later_does_not_matter(
    kept: tuple[Path, TranscoderFigures], checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models fit when the run begins, and not when the measure is reached."""
    source = str(checkpoint("llama"))
    given = EvalOptions(**SMALL, reference=source, transcoder_file=kept[0])
    context = Context(CacheOptions(model=source, dtype="float32", runtime="dense"), given)
    assert suite._choose(context) == [measure.TranscoderFidelity]
    monkeypatch.setattr(contexts, "available_memory", lambda device: 0)
    assert measure.TranscoderFidelity.run(context).transcoder == kept[1]


def test_the_middle_layer_is_one_setting_by_its_number_or_without(checkpoint: Checkpoints) -> None:
    source, found = checkpoint("llama"), []
    for layer in (None, 1, 0):
        given = EvalOptions(**SMALL, reference=str(source), transcoder_layer=layer)
        context = Context(CacheOptions(model=str(source)), given)
        suite._choose(context)
        found.append(context.setting())
    assert found[0] == found[1] != found[2]


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, *given: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(transcoder_plan, "write_safetensors", write)
    trained = Trained(transcoder=double(), tokens=4096, dead=0, seconds=1.0)
    with pytest.raises(KeyboardInterrupt):
        transcoder_plan.write_transcoder(tmp_path / "kept.safetensors", trained, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bfloat16_has_the_figures_of_float32_up_to_rounding(
    kept: tuple[Path, TranscoderFigures], checkpoint: Checkpoints
) -> None:
    source = checkpoint("llama")
    found = compare(source, source, dtype="bfloat16")
    check_same(found)
    exact = kept[1].reference.explained_variance.value
    assert found.reference.explained_variance.value == pytest.approx(exact, abs=0.02)


def test_it_does_not_run_unless_it_is_asked_for(checkpoint: Checkpoints) -> None:
    source = checkpoint("llama")
    load = CacheOptions(model=str(source))
    context = Context(load, EvalOptions(reference=str(source), window=64, limit=3000))
    names = [each.__name__ for each in suite._choose(context)]
    assert "DecoderLayers" in names and "TranscoderFidelity" not in names


def test_held_out_windows_are_all_over_the_text_and_never_trained_on() -> None:
    windows = cut(list(range(64 * 100)), length=64, bos=None)
    train_SL, held_SL = transcoder_plan.split(windows, 70 * 63)
    assert len(train_SL) == 70 and len(held_SL) == 16
    assert not {*train_SL.flatten().tolist()} & {*held_SL.flatten().tolist()}
    assert int(held_SL[0, 0]) == 0 and int(held_SL[-1, -1]) == 6399
    assert len(transcoder_plan.split(windows, 10**6)[0]) == 84
    for protocol in ("c4", "documents"):
        with pytest.raises(UsageError, match=f"of one length .* no --protocol {protocol}"):
            transcoder_plan.split(dataclasses.replace(windows, protocol=protocol), 4096)


@pytest.mark.slow
def test_overlap_falls_with_bits_on_a_trained_model(tmp_path: Path) -> None:
    source, kept = ROOT / "examples/tiny-python", tmp_path / "transcoder.safetensors"
    options: dict[str, Any] = {
        "window": 256,
        "limit": None,
        "transcoder_width": 8,
        "transcoder_tokens": 32_768,
    }
    options["runtime"] = "packed"
    found = [compare(source, source, transcoder_file=kept, **options)]
    for bits in (8, 4, 2):
        out = pack(source, tmp_path / f"packed{bits}", bits)
        found.append(compare(out, source, transcoder_file=kept, **options))
    overlaps = [each.overlap.value for each in found]
    assert overlaps == sorted(overlaps, reverse=True) and overlaps[0] == 1
    assert overlaps[1] > 0.9 and found[1].overlap.lower > found[3].overlap.upper
    errors = [each.feature_error.value for each in found]
    assert errors == sorted(errors) and errors[0] == 0
    assert found[0].reference.explained_variance.lower > 0.2


@pytest.mark.slow
def test_a_transcoder_of_a_real_model_does_its_mlps_work(shared: Path, tmp_path: Path) -> None:
    source = shared / "models/codestory-10M"
    text = str(shared / "data/text/tinystories_valid.txt.gz")
    options: dict[str, Any] = {
        "text": (text,),
        "window": 256,
        "limit": 200_000,
        "transcoder_width": 8,
    }
    options |= {"transcoder_tokens": 49_152, "runtime": "packed"}
    found = compare(pack(source, tmp_path / "packed", 4), source, **options)
    assert found.layer == "model.layers.4" and found.features == 8 * 320
    assert found.reference.explained_variance.lower > 0.5
    assert found.loss_recovered.value > 0.5 and found.reference.active.value < 100
    assert 0.5 < found.overlap.value < 1 and found.dead < found.features / 4
