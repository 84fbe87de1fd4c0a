"""Stored bits are counted from headers: by hand, by the formula, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectool.checkpoint.headers import read_layout
from spectool.quantize.ledger import measure

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]


def test_every_byte_is_counted_once(checkpoint: Checkpoints, compress: Compress) -> None:
    out = compress(checkpoint("llama", dtype=torch.bfloat16), bits=3, group_size=42)
    ledger = measure(read_layout(out))
    stored = {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}
    for entry in ledger.entries:
        mine = [t for key, t in stored.items() if key.startswith(f"{entry.name}.q.")]
        assert entry.num_bytes == sum(t.numel() * t.element_size() for t in mine) > 0
        n, m = entry.shape
        assert entry.bits == 8 * entry.num_bytes / (n * m)
    packed = sum(e.shape[0] * e.shape[1] for e in ledger.entries)
    dense = sum(t.numel() for key, t in stored.items() if ".q." not in key)
    assert (ledger.packed_weights, ledger.dense_parameters) == (packed, dense)
    # 4 attention and 3 feed-forward matrices in each of two layers.
    assert packed == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 56 * 32)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert ledger.file == 8 * size / (packed + dense)


def test_formula_by_hand(checkpoint: Checkpoints, compress: Compress) -> None:
    ledger = measure(read_layout(compress(checkpoint("llama"), bits=4, group_size=0)))
    by_name = {entry.name: entry.bits for entry in ledger.entries}
    # 32 inputs: 16 bytes of codes, 3 of scale and zero; 56 inputs: 28 and 3.
    assert by_name["model.layers.0.mlp.up_proj"] == 8 * 19 / 32
    assert by_name["model.layers.0.mlp.down_proj"] == 8 * 31 / 56


def test_dense_checkpoint(checkpoint: Checkpoints) -> None:
    source = checkpoint("llama", dtype=torch.bfloat16)
    ledger = measure(read_layout(source))
    assert ledger.entries == () and ledger.linears is None
    assert ledger.file == pytest.approx(16, rel=0.15) and ledger.file > 16


def test_counting_needs_no_torch(checkpoint: Checkpoints, compress: Compress) -> None:
    out = compress(checkpoint("llama"))
    code = (
        "import sys, json; from pathlib import Path\n"
        "from spectool.checkpoint.headers import read_layout\n"
        "from spectool.quantize.ledger import measure\n"
        "ledger = measure(read_layout(Path(sys.argv[1])))\n"
        "print(json.dumps([ledger.linears, ledger.file, 'torch' in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True
    )
    ledger = measure(read_layout(out))
    assert json.loads(run.stdout) == [ledger.linears, ledger.file, False]
