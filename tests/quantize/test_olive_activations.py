"""OliVe's rounded inputs against rounding pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UnsupportedError, UsageError
from spectool.quantize.export import export
from spectool.quantize.ledger import measure
from spectool.quantize.methods.olive import FACTORS, TYPES, OliVe, OliVeActivations
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.statistics import SAMPLED, LinearStats

GENERATOR = torch.Generator()


def outliers(tokens: int, m: int, *, seed: int = 0) -> Tensor:
    """Draw inputs with two large columns, as language models have them."""
    noise = torch.Generator().manual_seed(seed)
    x_Tm = torch.randn(tokens, m, generator=noise)
    x_Tm[:, m // 3] *= 20
    x_Tm[:, 2 * m // 3] *= 12
    return x_Tm


def made(x_Tm: Tensor, bits: int = 4, *, seed: int = 1) -> tuple[Any, dict[str, Tensor]]:
    m = x_Tm.shape[1]
    noise = torch.Generator().manual_seed(seed)
    weight_nm = torch.randn(7, m, generator=noise)
    stats = LinearStats(("sample",))
    stats.add(x_Tm)
    config = OliVe.Config(bits=bits)
    fields = OliVeActivations(config).pack(weight_nm, stats, GENERATOR)
    linear = OliVeActivations(config).build((7, m))
    linear.q.load_state_dict(fields)
    return linear, fields


def round_slowly(row: list[float], scale: float, bits: int, index: int) -> list[float]:
    """Round the inputs of a row pair by pair in double precision."""
    kind = TYPES[bits][index]
    normal = [v for v in kind.normal if v is not None]
    everything = sorted([*normal, *(v for v in kind.outlier if v is not None)])
    row = [*row, *([0.0] if len(row) % 2 else [])]
    out: list[float] = []
    for a, b in zip(row[::2], row[1::2], strict=True):
        p, q = (min(everything, key=lambda v, x=x: abs(v - x / scale)) for x in (a, b))
        if abs(p) > max(normal) and abs(q) > max(normal):
            p, q = (p, 0) if abs(a) >= abs(b) else (0, q)
        elif abs(p) > max(normal):
            q = 0
        elif abs(q) > max(normal):
            p = 0
        out += [p * scale, q * scale]
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [10, 11])
def test_scale_type_and_rounding_are_the_slow_ones(bits: int, m: int) -> None:
    x_Tm = outliers(5, m)
    linear, fields = made(x_Tm, bits)
    values = torch.nn.functional.pad(x_Tm, (0, m % 2)).double()
    limit = max(abs(values.mean() + 3 * values.std(correction=0)),
                abs(values.mean() - 3 * values.std(correction=0)))  # fmt: skip
    best = (math.inf, 0.0, 0)
    for index, kind in enumerate(TYPES[bits]):
        for factor in FACTORS:
            scale = factor / kind.largest * float(limit)
            near = [round_slowly(row, scale, bits, index) for row in x_Tm.double().tolist()]
            error = float((torch.tensor(near, dtype=torch.float64) - values).square().sum())
            best = min(best, (error, scale, index))
    assert float(fields["input_scale"]) == pytest.approx(best[1], rel=1e-5)
    assert int(fields["input_kind"]) == best[2]
    other_Tm = outliers(5, m, seed=4)
    scale = float(fields["input_scale"])
    near = [round_slowly(row, scale, bits, best[2])[:m] for row in other_Tm.tolist()]
    want = torch.tensor(near, dtype=torch.float32) @ linear.dequantize().T
    with torch.inference_mode():
        got = linear(other_Tm.view(1, 5, m))
    assert torch.allclose(got[0], want, atol=1e-4)


def test_rounded_inputs_cost_less_with_outliers_kept() -> None:
    """Compare with a grid up to the largest input, which the few large columns widen."""
    x_Tm = outliers(256, 64)
    linear, _ = made(x_Tm)
    weight_nm = linear.dequantize()
    want = x_Tm @ weight_nm.T
    step = float(x_Tm.abs().max()) / 7
    plain = ((x_Tm / step).round() * step) @ weight_nm.T
    with torch.inference_mode():
        ours = linear(x_Tm)
    assert float((ours - want).norm()) < 0.5 * float((plain - want).norm())
    finer, _ = made(x_Tm, 8)
    finer_want = x_Tm @ finer.dequantize().T
    with torch.inference_mode():
        assert float((finer(x_Tm) - finer_want).norm()) < 0.5 * float((ours - want).norm())


def test_gradients_pass_and_unseen_inputs_stay() -> None:
    linear, fields = made(outliers(16, 10))
    x = torch.randn(2, 3, 10, requires_grad=True)
    linear(x).backward(torch.ones(2, 3, 7))
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.dequantize().sum(0).expand(2, 3, 10))
    linear.q.load_state_dict({**fields, "input_scale": torch.zeros(1)})
    with torch.inference_mode():
        assert torch.allclose(linear(x), x @ linear.dequantize().T, atol=1e-5)
    fields = OliVeActivations(OliVe.Config()).pack(torch.randn(3, 4), None, GENERATOR)
    assert float(fields["input_scale"]) == 0


def test_contract(check_contract: Callable[..., None]) -> None:
    check_contract("olive-activations", torch.randn(42, 123) * 0.05)


def test_a_sample_is_the_first_tokens() -> None:
    stats = LinearStats(("sample",))
    x_Tm = torch.randn(SAMPLED + 100, 3)
    for part in torch.split(x_Tm, 200):
        stats.add(part)
    assert stats.sample is not None and torch.equal(stats.sample, x_Tm[:SAMPLED])


def test_a_checkpoint_end_to_end(
    checkpoint: Callable[..., Path], compress: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n * n} sheep jump over {n} fences." for n in range(300)))
    job = {"calibration": [str(text)], "samples": 4, "seq_len": 64}
    source, ids = checkpoint("llama", num_hidden_layers=1), torch.tensor([[5, 9, 12, 7, 7, 3]])
    outs = {name: compress(source, name, out=name, job=job, bits=8)
            for name in ("olive", "olive-activations")}  # fmt: skip
    bits = [measure(read_layout(out)).linears or 0 for out in outs.values()]
    assert 0 < bits[1] - bits[0] < 0.1, "five bytes a matrix"
    with torch.inference_mode():
        want, alone, both = (spectool.load(place)(ids).logits for place in (source, *outs.values()))
        again = spectool.load(outs["olive-activations"], runtime="dense")(ids).logits
    assert torch.equal(both, again), "nothing can take its place"
    assert (alone - want).norm() < (both - want).norm() < 0.2 * want.norm()


def test_what_would_not_round_inputs_is_refused(
    checkpoint: Callable[..., Path], compress: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n * n} sheep jump over {n} fences." for n in range(300)))
    job = {"calibration": [str(text)], "samples": 2, "seq_len": 32}
    source = checkpoint("llama", num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="an expert of a fused tensor"):
        compress(checkpoint("mixtral"), "olive-activations", job=job)
    with pytest.raises(UsageError, match="--preprocess trains weights"):
        reshaped = {**job, "preprocess": Preprocess(text=[str(text)], steps=1)}
        compress(source, "olive-activations", job=reshaped)
    out = compress(source, "olive-activations", job=job)
    with pytest.raises(UnsupportedError, match="computes more than a product with one matrix"):
        export(open_checkpoint(out), tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
