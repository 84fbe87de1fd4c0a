"""Statistics against hooks and loops; sequences drawn from calibration text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectool import methods
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import TextError
from spectool.methods import Method
from spectool.model.decoder import find_blocks
from spectool.model.matrices import find_matrices
from spectool.model.packed import packed_modules
from spectool.quantize.base import Block, FitReport, Fitted, Statistics, Streams, Tick
from spectool.quantize.calibration import sample_sequences
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.statistics import LinearStats, Observer, Statistic

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]

ALL: tuple[Statistic, ...] = ("absmax", "mean_abs", "hessian")
IDS_BL = torch.randint(2, 300, (6, 33), generator=torch.Generator().manual_seed(5))


def statistics(x_Tm: Tensor) -> dict[str, Tensor]:
    """Compute the three statistics token by token in double precision."""
    m = x_Tm.shape[1]
    shapes = {"absmax": (m,), "mean_abs": (m,), "hessian": (m, m)}
    found = {name: torch.zeros(shape).double() for name, shape in shapes.items()}
    for x_m in x_Tm.double():
        found["absmax"] = torch.maximum(found["absmax"], x_m.abs())
        found["mean_abs"] += x_m.abs() / len(x_Tm)
        found["hessian"] += torch.outer(x_m, x_m) / len(x_Tm)
    return found


def assert_same(stats: LinearStats, x_Tm: Tensor, wanted: tuple[Statistic, ...] = ALL) -> None:
    assert stats.num_tokens == len(x_Tm)
    for name, want in statistics(x_Tm).items():
        found = getattr(stats, name)
        if name not in wanted:
            assert found is None
            continue
        assert found.dtype == torch.float32
        atol = 1e-5 * float(want.abs().max())
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_equal_those_of_all_tokens(dtype: torch.dtype) -> None:
    x_Tm = (torch.randn(431, 42) * torch.rand(42) * 9).to(dtype)
    stats = LinearStats(ALL)
    for piece in (x_Tm[:1], x_Tm[1:1], x_Tm[1:123], x_Tm[123:]):
        stats.add(piece)
    assert_same(stats, x_Tm)


def inputs_of(model: nn.Module, part: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Collect the inputs of every linear and Conv1D of `part` by name, over all runs."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.setdefault(name, []).append(
                args[0].detach().reshape(-1, args[0].shape[-1])
            )
        )
        for name, module in part.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(pieces) for name, pieces in seen.items()}


def observe(model: PreTrainedModel, ids_BL: Tensor, *, opened: int = 0) -> tuple[str, Observer]:
    """Collect statistics of the second block while the model runs batches of four and two."""
    _, names = find_blocks(model)
    block = model.get_submodule(names[1])
    matrices = {matrix.name: matrix for matrix in find_matrices(block, names[1])}
    observer = Observer(block, names[1], matrices, ALL, opened=opened)
    with torch.inference_mode(), observer:
        for batch in (ids_BL[:4], ids_BL[4:]):
            model(input_ids=batch, use_cache=False)
    return names[1], observer


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gpt_neox"])
def test_linears_and_conv1d_see_what_hooks_see(
    tiny: Callable[..., PreTrainedModel], family: str
) -> None:
    model = tiny(family)
    name, observer = observe(model, IDS_BL)
    block = model.get_submodule(name)
    with torch.inference_mode():
        inputs = inputs_of(model, block, lambda: model(input_ids=IDS_BL, use_cache=False))
    assert {f"{name}.{leaf}" for leaf in inputs} == set(observer.stats)
    for leaf, x_Tm in inputs.items():
        assert_same(observer.stats[f"{name}.{leaf}"], x_Tm)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_start_tokens_are_left_out(tiny: Callable[..., PreTrainedModel], family: str) -> None:
    model, length = tiny(family), IDS_BL.shape[1]
    name, observer = observe(model, IDS_BL, opened=length)
    block = model.get_submodule(name)
    with torch.inference_mode():
        inputs = inputs_of(model, block, lambda: model(input_ids=IDS_BL, use_cache=False))
    for leaf, x_Tm in inputs.items():
        x_Tm = x_Tm.view(-1, length, x_Tm.shape[1])[:, 1:].flatten(0, 1)
        assert_same(observer.stats[f"{name}.{leaf}"], x_Tm)


def test_matrices_with_one_input_share_one_object(tiny: Callable[..., PreTrainedModel]) -> None:
    name, observer = observe(tiny("llama"), IDS_BL)
    stats = {key.removeprefix(name + "."): value for key, value in observer.stats.items()}
    query = stats["self_attn.q_proj"]
    assert stats["self_attn.k_proj"] is query and stats["self_attn.v_proj"] is query
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert len({id(value) for value in stats.values()}) == 4


def routed(model: PreTrainedModel, name: str, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs [T, m] of a block's experts, and the experts [T, k] of each token."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = next(
        module for module in model.get_submodule(name).modules() if hasattr(module, "is_transposed")
    )
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    with torch.inference_mode():
        model(input_ids=ids_BL, use_cache=False)
    handle.remove()
    ((x_Tm, chosen_Tk),) = seen
    return x_Tm.reshape(-1, x_Tm.shape[-1]), chosen_Tk


@pytest.mark.parametrize("opened", [0, IDS_BL.shape[1]])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_see_the_tokens_routed_to_them(
    tiny: Callable[..., PreTrainedModel], family: str, opened: int
) -> None:
    model = tiny(family)
    model.set_experts_implementation("eager")
    name, observer = observe(model, IDS_BL, opened=opened)
    x_Tm, chosen_Tk = routed(model, name, IDS_BL)
    if opened:
        x_Tm = x_Tm.view(-1, opened, x_Tm.shape[1])[:, 1:].flatten(0, 1)
        chosen_Tk = chosen_Tk.view(-1, opened, chosen_Tk.shape[1])[:, 1:].flatten(0, 1)
    experts = [key for key in observer.stats if ".experts." in key]
    assert len(experts) == 8
    parameters = dict(model.named_parameters())
    for key in experts:
        tensor, _, index = key.rpartition(".")
        mine_Tm = x_Tm[(chosen_Tk == int(index)).any(-1)]
        if tensor.endswith("down_proj"):
            gate_up = parameters[tensor.replace("down_proj", "gate_up_proj")][int(index)]
            gate, up = (mine_Tm @ gate_up.T).chunk(2, -1)
            mine_Tm = torch.nn.functional.silu(gate) * up
        assert_same(observer.stats[key], mine_Tm.detach())


# A method for this test only: it records its arguments and packs like rtn.
SEEN: list[dict[str, Any]] = []


class Spy(RTN):
    name = "spy"
    statistics: ClassVar[Statistics] = {
        "absmax": "original",
        "hessian": "packed",
        "mean_abs": "packed",
    }

    def fit(
        self,
        block: Block,
        streams: Streams | None,
        stats: dict[str, LinearStats],
        generator: torch.Generator,
        tick: Tick,
    ) -> Fitted:
        assert streams is not None and block.module is not None
        SEEN.append(
            {
                "name": block.name,
                "original": streams.original.hidden_SLD.clone(),
                "packed": streams.packed.hidden_SLD.clone(),
                "stats": dict(stats),
                "draw": torch.rand(3, generator=generator),
            }
        )
        tick(0.5)
        report = FitReport(
            loss_start=1.0,
            loss_after=1.0,
            least_cosine=1.0,
            best_epoch=0,
            steps_skipped=0,
            rows_flipped=len(SEEN),
        )
        return Fitted(self.pack_each(block, dict(stats), generator), report)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Register a method `spy` that records its arguments."""
    row = Method(kind="quantizer", target=f"{__name__}:Spy", summary="", source="")
    monkeypatch.setitem(methods.METHODS, "spy", row)
    SEEN.clear()
    return SEEN


