"""Block-by-block runs: probes, calls, activations, and models that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UnsupportedError
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, run_block
from spectool.model.shell import BlockProbe, Call, ModelShell
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.gptq import GPTQ
from spectool.quantize.run import quantize

from ..conftest import tokenizer
from ..shrunken import build, tiny_config

Checkpoints = Callable[..., Path]

IDS_BL = torch.randint(2, 300, (3, 37), generator=torch.Generator().manual_seed(0))


def shell(source: Path, dtype: torch.dtype = torch.float32) -> ModelShell:
    opened = open_checkpoint(source)
    architecture = Architecture(opened)
    return ModelShell(architecture, dtype=dtype, device=torch.device("cpu"), with_lm_head=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "opt", "gpt_neox"])
def test_blocks_receive_what_the_model_gives_them(checkpoint: Checkpoints, family: str) -> None:
    source = checkpoint(family)
    around = shell(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for name in around.architecture.blocks:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
    hiddens = []
    for name in around.architecture.blocks:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out: hiddens.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.inference_mode():
        want = model(input_ids=IDS_BL, use_cache=False).logits
    assert torch.equal(around.embed(IDS_BL), seen[0][0][0])
    for call, (args, kwargs) in zip(around.calls(*IDS_BL.shape), seen, strict=True):
        assert same(call.args, args[1:])
        assert same(call.kwargs, kwargs)
    assert torch.equal(around.logits(IDS_BL, hiddens[-1]), want)
    # The override is gone again.
    assert torch.equal(around.embed(IDS_BL), seen[0][0][0])


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(first == second)


def test_only_what_surrounds_the_blocks_is_loaded(checkpoint: Checkpoints) -> None:
    around = shell(checkpoint("llama"))
    around.embed(torch.tensor([[7, 3, 7]]))
    real = {name: p.shape for name, p in around.model.named_parameters() if not p.is_meta}
    # Of the input embedding only the rows that a batch needs, and only while it does.
    assert around.model.model.embed_tokens.embedding.weight.shape[1] == 1
    assert set(real) == {"model.norm.weight", "lm_head.weight"}
    tied = shell(checkpoint("llama-tied")).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_without_head_only_rows_of_a_tied_table_are_loaded(checkpoint: Checkpoints) -> None:
    opened = open_checkpoint(checkpoint("llama-tied"))
    architecture = Architecture(opened)
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    around = ModelShell(architecture, with_lm_head=False, **where)
    hidden_BLD = around.embed(IDS_BL)
    table = opened.read("model.embed_tokens.weight")
    assert torch.equal(hidden_BLD, table[IDS_BL])
    assert around.model.lm_head.weight.is_meta
    assert len(around.calls(2, 9)) == len(architecture.blocks)


def test_dtype_of_activations(checkpoint: Checkpoints) -> None:
    around = shell(checkpoint("llama"), torch.bfloat16)
    hidden_BLD = around.embed(IDS_BL)
    assert hidden_BLD.dtype == torch.bfloat16
    assert around.logits(IDS_BL, hidden_BLD).dtype == torch.bfloat16


def test_a_norm_that_stays_in_float32_is_not_rounded_first(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    norm = shell(tmp_path, torch.float16).model.model.norm.weight
    assert norm.dtype == torch.float32 and torch.equal(norm, model.model.norm.weight)


def test_calls_are_made_for_each_shape(checkpoint: Checkpoints) -> None:
    around = shell(checkpoint("llama"))
    first = around.calls(2, 9)
    assert around.calls(2, 9) is first
    cos, _ = first[0].kwargs["position_embeddings"]
    assert cos.shape[-2] == 9
    cos, _ = around.calls(1, 5)[0].kwargs["position_embeddings"]
    assert cos.shape[-2] == 5


def test_model_whose_blocks_look_at_the_text_is_refused(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = shell(checkpoint("llama"))
    original = BlockProbe.forward

    def forward(self: BlockProbe, hidden_BLD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden_BLD, *args, **kwargs, extra=hidden_BLD.sum())

    monkeypatch.setattr(BlockProbe, "forward", forward)
    with pytest.raises(UnsupportedError, match="cannot be walked block by block"):
        around.calls(1, 4)


def test_probe_answers_for_its_block() -> None:
    block = nn.Linear(3, 3)
    block.attention_type = "full_attention"  # type: ignore[assignment]
    probe = BlockProbe(block)
    assert probe.attention_type == "full_attention" and not list(probe.parameters())
    x = torch.randn(1, 2, 3)
    assert probe(x, 1, key=2) is x and probe.call == Call((1,), {"key": 2})
    probe.extra_outputs, probe.override = (None,), x + 1
    assert probe(x) == (probe.override, None)
    assert not probe.used_names and probe.weight is block.weight and probe.used_names == {"weight"}
    with pytest.raises(AttributeError):
        probe.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "mamba", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_one_by_one_are_the_model(
    checkpoint: Checkpoints, family: str, dtype: torch.dtype
) -> None:
    source = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    # As the blocks have it: gradients and grouped experts choose other BLAS calls, which move the
    # last bits on a processor without AVX-512 (MKL_ENABLE_INSTRUCTIONS=AVX2).
    model.requires_grad_(False)
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        want = model(input_ids=IDS_BL, use_cache=False).logits
    assert torch.equal(logits_by_block(source, dtype), want)


def logits_by_block(source: Path, dtype: torch.dtype) -> torch.Tensor:
    around = shell(source, dtype)
    hidden_BLD = around.embed(IDS_BL)
    architecture = around.architecture
    for name, call in zip(architecture.blocks, around.calls(*IDS_BL.shape), strict=True):
        tensors = architecture.read(architecture.block_tensors(name))
        block = architecture.build_module(name, tensors, dtype=dtype, device=torch.device("cpu"))
        hidden_BLD = run_block(block, call, hidden_BLD)
    return around.logits(IDS_BL, hidden_BLD)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["youtu", "llama"])
def test_a_padding_row_is_what_transformers_makes_of_it(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Youtu's padding row is zeros whatever is stored, Llama's is the stored one."""
    config = tiny_config(kind, tie_word_embeddings=tied)
    config.pad_token_id = int(IDS_BL[0, 5])
    build(config).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    stored_VD = opened.read("model.embed_tokens.weight")
    assert stored_VD[config.pad_token_id].any()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    table_VD = model.get_input_embeddings().weight
    assert table_VD[config.pad_token_id].any() == (kind == "llama")
    with torch.inference_mode():
        want = model(input_ids=IDS_BL, use_cache=False).logits
    torch.testing.assert_close(logits_by_block(tmp_path, torch.float32), want)
    read = Architecture(opened).read(["model.embed_tokens.weight"])
    assert torch.equal(read["model.embed_tokens.weight"], table_VD)


