"""Whole runs: model families, ways to load, companion files, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectool
from spectool.checkpoint.artifact import listed_files
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError, InputError, UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.model.blocks import run_block
from spectool.model.loading import load_model
from spectool.model.packed import packed_modules
from spectool.model.shell import ModelShell
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import measure
from spectool.quantize.methods.rtn import RTN

from ..conftest import contents

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]

FAMILIES = [
    "llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt",
    "gpt_neox", "mixtral", "qwen3_moe",
]  # fmt: skip
# In models this small the router alone is a tenth of a block.
ROUTERS = ("mixtral", "qwen3_moe")
MORE = [("gpt_neox", "ptq161"), ("mixtral", "nf4")]
IDS_BL = torch.tensor([[0, *range(40, 72)], [0, *range(90, 122)]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS_BL, use_cache=False).logits
    return found


def block_wise(path: Path) -> torch.Tensor:
    """Compute logits by walking the checkpoint's blocks one at a time."""
    checkpoint = open_checkpoint(path)
    architecture = Architecture(checkpoint)
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    shell = ModelShell(architecture, with_lm_head=True, **where)
    hidden_BLD = shell.embed(IDS_BL)
    calls = shell.calls(*IDS_BL.shape)
    for name, call in zip(architecture.blocks, calls, strict=True):
        tensors = architecture.read(architecture.block_tensors(name))
        block = architecture.build_module(name, tensors, **where)
        hidden_BLD = run_block(block, call, hidden_BLD)
    return shell.logits(IDS_BL, hidden_BLD)


