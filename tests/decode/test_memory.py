"""A packed checkpoint is decoded in little more memory than its file takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.kernels import build
from spectool.methods import import_method
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

from ..conftest import COMMON, tokenizer

LAYERS, WIDTH = 4, 2048
PROMPT, NEW_TOKENS = "def run(path: Path) -> None:\n" * 4, 8
# Python, torch and transformers, and one matrix being laid out anew.
BESIDES = 600e6

# The command's own peak: that of a child, as its parent sees it, may be the parent's.
RUN = """
import sys
from spectool.cli import app
try:
    app(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print("peak", status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(build.missing_products() is not None, reason="no kernel here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["int8", "rtn"])
def test_peak_of_generate(tmp_path: Path, method: str, dtype: str) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 5632,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": COMMON["num_attention_heads"],
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(LlamaConfig(**{**COMMON, **sizes})).save_pretrained(source)
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer().save_pretrained(source)
    job = QuantizeJob(method=method, config=import_method(method, "quantizer").Config())
    quantize(open_checkpoint(source), packed, job)
    words = ["generate", packed, "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS]
    words += ["--runtime", "packed", "--dtype", dtype, "--draft", "none"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, check=True
    )
    assert "28 linears packed (by kernel" in done.stderr
    tokens = len(tokenizer()(PROMPT)["input_ids"]) + NEW_TOKENS
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    # Keys and values of all layers; of one layer at a time a dozen tensors as wide as its MLP.
    cache, activations = 2 * LAYERS * tokens * WIDTH * size, 12 * tokens * 5632 * 4
    limit = 1.15 * read_layout(packed).num_bytes + cache + activations + BESIDES
    peak = 1024 * int(done.stderr.rpartition("peak")[2])
    print(f"{method}, {dtype}: peak {peak / 1e6:.0f} MB of {limit / 1e6:.0f} MB")
    assert peak <= limit