def block_inputs(model: PreTrainedModel, names: list[str], ids_BL: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.inference_mode():
        model(input_ids=ids_BL, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_method_is_shown_both_streams_and_their_statistics(
    checkpoint: Checkpoints,
    compress: Compress,
    spy: list[dict[str, Any]],
    text_file: str,
    family: str,
) -> None:
    source = checkpoint(family)
    job = {"calibration": [text_file], "samples": 5, "seq_len": 40}
    out = compress(source, "spy", bits=2, job=job, run={"batch_size": 2})
    original = AutoModelForCausalLM.from_pretrained(source)
    packed = AutoModelForCausalLM.from_pretrained(out)
    assert packed_modules(packed)
    # The first blocks' inputs are embeddings: find the tokens by them.
    ids_SL = calibration_ids(source, text_file, samples=5, length=40)
    names = [shown["name"] for shown in spy]
    for model, side in ((original, "original"), (packed, "packed")):
        for shown, want in zip(spy, block_inputs(model, names, ids_SL), strict=True):
            torch.testing.assert_close(shown[side], want, rtol=1e-4, atol=1e-4)
    assert torch.equal(spy[0]["original"], spy[0]["packed"])
    assert not torch.allclose(spy[1]["original"], spy[1]["packed"], atol=1e-3)
    assert not torch.equal(spy[0]["draw"], spy[1]["draw"])

    # Statistics of the packed stream: the original block, fed with the packed one's hidden states.
    shown = spy[1]
    block = original.get_submodule(shown["name"])
    wanted: dict[str, tuple[Statistic, ...]] = {
        "original": ("absmax",),
        "packed": ("mean_abs", "hessian"),
    }
    for side, asked in wanted.items():

        def run(side: str = side) -> None:
            with torch.inference_mode(), replaced_input(block, shown[side]):
                original(input_ids=ids_SL, use_cache=False)

        for leaf, x_Tm in inputs_of(original, block, run).items():
            stats = shown["stats"][f"{shown['name']}.{leaf}"]
            # The start token of each sequence is not counted.
            x_Tm = x_Tm.view(5, 40, -1)[:, 1:].flatten(0, 1)
            assert stats.num_tokens == 5 * 39
            for name in asked:
                want = statistics(x_Tm)[name]
                atol = 1e-4 * float(want.abs().max())
                torch.testing.assert_close(
                    getattr(stats, name).double(), want, rtol=1e-3, atol=atol
                )


class replaced_input:
    """Replace the input of a block inside the context."""

    def __init__(self, block: nn.Module, hidden_SLD: Tensor) -> None:
        self.block, self.hidden_SLD = block, hidden_SLD

    def __enter__(self) -> None:
        self.handle = self.block.register_forward_pre_hook(
            lambda m, args, kwargs: ((self.hidden_SLD, *args[1:]), kwargs), with_kwargs=True
        )

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


def calibration_ids(source: Path, text_file: str, *, samples: int, length: int) -> Tensor:
    from spectool.model.loading import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(source))
    ids = tokenizer(Path(text_file).read_text(), add_special_tokens=False)["input_ids"]
    return sample_sequences(
        ids,
        samples=samples,
        length=length,
        bos=tokenizer.bos_token_id,
        generator=torch.Generator().manual_seed(0),
    )


def test_experts_that_saw_few_tokens_are_packed_without_statistics_and_listed(
    checkpoint: Checkpoints,
    compress: Compress,
    spy: list[dict[str, Any]],
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("mixtral")
    job = {"calibration": [text_file], "samples": 4, "seq_len": 32, "allow_dense": True}
    monkeypatch.setattr("spectool.quantize.pack.MIN_EXPERT_TOKENS", 64)
    reports: list[Any] = []
    compress(source, "spy", bits=4, job=job, reports=reports)
    (report,) = reports
    for shown, block in zip(spy, report.blocks, strict=True):
        listed = set(block.data_free)
        experts = {layer.name for layer in block.layers if ".experts." in layer.name}
        assert listed == experts - shown["stats"].keys()
    # Both kinds occur: 128 tokens, each sent to two of four experts.
    assert any(block.data_free for block in report.blocks)
    assert any(
        ".experts." in key and stats.num_tokens >= 64
        for shown in spy
        for key, stats in shown["stats"].items()
    )


def test_windows_are_pieces_of_the_text_after_the_start_token() -> None:
    ids = list(range(100, 1100))
    generator = torch.Generator().manual_seed(0)
    rows = sample_sequences(ids, samples=7, length=42, bos=3, generator=generator)
    assert rows.shape == (7, 42) and (rows[:, 0] == 3).all()
    assert (rows[:, 2:] - rows[:, 1:-1] == 1).all() and rows[:, 1:].min() >= 100
    assert len(set(rows[:, 1].tolist())) == 7
    again = sample_sequences(
        ids, samples=7, length=42, bos=3, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(rows, again)


@pytest.mark.parametrize(("samples", "length"), [(6, 20), (10, 48), (20, 48), (400, 48)])
def test_windows_are_even_over_the_text_and_never_overlap(samples: int, length: int) -> None:
    """Five kinds of text get sequences in proportion, in random order."""
    ids = list(range(1000))
    generator = torch.Generator().manual_seed(1)
    rows = sample_sequences(ids, samples=samples, length=length, bos=None, generator=generator)
    assert rows.unique().numel() == rows.numel() and rows.shape[0] == min(samples, 1000 // length)
    counts = (rows // 200).flatten().bincount(minlength=5)
    assert counts.max() - counts.min() <= 2 * length
    assert rows[:, 0].tolist() != sorted(rows[:, 0].tolist())
    if samples == 400:
        assert rows.numel() > 1000 - length, "all of it was used"


def test_windows_without_a_start_token_reach_both_ends() -> None:
    ids = list(range(10))
    starts = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        row = sample_sequences(ids, samples=1, length=8, bos=None, generator=generator)
        starts.add(int(row[0, 0]))
    assert starts == {0, 1, 2}


def test_no_more_windows_than_the_text_holds() -> None:
    generator = torch.Generator()
    assert (
        len(sample_sequences([5] * 100, samples=128, length=30, bos=None, generator=generator)) == 3
    )
    assert (
        len(sample_sequences([5] * 30, samples=128, length=30, bos=None, generator=generator)) == 1
    )


@pytest.mark.parametrize(("have", "bos"), [(29, None), (28, 0), (0, None)])
def test_text_shorter_than_one_window(have: int, bos: int | None) -> None:
    with pytest.raises(TextError, match=f"has {have} tokens, fewer than one sequence of 30"):
        sample_sequences([5] * have, samples=1, length=30, bos=bos, generator=torch.Generator())