def test_what_surrounds_the_blocks_is_built_once(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, original = [], ModelShell.__init__

    def counted(self: ModelShell, *args: Any, **kwargs: Any) -> None:
        built.append(kwargs["with_lm_head"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(ModelShell, "__init__", counted)
    job = QuantizeJob(method="gptq", config=GPTQ.Config(), samples=2, seq_len=8, allow_dense=True)
    quantize(open_checkpoint(checkpoint("llama")), tmp_path / "out", job)
    assert built == [False]


REFUSED = {
    "rwkv": ("Rwkv", {"attention_hidden_size": 32}, "uses weight of its blocks"),
    "big_bird": ("BigBird", {"is_decoder": True}, "uses set_attention_type of its blocks"),
    "gemma3n": (
        "Gemma3nText",
        {
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
            "laurel_rank": 4, "activation_sparsity_pattern": None,
        },
        "more dimensions than batch, length and width",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(REFUSED))
def test_model_that_cannot_be_walked_is_refused_before_work_begins(
    tmp_path: Path, family: str
) -> None:
    prefix, options, reason = REFUSED[family]
    common = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{prefix}Config")(**common | options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    job = QuantizeJob(method="gptq", config=GPTQ.Config(), samples=2, seq_len=8, allow_dense=True)
    with pytest.raises(UnsupportedError, match=reason):
        quantize(open_checkpoint(tmp_path / "model"), tmp_path / "out", job)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("hy_v4", {}, "hidden states have more dimensions than batch, length and width"),
        ("reformer", {"is_decoder": True}, "called with something else than hidden states first"),
    ],
)
def test_what_another_code_says_is_no_reason(
    tmp_path: Path, kind: str, more: dict[str, Any], reason: str
) -> None:
    """With probes that return too little, these models raise built-in errors of Python."""
    model = build(tiny_config(kind, **more))
    model.save_pretrained(tmp_path)
    message = f"{type(model).__name__}: cannot be walked block by block: .*{reason}$"
    with pytest.raises(UnsupportedError, match=message):
        shell(tmp_path)


def test_a_model_that_takes_nothing_of_its_blocks_is_refused_in_plain_words(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: BlockProbe, hidden_BLD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("unhashable type: 'list'")

    monkeypatch.setattr(BlockProbe, "forward", forward)
    with pytest.raises(UnsupportedError, match="its blocks return other things than hidden states"):
        shell(checkpoint("llama"))


def test_run_block_takes_tuples_and_tensors() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, *, pair: bool) -> Any:
            return (2 * x, None) if pair else 2 * x

    x = torch.ones(1, 1, 2)
    for pair in (False, True):
        assert torch.equal(run_block(Twice(), Call((), {"pair": pair}), x), 2 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_file", [False, True])
def test_activations(tmp_path: Path, in_file: bool, dtype: torch.dtype) -> None:
    file = tmp_path / "a.bin" if in_file else None
    buffer = Activations((5, 3, 2), dtype, file=file)
    slices = list(buffer.batches(2))
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for index, batch in enumerate(slices):
        buffer.hidden_SLD[batch] = index
    assert buffer.hidden_SLD[:, 0, 0].tolist() == [0, 0, 1, 1, 2]
    assert buffer.hidden_SLD.shape == (5, 3, 2) and buffer.hidden_SLD.dtype == dtype
