"""Bad input: one clear line, exit code 2, nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from spectool import load
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import find_extra_blocks
from spectool.checkpoint.tensors import open_checkpoint
from spectool.model.architecture import Architecture

from ..conftest import contents

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def emptied(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def missing(path: Path) -> None:
    (path / "model.safetensors").unlink()


def lying(path: Path) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"][0] += 1
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def overlapping(path: Path) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [key for key in header if key != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    header[names[1]]["shape"] = header[names[0]]["shape"]
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def not_a_number(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def infinite(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = torch.inf
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def absent_file(path: Path) -> None:
    (path / "model.safetensors").rename(path / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def absent_tensor(path: Path) -> None:
    (path / "model.safetensors").rename(path / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"model.gone": "weights.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "cheese"}))


def quantized(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))


DAMAGE = {
    truncated: "truncated",
    emptied: "too short",
    missing: "no safetensors weights",
    lying: "is damaged",
    overlapping: "overlaps",
    not_a_number: "NaN or infinite",
    infinite: "NaN or infinite",
    absent_file: "gone.safetensors: no such file",
    absent_tensor: "model.gone is in",
    unknown: "unknown architecture",
    quantized: "quantized already (gptq)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    damage(model)
    done = spectool("quantize", "rtn", model, tmp_path / "out")
    refuses(done, DAMAGE[damage])
    assert not (tmp_path / "out").exists()
    as_json = spectool("quantize", "rtn", model, tmp_path / "out", "--json")
    assert as_json.json["error"]["exit_code"] == 2


def refuses(done: Any, message: str) -> None:
    assert done.code == 2, (done.code, done.err)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0], done.err
    assert "Traceback" not in done.err


def test_no_tokenizer(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    refuses(spectool("eval", model, "--text", text), "no tokenizer")
    refuses(spectool("generate", model, "--prompt", "a"), "no tokenizer")
    out = tmp_path / "out"
    refuses(spectool("quantize", "rtn", model, out, "--calibration", text), "no tokenizer")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a\0b", "binary"),
    ],
)
def test_a_text_that_is_none(
    data: bytes, message: str, spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "bad.txt").write_bytes(data)
    model, bad = checkpoint("llama"), tmp_path / "bad.txt"
    refuses(spectool("eval", model, "--text", bad), message)
    refuses(spectool("bench", model, "--prompts", bad), message)
    refuses(spectool("quantize", "rtn", model, tmp_path / "o", "--calibration", bad), message)


def test_a_text_shorter_than_a_window(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    model, short = checkpoint("llama"), tmp_path / "short.txt"
    refuses(spectool("eval", model, "--text", short), "fewer than one window")
    done = spectool("quantize", "rtn", model, tmp_path / "o", "--calibration", short)
    refuses(done, "fewer than one sequence")


def test_an_output_that_exists(spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    assert spectool("quantize", "rtn", model, out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refuses(spectool("quantize", "int8", model, out), "exists already")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert spectool("quantize", "int8", model, out, "--overwrite").code == 0
    assert spectool("inspect", out, "--json").json["method"] == "int8"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refuses(spectool("quantize", "rtn", model, mine, "--overwrite"), "not written by spectool")
    assert (mine / "thesis.txt").exists()
    inside = copy(model, tmp_path / "model") / "out"
    refuses(spectool("quantize", "rtn", tmp_path / "model", inside), "outside the source")


def test_two_runs_on_one_output(spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", identity={}):
        done = spectool("quantize", "rtn", checkpoint("llama"), tmp_path / "out")
    refuses(done, "another run is writing it")


def test_options_that_will_not_do(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, prompts: Path
) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    refuses(spectool("quantize", "rtn", model, out, "--bits", 9), "at most 8")
    refuses(spectool("quantize", "rtn", model, out, "--skip", "cheese"), "matches no linear")
    refuses(spectool("quantize", "rtn", model, out, "--skip", "mlp"), "would stay dense")
    refuses(spectool("quantize", "rtn", model, out, "--device", "cheese"), "device cheese")
    refuses(spectool("generate", model, "--prompt", "a", "--dtype", "int3"), "dtype int3")
    refuses(spectool("generate", model, "--prompt", "a", "--draft", "ngrm"), "ngrm")
    refuses(spectool("generate", model, "--prompt", "a", "--runtime", "x"), "runtime x")
    sampled = ["--temperature", 1, "--verify", "greedy"]
    refuses(spectool("generate", model, "--prompt", "a", *sampled), "greedy")
    refuses(spectool("bench", model, "--prompts", tmp_path / "absent.txt"), "no such file")
    refuses(spectool("inspect", tmp_path / "absent"), "no such directory")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_stopped_run_exits_130_and_goes_on_later(
    number: signal.Signals,
    spectool: Spectool,
    checkpoint: Checkpoint,
    tmp_path: Path,
    text: Path,
) -> None:
    model = checkpoint("llama", num_hidden_layers=24)
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    words = ["quantize", "rtn", str(model), str(out)]
    options = ["--calibration", str(text), "--samples", "16", "--seq-len", "64"]
    run = subprocess.Popen(
        [sys.executable, "-m", "spectool", *words, *options],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(run.pid, number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert partial.exists() and not out.exists()
    assert spectool(*words, *options).code == 0
    assert spectool("quantize", "rtn", model, fresh, *options).code == 0
    assert contents(fresh) == contents(out)


def test_weights_that_are_no_numbers_are_refused_by_every_command(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path, prompts: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    not_a_number(model)
    refuses(spectool("generate", model, "--prompt", "a"), "NaN or infinite")
    refuses(spectool("eval", model, "--text", text), "NaN or infinite")
    refuses(spectool("bench", model, "--prompts", prompts), "NaN or infinite")


def test_an_output_matrix_that_is_no_numbers_costs_the_same_line_block_by_block(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][7, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = "lm_head.weight: 1 of 10240 weights are NaN or infinite"
    refuses(spectool("eval", model, "--text", text), message)
    refuses(spectool("eval", model, "--text", text, "--blockwise"), message)
    refuses(spectool("quantize", "rtn", model, tmp_path / "out"), message)
    assert not list(tmp_path.glob("out*"))


def test_ends_of_text_that_cannot_be_read_are_not_forgotten(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, ')
    refuses(spectool("generate", model, "--prompt", "a"), "generation_config.json: not valid JSON")


def test_a_model_of_images_is_named_by_every_command(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"model_type": "clip"}))
    message = "clip: transformers has no causal model for it"
    refuses(spectool("eval", model, "--text", text), message)
    refuses(spectool("generate", model, "--prompt", "a"), message)
    refuses(spectool("quantize", "rtn", model, tmp_path / "out"), message)


def test_whole_numbers_in_the_place_of_weights(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    """As in a checkpoint whose `quantization_config` was lost."""
    model = copy(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (50 * tensors[name]).to(torch.int8)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = f"{name} is stored as I8, expected floating-point weights"
    refuses(spectool("eval", model, "--text", text), message)
    refuses(spectool("eval", model, "--text", text, "--blockwise"), message)
    refuses(spectool("generate", model, "--prompt", "a"), message)
    refuses(spectool("quantize", "int8", model, tmp_path / "out"), message)
    assert not list(tmp_path.glob("out*"))


def test_eight_bit_floats_without_scales_are_weights(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = copy(checkpoint("llama"), tmp_path / "model")
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    done = spectool("quantize", "int8", model, tmp_path / "out")
    assert done.code == 0, done.err
    name = "model.layers.1.mlp.up_proj"
    weight_NM = load(tmp_path / "out").get_submodule(name).dequantize()
    error_NM = weight_NM - tensors[f"{name}.weight"].float()
    assert error_NM.norm() < 0.01 * weight_NM.norm()


@pytest.mark.parametrize(("data", "message"), [(b"\xff\xfe", "not UTF-8"), (b"", "no prompt")])
def test_standard_input_that_is_no_prompt(
    data: bytes, message: str, spectool: Spectool, checkpoint: Checkpoint
) -> None:
    refuses(spectool("generate", checkpoint("llama"), stdin=data), message)


def test_what_nobody_foresaw_is_one_line_and_one_object(
    spectool: Spectool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("spectool.checkpoint.headers.read_layout", fail)
    done = spectool("inspect", tmp_path, "--json")
    assert done.code == 1 and "RuntimeError: surprise" in done.err
    assert done.json["error"]["exit_code"] == 1
    assert "Traceback" in spectool("inspect", tmp_path, "--debug").err


def test_an_adapter_is_named_by_every_command(spectool: Spectool, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    path, out = tmp_path / "lora", tmp_path / "out"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 50)
    for words in (
        ["quantize", "int8", path, out],
        ["quantize", "auto", path, out, "--bits", "2"],
        ["train-heads", "medusa", path, out, "--data", text],
        ["tune", path, path, "--prompts", text],
        ["eval", path],
        ["bench", path, "--prompts", text],
        ["generate", path, "--prompt", "a"],
        ["chat", path],
        ["inspect", path],
        ["export", path, out, "--format", "dense"],
    ):
        done = spectool(*words)
        assert done.code == 2 and "is a LoRA adapter of org/base" in done.err, (words, done.err)
        assert not out.exists()


def test_stored_tensors_without_a_place_are_named(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = copy(checkpoint("llama"), tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    more = {**extra, **ignored, "mtp.fc.weight": torch.ones(4, 4)}
    save_file({**tensors, **more}, path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(path)
    wanted = sorted([*extra, "mtp.fc.weight"])
    assert Architecture(opened).unused == wanted == find_extra_blocks(opened.layout)
    done = spectool("generate", path, "--prompt", "a", "--max-new-tokens", 2, "--draft", "none")
    assert "10 stored tensors have no place in LlamaForCausalLM" in done.err
    assert done.code == 0 and "model.layers.2.* (9), mtp.fc.weight" in done.err
    dry = spectool("quantize", "rtn", path, tmp_path / "q", "--dry-run", "--json")
    assert dry.json["unused"] == wanted and "model.layers.2.* (9)" in dry.err
    assert spectool("inspect", path, "--json").json["unused"] == wanted
    assert Architecture(open_checkpoint(checkpoint("llama"))).unused == []


def overflowing(path: Path, factor: float) -> None:
    """Make weights that are finite, with a second block whose output is not."""
    tensors = load_file(path / "model.safetensors")
    for part in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{part}.weight"] *= factor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def fails_at_the_second_block(done: Any) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 1 and len(errors) == 1, done.err
    assert "model.layers.1" in errors[0] and "NaN or infinite" in errors[0], errors


def test_an_overflow_is_no_perplexity(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    good, model = checkpoint("llama"), copy(checkpoint("llama"), tmp_path / "model")
    overflowing(model, 1e30)
    how = ["--text", text, "--window", 64, "--limit", 400]
    fails_at_the_second_block(spectool("eval", model, *how))
    fails_at_the_second_block(spectool("eval", model, *how, "--blockwise"))
    fails_at_the_second_block(spectool("eval", good, *how, "--reference", model))
    assert spectool("eval", model, *how, "--json").json["error"]["exit_code"] == 1
    done = spectool("generate", model, "--prompt", "a", "--draft", "none", "--max-new-tokens", 2)
    fails_at_the_second_block(done)


def test_an_overflow_ends_what_learns_from_text(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path
) -> None:
    model, out = copy(checkpoint("llama"), tmp_path / "model"), tmp_path / "out"
    overflowing(model, 1e3)
    how = ["--calibration", text, "--samples", 2, "--seq-len", 32, "--dtype", "float16"]
    for method in ("rtn", "gptq"):
        fails_at_the_second_block(spectool("quantize", method, model, out, *how, "--overwrite"))
        assert not out.exists()
    half = ["--data", text, "--seq-len", 64, "--dtype", "float16"]
    fails_at_the_second_block(spectool("train-heads", "medusa", model, tmp_path / "h", *half))


def test_a_token_beyond_the_embedding_is_one_message_everywhere(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model, out = copy(checkpoint("llama"), tmp_path / "model"), tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("<|im_start|> Once upon a time there was\n" * 40)
    for words in (
        ["train-heads", "medusa", model, out, "--data", text, "--seq-len", 64],
        ["quantize", "gptq", model, out, "--calibration", text, "--samples", 4, "--seq-len", 64],
        ["eval", model, "--text", text, "--window", 64],
        ["eval", model, "--text", text, "--window", 64, "--blockwise"],
        ["generate", model, "--prompt", "<|im_start|>"],
        ["bench", model, "--prompts", text, "--draft", "ngram"],
    ):
        done = spectool(*words)
        refuses(done, f"{model}: its tokenizer gives id 320, but the model has only 320 tokens")


@pytest.mark.parametrize(
    "stored", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_a_float64_checkpoint(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path, text: Path, stored: torch.dtype
) -> None:
    model, out = copy(checkpoint("llama", dtype=torch.float64), tmp_path / "model"), tmp_path / "o"
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    how = ["--text", text, "--limit", 400, "--window", 64, "--json"]
    wanted = spectool("eval", checkpoint("llama"), *how).json["perplexity"]["value"]
    assert spectool("quantize", "int8", model, out).code == 0
    for path, near in ((model, 1e-4), (out, 0.05)):
        found = spectool("eval", path, *how)
        assert found.json["perplexity"]["value"] == pytest.approx(wanted, rel=near)
        assert "float64" in found.err
        words = ["--prompt", "def", "--max-new-tokens", 4, "--draft", "none"]
        assert spectool("generate", path, *words).code == 0