def simulate(model: PreTrainedModel, packed: PreTrainedModel) -> None:
    """Write the dequantized weights into the source's model, by name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, module in packed_modules(packed).items():
            dense_nm = module.dequantize()
            parent, _, leaf = name.rpartition(".")
            if leaf.isdigit() and parent in parameters:
                experts = parameters[parent]
                assert not model.get_submodule(parent.rpartition(".")[0]).is_transposed
                experts[int(leaf)] = dense_nm
            else:
                weight = parameters[f"{name}.weight"]
                is_conv = type(model.get_submodule(name)).__name__ == "Conv1D"
                weight.copy_(dense_nm.T if is_conv else dense_nm)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "rtn") for family in FAMILIES),
        *((family, "int8") for family in ("llama-tied", "gpt2", "mixtral")),
        *((family, "ptq161") for family in ("llama-tied", "gpt2", "opt", "mixtral")),
        *((family, "nf4") for family in ("llama-tied", "gpt2")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_family_through_both_doors(
    checkpoint: Checkpoints, compress: Compress, text_file: str, family: str, method: str
) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    source = checkpoint(family)
    job: dict[str, Any] = {"allow_dense": family in ROUTERS, "samples": 2, "seq_len": 16}
    if method == "ptq161":
        job["calibration"] = [text_file]
    out = compress(source, method, job=job, **({"epochs": 1} if method == "ptq161" else {}))

    model = spectool.load(out, runtime="packed", activations="exact")
    assert not model.training and packed_modules(model)
    want = logits(load_model(open_checkpoint(out), keep_fields=True))
    other = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(other), want)

    assert torch.equal(block_wise(out), want), "block by block, packed"
    original = AutoModelForCausalLM.from_pretrained(source)
    reference = logits(original)
    assert torch.equal(block_wise(source), reference), "block by block, dense"

    dense = spectool.load(out, runtime="dense")
    assert not packed_modules(dense)
    simulate(original, model)
    exact = logits(original)
    scale = float(exact.abs().max())
    torch.testing.assert_close(logits(dense), exact, rtol=0, atol=1e-5 * scale)
    for found in (want, logits(model)):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * scale)
    assert not torch.equal(exact, reference)

    stored = {key for path in out.glob("*.safetensors") for key in load_file(path)}
    assert stored == set(other.state_dict()) - set(other.all_tied_weights_keys)
    assert all(name.startswith("packed-") for name in (p.name for p in out.glob("*.safetensors")))


def test_without_the_import_plain_transformers_refuses(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    out = compress(checkpoint("llama"))
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "assert not any(name.startswith('spectool') for name in sys.modules)\n"
        "try: A.from_pretrained(sys.argv[1])\n"
        "except OSError as error: print('refused', error)\n"
        "import spectool\n"
        "print(type(A.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("refused") and "model.safetensors" in run.stdout, run
    assert run.stdout.endswith("RTNLinear\n"), run


def test_sharding_of_the_source_leaves_no_trace(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    whole = compress(checkpoint("llama"), out="whole")
    shards = compress(checkpoint("llama", max_shard_size="20KB"), out="shards")
    assert contents(whole) == contents(shards)


def test_names_of_places_leave_no_trace(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint("llama"), moved)
    first, second = compress(checkpoint("llama"), out="a"), compress(moved, out="b")
    assert contents(first) == contents(second)
    for name, data in contents(second).items():
        assert str(tmp_path).encode() not in data, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_source(
    checkpoint: Checkpoints, compress: Compress, dtype: torch.dtype
) -> None:
    source = checkpoint("qwen3", dtype=dtype)
    out = compress(source)
    model = spectool.load(out)
    assert model.dtype == dtype
    original = load_file(source / "model.safetensors")
    copied = {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}
    dense = [name for name in copied if ".q." not in name]
    assert len(dense) > 4
    for name in dense:
        assert copied[name].dtype == dtype and torch.equal(copied[name], original[name])
    assert logits(model).dtype == dtype
    again = spectool.load(out, dtype="float32")
    assert again.dtype == torch.float32 and logits(again).dtype == torch.float32


def test_tied_head_is_stored_once_and_stays_tied(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    for family, tied in (("llama-tied", True), ("llama", False)):
        out = compress(checkpoint(family), out=family)
        assert ("lm_head.weight" in read_layout(out).tensors) != tied
        model = spectool.load(out)
        same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert same == tied


def test_companions_go_along(checkpoint: Checkpoints, compress: Compress, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    (source / "LICENSE.md").write_text("be nice")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    found = contents(compress(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE.md"):
        assert found[name] == (source / name).read_bytes()
    assert found["additional_chat_templates/tools.jinja"] == b"{{ tools }}"
    assert "spectool.load" in found["README.md"].decode()
    assert listed_files(tmp_path / "out") == set(found)
    assert not {"modeling_x.py", "pytorch_model.bin", "manifest.json"} & found.keys()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral"])
def test_readme_prints_the_measured_bits(
    checkpoint: Checkpoints, compress: Compress, family: str
) -> None:
    out = compress(checkpoint(family), bits=3, job={"allow_dense": family in ROUTERS})
    ledger = measure(read_layout(out))
    parameters = sum(p.numel() for p in spectool.load(out, runtime="dense").parameters())
    assert ledger.num_parameters == parameters
    weights = sum(path.stat().st_size for path in out.glob("packed-*.safetensors"))
    readme = (out / "README.md").read_text()
    assert f"all weight files | {8 * weights / parameters:.4f} |" in readme
    assert f"{len(ledger.entries)} packed matrices | {ledger.linears:.4f} |" in readme


def test_metadata_says_how_to_make_it_again(checkpoint: Checkpoints, compress: Compress) -> None:
    source = checkpoint("llama")
    out = compress(source, bits=3, job={"seed": 7})
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    fingerprint = open_checkpoint(source).fingerprint()
    assert quantization["quant_method"] == "spectool" and quantization["format_version"] == 2
    assert quantization["source"] == {"fingerprint": fingerprint, "revision": None}
    assert quantization["modules"]["model.layers.1.mlp.up_proj"] == {
        "method": "rtn",
        "options": {"bits": 3, "group_size": 128, "symmetric": False},
        "shape": [56, 32],
    }
    assert len(quantization["modules"]) == 14
    for path in out.glob("packed-*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["spectool"])
        assert metadata["seed"] == 7 and metadata["options"]["bits"] == 3
        assert metadata["source"]["fingerprint"] == fingerprint
        assert set(metadata["versions"]) == {"spectool", "torch", "transformers"}


def test_artifact_that_lost_or_gained_a_tensor_is_refused(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    out = compress(checkpoint("llama"))
    shard = out / "packed-00002-of-00003.safetensors"
    tensors = load_file(shard)
    index = json.loads((out / "packed.safetensors.index.json").read_text())
    # Without them another file would be refused for its bytes alone.
    del index["metadata"]["checksums"]
    name = "model.layers.1.mlp.up_proj.q.scale"

    def write(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, shard, metadata={"format": "pt"})
        rest = {key: file for key, file in index["weight_map"].items() if file != shard.name}
        weight_map = {**rest, **dict.fromkeys(changed, shard.name)}
        text = json.dumps({**index, "weight_map": weight_map})
        (out / "packed.safetensors.index.json").write_text(text)

    for changed in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        {key: tensor for key, tensor in tensors.items() if "up_proj" not in key},
        {**tensors, "model.layers.1.mlp.up_proj.q.extra": torch.zeros(3)},
        {**tensors, "stranger": torch.zeros(3)},
        {**tensors, name: torch.zeros(5, 1, dtype=torch.float16)},
        {k: t for k, t in tensors.items() if k != "model.layers.1.input_layernorm.weight"},
    ):
        write(changed)
        with pytest.raises(InputError) as caught:
            model = spectool.load(out)
            logits(model)
        assert "\n" not in str(caught.value)
    write(tensors)
    spectool.load(out)


def test_a_packed_model_is_not_saved_as_something_else(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    model = spectool.load(compress(checkpoint("llama")))
    with pytest.raises(UnsupportedError, match="not saved again"):
        model.save_pretrained(tmp_path / "again")


def test_already_quantized_sources_are_refused_by_name(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    out = compress(checkpoint("llama"))
    with pytest.raises(UnsupportedError, match=r"quantized already \(spectool\)"):
        compress(out, out="twice")
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint("llama"), foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"quantized already \(gptq\)"):
        compress(foreign, out="twice")
    assert not (tmp_path / "twice.partial").exists()


@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_out_and_source_must_lie_apart(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path, where: str
) -> None:
    source = tmp_path / "deep" / "source"
    shutil.copytree(checkpoint("llama"), source)
    before = contents(tmp_path)
    out = {"same": "deep/source", "inside": "deep/source/out", "around": "deep"}[where]
    with pytest.raises(UsageError):
        compress(source, out=out, run={"overwrite": True})
    with pytest.raises(UsageError):
        compress(source, out=out)
    assert contents(tmp_path) == before


BAD = [float("nan"), float("inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight",
     "model.embed_tokens.weight"],
)  # fmt: skip
def test_bad_weights_are_named_wherever_they_are(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path, name: str, bad: float
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^{name}: 1 of \d+ weights are NaN or infinite$"):
        compress(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_weights_beyond_the_stored_scale_are_named(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path, size: float
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"] *= size
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=rf"^{name}: its weights need a scale of"):
        compress(source)
    assert not (tmp_path / "out").exists()
    compress(source, job={"skip": ["1.mlp.up_proj"], "allow_dense": True}, run={"overwrite": True})


def test_missing_tensor_is_named_before_anything_is_written(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        compress(source)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}, "nonesuch"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no causal model"),
        ({}, "unknown architecture"),
    ],
)
def test_architectures_that_cannot_be_done_are_refused_by_name(
    tmp_path: Path, compress: Compress, config: dict[str, Any], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"x": torch.zeros(2)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=message) as caught:
        compress(source)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_matters_only_where_text_is_read(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    for path in source.glob("tokenizer*"):
        path.unlink()
    compress(source)
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        compress(source, "gptq", out="calibrated")
    assert "\n" not in str(caught.value)


def test_calibration_on_a_stream_without_an_end(
    checkpoint: Checkpoints, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def load_dataset(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
        nonlocal asked
        while True:
            asked += 1
            assert asked < 1000, "never stops"
            yield {"text": "the sheep are counted one by one until somebody sleeps"}

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    asks = {"calibration": ["hub:someone/stories"], "samples": 3, "seq_len": 32}
    out = compress(checkpoint("llama"), job=asks)
    made_by = json.loads((out / "config.json").read_text())["quantization_config"]["made_by"]
    assert made_by["calibration"]["samples"] == 3 and made_by["calibration"]["seq_len"] == 32
    assert asked < 100


def test_job_is_plain_data() -> None:
    job = QuantizeJob(method="rtn", config=RTN.Config())
    assert job.samples == 128 and job.seq_len == 2048 and job.skip == ()
