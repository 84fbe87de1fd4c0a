"""Plans against the artifacts that runs make, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UnsupportedError, UsageError
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.quantize.footprint import TextSize
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import measure
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.plan import QuantizePlan, make_plan
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.rules import make_skip_rules
from spectool.quantize.run import plan_job

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]


def plan(
    source: Path, method: str = "rtn", *, options: dict[str, Any] | None = None, **more: Any
) -> QuantizePlan:
    kind = import_method(method, "quantizer")
    quantizer = kind(kind.Config(**options or {}))
    rules = make_skip_rules(more.pop("skip", ()))
    return make_plan(Architecture(open_checkpoint(source)), quantizer, rules=rules, **more)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("rtn", {"bits": 3, "group_size": 7, "symmetric": True}),
        ("int8", {}),
        ("nf4", {}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_planned_bits_are_the_written_ones(
    checkpoint: Checkpoints, compress: Compress, family: str, method: str, options: dict[str, Any]
) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    source = checkpoint(family, dtype=torch.bfloat16)
    planned = plan(source, method, options=options, allow_dense=True)
    layout = read_layout(compress(source, method, job={"allow_dense": True}, **options))
    ledger = measure(layout)
    assert ledger.linears == planned.bits_linears
    assert ledger.packed_weights == planned.num_weights
    assert ledger.num_parameters == planned.num_parameters
    assert layout.num_bytes == planned.file_bytes
    assert len(ledger.entries) == sum(map(len, planned.matrices.values()))


def test_stray_integer_tensors_do_not_confuse_the_sizes(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama", dtype=torch.bfloat16), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.masked_bias"] = torch.zeros(1000, dtype=torch.int64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    planned = plan(source)
    written = read_layout(compress(source))
    assert "model.layers.0.self_attn.masked_bias" not in written.tensors
    assert planned.file_bytes == written.num_bytes
    assert planned.num_parameters == measure(written).num_parameters


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("layers.0", 7),
        ("down_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        ("*.q_proj", 2),
        ("model.layers.[01].self_attn.?_proj", 8),
    ],
)
def test_skip_patterns(checkpoint: Checkpoints, pattern: str, hit: int) -> None:
    planned = plan(checkpoint("llama"), skip=[pattern], allow_dense=True)
    assert len(planned.skipped) == hit and 14 - hit == sum(map(len, planned.matrices.values()))
    assert set(planned.skipped.values()) == {f"--skip {pattern}"}


def test_skipped_matrices_are_copied_bit_for_bit(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    source = checkpoint("llama")
    out = compress(source, job={"skip": ["down_proj"], "allow_dense": True})
    original = load_file(source / "model.safetensors")
    stored = {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}
    for index in (0, 1):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(stored[name], original[name])

    assert type(spectool.load(out).model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_parts_of_names_are_matched_whole(checkpoint: Checkpoints) -> None:
    source = checkpoint("llama", num_hidden_layers=11)
    planned = plan(source, skip=["layers.1"], allow_dense=True)
    assert {name.split(".")[2] for name in planned.skipped} == {"1"}


@pytest.mark.parametrize("pattern", ["k_projection", "layers.7", "*.nothing"])
def test_pattern_that_matches_nothing(checkpoint: Checkpoints, pattern: str) -> None:
    with pytest.raises(UsageError, match="matches no linear layer") as caught:
        plan(checkpoint("llama"), skip=["down_proj", pattern], allow_dense=True)
    assert pattern in str(caught.value)


def test_a_tenth_may_stay_dense_and_no_more(checkpoint: Checkpoints) -> None:
    source = checkpoint("llama", num_hidden_layers=11)
    planned = plan(source, skip=["layers.3"])
    assert len(planned.skipped) == 7
    with pytest.raises(UnsupportedError, match=r"18% of the blocks' weights would stay dense") as e:
        plan(source, skip=["layers.3", "layers.4"])
    assert e.value.hint is not None and "--allow-dense" in e.value.hint
    assert len(plan(source, skip=["layers.3", "layers.4"], allow_dense=True).skipped) == 14


def test_nothing_left_to_pack(checkpoint: Checkpoints) -> None:
    with pytest.raises(UnsupportedError, match="nothing in it can be packed"):
        plan(checkpoint("llama"), skip=["*"], allow_dense=True)


def test_experts_of_one_tensor_stay_together(checkpoint: Checkpoints) -> None:
    planned = plan(checkpoint("mixtral"), skip=["*.gate_up_proj.2"], allow_dense=True)
    left = [name for name, why in planned.skipped.items() if why.startswith("--skip")]
    assert len(left) == 8 and {name.rpartition(".")[2] for name in left} == {"0", "1", "2", "3"}


def test_routers_are_named_as_dense(checkpoint: Checkpoints) -> None:
    planned = plan(checkpoint("mixtral"), allow_dense=True)
    assert list(planned.skipped.values()) == ["chooses or weighs experts"] * 2


def test_buffers_follow_the_tokens(checkpoint: Checkpoints) -> None:
    source = checkpoint("llama")
    plain, calibrated = plan(source), plan(source, text=TextSize(total=1000))
    assert plain.buffer_bytes == 0 and calibrated.buffer_bytes == 1000 * 32 * 4
    assert calibrated.host_bytes > plain.host_bytes + 2 * calibrated.buffer_bytes
    assert plain.device_bytes == 0 and plan(source, on_device=True).device_bytes > 0


MEASURE = r"""
import json, re, sys
from pathlib import Path
from spectool.checkpoint.tensors import open_checkpoint
from spectool.report import Reporter
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize
from spectool.methods import import_method

class Heard(Reporter):
    def plan(self, plan):
        self.heard = plan

method, options = sys.argv[3], json.loads(sys.argv[4])
config = import_method(method, "quantizer").Config(**options)
calibration = sys.argv[5:] or None
job = QuantizeJob(method=method, config=config, calibration=calibration, samples=8, seq_len=256)
reporter = Heard()
quantize(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), job, reporter=reporter)
# Not ru_maxrss, which a child inherits from its parent.
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([peak, reporter.heard.host_bytes]))
"""


def test_texts_and_reshaping_are_counted(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, text = open_checkpoint(checkpoint("llama")), tmp_path / "text.txt"
    text.write_bytes(bytes(10**7))
    job = QuantizeJob(
        method="rtn", config=RTN.Config(), calibration=[str(text)], samples=2, seq_len=32
    )
    small = replace(job, calibration=())
    twice = replace(job, calibration=[str(text), str(text)])
    reshaped = replace(small, preprocess=Preprocess(text=["none"], batch_size=4000))

    def needs(job: QuantizeJob, device: str = "cpu") -> QuantizePlan:
        return plan_job(source, job, device=device)

    assert needs(job).host_bytes - needs(small).host_bytes > 10**9
    assert needs(twice).host_bytes - needs(job).host_bytes > 10**9
    assert needs(reshaped).host_bytes - needs(small).host_bytes > 10**8
    assert needs(reshaped, "cuda").device_bytes - needs(small, "cuda").device_bytes > 10**8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "calibrated", "layers"),
    [
        ("rtn", {}, False, 6),
        ("rtn", {}, True, 6),
        ("gptq", {}, True, 2),
        *((method, {"epochs": 1}, True, 2) for method in ("ptq161", "jlcm")),
    ],
)
def test_memory_stays_within_the_plan(
    checkpoint: Checkpoints,
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    calibrated: bool,
    layers: int,
) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers}
    source = checkpoint("llama", dtype=torch.bfloat16, **size)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n * n} sheep jump over {n} fences." for n in range(2000)))
    arguments = [str(source), str(tmp_path / "out"), method, json.dumps(options)]
    arguments += [str(text)] if calibrated else []
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    peak, promised = json.loads(run.stdout)
    assert peak < promised
