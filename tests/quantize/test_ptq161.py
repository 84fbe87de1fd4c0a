"""PTQ1.61 against loops written from its equations; its fit, its bits, its invariants."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from spectool.cli import app
from spectool.cli.quantize import fit_lines
from spectool.errors import NotFinite, UnsupportedError, UsageError
from spectool.kernels.pack import unpack_bits
from spectool.model import packed
from spectool.quantize.base import Block, FitReport, Streams
from spectool.quantize.fitting import BlockFit
from spectool.quantize.methods.ptq161 import (
    PTQ161,
    WIDTHS,
    PTQ161Linear,
    TrainedScales,
    mask_salient,
    num_salient,
)
from spectool.quantize.statistics import LinearStats

from ..conftest import contents
from .pair import Pair, make_pair

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]

SMALL_JOB = {"samples": 3, "seq_len": 24}


def stats_of(x_Tm: Tensor) -> LinearStats:
    stats = LinearStats(("absmax", "mean_abs"))
    stats.add(x_Tm)
    return stats


def filled(fields: Any, shape: tuple[int, int], config: PTQ161.Config) -> PTQ161Linear:
    linear = PTQ161(config).build(shape)
    linear.q.load_state_dict(fields, assign=True)
    return linear


def start(weight_nm: Tensor, stats: LinearStats | None = None, **options: Any) -> PTQ161Linear:
    """Make the packed linear of a matrix as it is before the fit."""
    config = PTQ161.Config(**options)
    fields = PTQ161(config).pack(weight_nm, stats, torch.Generator())
    return filled(fields, (weight_nm.shape[0], weight_nm.shape[1]), config)


def reference(weight_nm: Tensor, sigma_m: Tensor, k: int) -> Tensor:
    """Compute W' before the fit entry by entry, with scales in float16."""
    weight, sigma = weight_nm.numpy(), sigma_m.tolist()
    n, m = weight.shape
    salient = sorted(sorted(range(m), key=lambda j: (-sigma[j], j))[:k])
    others = [j for j in range(m) if j not in salient]
    restored = np.empty_like(weight)
    for i in range(n):
        if salient:
            low = min(0.0, *(weight[i, j] for j in salient))
            high = max(0.0, *(weight[i, j] for j in salient))
            scale = np.float32(np.float16((high - low) / 15))
            zero = np.clip(np.rint(-low / scale), 0, 15)
            for j in salient:
                code = np.clip(np.rint(weight[i, j] / scale) + zero, 0, 15)
                restored[i, j] = scale * (code - zero)
        if others:
            mu = sum(float(weight[i, j]) for j in others) / len(others)
            alpha = sum(abs(float(weight[i, j]) - mu) for j in others) / len(others)
            for j in others:
                sign = 1 if weight[i, j] >= mu else -1
                restored[i, j] = float(np.float16(alpha)) * sign + float(np.float16(mu))
    return torch.from_numpy(restored)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(42, 123), (5, 431), (3, 1)])
def test_the_start_equals_the_equations(shape: tuple[int, int], ratio: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_nm = torch.randn(shape, generator=generator) * 0.03 + 0.01
    x_Tm = torch.randn(50, shape[1], generator=generator)
    for saliency, sigma_m in (("mean", x_Tm.abs().mean(0)), ("max", x_Tm.abs().amax(0))):
        linear = start(weight_nm, stats_of(x_Tm), ratio=ratio, saliency=saliency)
        want_nm = reference(weight_nm, sigma_m, num_salient(shape[1], ratio))
        torch.testing.assert_close(linear.dequantize(), want_nm, rtol=2e-3, atol=2e-6)


def with_hessian(x_Tm: Tensor) -> LinearStats:
    stats = LinearStats(("absmax", "mean_abs", "hessian"))
    stats.add(x_Tm)
    return stats


def leaning(tokens: int, m: int) -> Tensor:
    """Draw correlated inputs, the first ones large."""
    generator = torch.Generator().manual_seed(2)
    x_Tm = torch.randn(tokens, m, generator=generator) @ torch.randn(m, m, generator=generator)
    x_Tm[:, : m // 4] *= 5
    return x_Tm


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_compensation_equals_an_inverse_a_column(ratio: float) -> None:
    """Compare with the equations, with an inverse of the remaining Hessian per column."""
    n, m = 6, 12
    weight_nm = torch.randn(n, m, generator=torch.Generator().manual_seed(1)) * 0.03 + 0.01
    x_Tm = leaning(90, m)
    stats = with_hessian(x_Tm)
    assert stats.hessian is not None and stats.mean_abs is not None
    hessian = stats.hessian.double()
    k = num_salient(m, ratio)
    salient = sorted(sorted(range(m), key=lambda j: (-float(stats.mean_abs[j]), j))[:k])  # type: ignore[index]
    order = sorted(range(m), key=lambda j: (j not in salient, -float(hessian[j, j])))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(m)
    plain = start(weight_nm, stats, ratio=ratio, compensate=False)
    step_n, zero_n = plain.q.hi_scale.double(), plain.q.hi_zero.double()
    others = [j for j in range(m) if j not in salient]
    mu_n = weight_nm[:, others].double().mean(1) if others else torch.zeros(n)
    alpha_n = (weight_nm[:, others].double() - mu_n[:, None]).abs().mean(1) if others else mu_n
    best: tuple[float, Tensor] = (float("inf"), weight_nm)
    for width in WIDTHS:
        left, rounded = weight_nm.double(), torch.empty(n, m, dtype=torch.float64)
        for position, j in enumerate(order):
            rest = order[position:]
            inverse = torch.linalg.inv(damped[rest][:, rest])
            if j in salient:
                code = ((left[:, j] / step_n).round() + zero_n).clamp(0, 15)
                rounded[:, j] = step_n * (code - zero_n)
            else:
                sign = torch.where(left[:, j] >= mu_n, 1.0, -1.0)
                rounded[:, j] = mu_n + width * alpha_n * sign
            error = (left[:, j] - rounded[:, j]) / inverse[0, 0]
            left[:, rest] -= error[:, None] * inverse[0]
        for i in range(n if others else 0):
            # The best alpha on a line through the errors, found by its two ends.
            sign = torch.zeros(m, dtype=torch.float64)
            sign[others] = (rounded[i, others] - mu_n[i]).sign()
            apart = rounded[i] - weight_nm[i].double()
            rounded[i] -= (sign @ hessian @ apart) / (sign @ hessian @ sign) * sign
        apart = rounded - weight_nm.double()
        best = min(best, (float(((apart @ hessian) * apart).sum()), rounded), key=lambda b: b[0])
    found = start(weight_nm, stats, ratio=ratio)
    torch.testing.assert_close(found.dequantize().double(), best[1], rtol=2e-3, atol=1e-4)
    if others:

        def error_of(linear: PTQ161Linear) -> float:
            apart = linear.dequantize().double() - weight_nm
            return float(((apart @ hessian) * apart).sum())

        assert error_of(found) < 0.8 * error_of(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_contract(check_contract: Callable[..., None], ratio: float, dtype: torch.dtype) -> None:
    check_contract("ptq161", (torch.randn(42, 123) * 0.05).to(dtype), ratio=ratio)


@pytest.mark.parametrize("shape", [(42, 123), (5, 431), (1, 1), (64, 64)])
def test_product_by_shared_sums_is_the_dense_one(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PIECE", 600)
    n, m = shape
    linear = start(torch.randn(n, m) * 0.05 + 0.02)
    linear.q.col_r.copy_(1 + 0.3 * torch.randn(linear.q.col_r.shape))
    linear.q.row_a[::3] *= -1
    linear.bias = nn.Parameter(torch.randn(n), requires_grad=False)
    x = torch.randn(2, 7, m)
    with torch.inference_mode():
        found = linear(x).double()
    want = x.double() @ linear.dequantize().double().T + linear.bias.double()
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    assert torch.equal(torch.cat(list(linear.pieces())), linear.dequantize())


@pytest.mark.parametrize(("m", "ratio"), [(64, 0.2), (431, 0.2), (4096, 0.2), (10, 0.99)])
def test_exactly_k_columns_are_salient_whatever_the_ties(m: int, ratio: float) -> None:
    k = num_salient(m, ratio)
    for sigma_m in (torch.ones(m), torch.randint(0, 3, (m,)).float(), torch.rand(m)):
        mask_m = mask_salient(sigma_m, k)
        assert int(mask_m.sum()) == k
        assert not k or sigma_m[mask_m].min() >= sigma_m[~mask_m].max()
    assert mask_salient(torch.ones(m), k)[:k].all()
    linear = start(torch.randn(3, m), ratio=ratio)
    assert int(linear.salient().sum()) == k == m - len(linear.q.col_r)


@pytest.mark.parametrize(
    ("m", "k"), [(4096, 800), (11008, 2176), (64, 12), (172, 34), (320, 64), (864, 160), (3, 0)]
)
def test_number_of_salient_columns(m: int, k: int) -> None:
    assert num_salient(m, 0.2) == k
    assert num_salient(m, 0.0) == 0 and num_salient(m, 1.0) == m


def bits(shape: tuple[int, int], config: PTQ161.Config) -> float:
    spec = PTQ161(config).layout(shape).values()
    return 8 * sum(dtype.itemsize * math.prod(size) for dtype, size in spec) / math.prod(shape)


def test_bits_of_a_7b_shape_set_and_of_small_matrices() -> None:
    config = PTQ161.Config()
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    each = [bits(shape, config) for shape in shapes]
    assert all(found == pytest.approx(1.61, abs=0.01) for found in each)
    average = sum(b * math.prod(s) for b, s in zip(each, shapes, strict=True))
    assert average / sum(map(math.prod, shapes)) == pytest.approx(1.602, abs=0.001)
    # By hand: mask and col_r; a row's 4-bit codes, signs, and 7 bytes of scales and zero point.
    assert each[0] == 8 * (512 + 2 * 3296 + 4096 * (400 + 412 + 7)) / 4096**2
    # 12 of 64 columns: two words of codes, two of signs (52 bits), 7 bytes, for 64 weights a row.
    assert bits((64, 64), config) == 8 * (8 + 2 * 52 + 64 * (8 + 8 + 7)) / 64**2
    assert bits((320, 864), config) == pytest.approx(1.664, abs=0.001)


def test_binary_and_four_bits_are_the_two_ends(pack: Callable[..., Any]) -> None:
    weight_nm = torch.randn(42, 123) * 0.1
    grid = pack("rtn", weight_nm, bits=4, group_size=0).module.dequantize()
    assert torch.equal(start(weight_nm, ratio=1.0).dequantize(), grid)
    for row in start(weight_nm, ratio=0.0).dequantize():
        assert len(row.unique()) == 2


def test_without_a_mean_alpha_is_the_best_scale_of_signs() -> None:
    half_nm = torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    weight_nm = torch.cat([half_nm, -half_nm], 1)
    linear = start(weight_nm, ratio=0.0)
    torch.testing.assert_close(linear.q.row_a.float(), weight_nm.abs().mean(1), rtol=1e-3, atol=0)
    assert float(linear.q.row_b.abs().max()) < 1e-6
    # Relative squared error of signs for a normal distribution.
    error = (linear.dequantize() - weight_nm).square().sum() / weight_nm.square().sum()
    assert float(error) == pytest.approx(1 - 2 / math.pi, rel=0.03)


def test_signs_are_those_of_the_weights_less_their_mean() -> None:
    weight_nm = torch.randn(42, 123) + 0.3
    weight_nm[0, :] = 0.0
    linear = start(weight_nm)
    rest_nr = weight_nm[:, ~linear.salient()]
    want = rest_nr >= rest_nr.mean(1, keepdim=True)
    assert torch.equal(unpack_bits(linear.q.lo, 1, rest_nr.shape[1]).bool(), want)
    assert want[0].all(), "the sign of zero is +1"


def test_permuted_inputs_permute_the_result() -> None:
    weight_nm, x_Tm = torch.randn(42, 123), torch.randn(50, 123) * torch.rand(123)
    order = torch.randperm(123)
    first = start(weight_nm, stats_of(x_Tm)).dequantize()
    second = start(weight_nm[:, order], stats_of(x_Tm[:, order])).dequantize()
    # Row means are summed in another order: a unit of float16 in the scales.
    torch.testing.assert_close(second, first[:, order], rtol=1e-3, atol=1e-6)


def test_weighted_error_falls_with_the_share_of_salient_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_nm = torch.randn(64, 320, generator=generator)
    x_Tm = torch.randn(500, 320, generator=generator) * torch.logspace(-1, 1, 320)
    second_mm = x_Tm.T @ x_Tm / len(x_Tm)
    errors = []
    for ratio in (0.1, 0.2, 0.3):
        wrong_nm = start(weight_nm, stats_of(x_Tm), ratio=ratio).dequantize() - weight_nm
        errors.append(float((wrong_nm @ second_mm * wrong_nm).sum()))
    assert all(more < less for less, more in itertools.pairwise(errors))


def test_zero_and_constant_rows() -> None:
    weight_nm = torch.randn(4, 123)
    weight_nm[0], weight_nm[1], weight_nm[2] = 0.0, 0.25, -3.0
    restored_nm = start(weight_nm).dequantize()
    assert torch.equal(restored_nm[0], weight_nm[0])
    torch.testing.assert_close(restored_nm[1:3], weight_nm[1:3], rtol=1e-3, atol=0)
    assert torch.equal(start(torch.zeros(3, 40)).dequantize(), torch.zeros(3, 40))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("size", [1e9, 1e-9])
def test_matrix_beyond_the_stored_scale_is_refused(size: float, ratio: float) -> None:
    with pytest.raises(UnsupportedError, match="its weights need a scale of"):
        start(torch.randn(4, 123) * size, ratio=ratio)


def test_inputs_that_are_not_finite_are_refused() -> None:
    stats = stats_of(torch.full((3, 123), math.inf))
    with pytest.raises(UnsupportedError, match="inputs are not finite") as caught:
        start(torch.randn(4, 123), stats)
    assert caught.value.hint == "--dtype float32"


@pytest.mark.parametrize(
    "options", [{"ratio": 1.1}, {"saliency": "median"}, {"epochs": -1}, {"lr": -1.0}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PTQ161.Config(**options)


def pair(dtype: torch.dtype = torch.float32) -> tuple[Block, Streams, dict[str, LinearStats]]:
    block, streams = make_pair(20, dtype)
    original, module = streams.original, block.module
    stats = {
        "b.up": stats_of(original.hidden_SLD.flatten(0, 1)),
        "b.down": stats_of(torch.tanh(module.up(original.hidden_SLD)).flatten(0, 1)),
    }
    return block, streams, stats


def start_of(block: Block, stats: dict[str, LinearStats]) -> dict[str, PTQ161Linear]:
    return {name: start(weight, stats[name]) for name, weight in block.weights.items()}


def fit(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    block, streams, stats = pair(dtype)
    generator = torch.Generator().manual_seed(0)
    config = PTQ161.Config(**options)
    return PTQ161(config).fit(block, streams, stats, generator, lambda share: None)


def loss_by_loops(module: Pair, linears: dict[str, PTQ161Linear], streams: Streams) -> float:
    """Compute the loss token by token, by dense products with the dequantized matrices."""
    up, down = (linears[f"b.{leaf}"].dequantize().double() for leaf in ("up", "down"))
    dense_up, dense_down = module.up.weight.double(), module.down.weight.double()
    bias = module.up.bias.double()
    total = 0.0
    for original_LD, packed_LD in zip(
        streams.original.hidden_SLD.double(), streams.packed.hidden_SLD.double(), strict=True
    ):
        squares, cosines = [0.0, 0.0], [0.0, 0.0]
        for x, x_packed in zip(original_LD, packed_LD, strict=True):
            out = x_packed + down @ torch.tanh(up @ x_packed + bias)
            for a, given in enumerate((x, x_packed)):
                want = given + dense_down @ torch.tanh(dense_up @ given + bias)
                squares[a] += float((out - want).square().sum()) / original_LD.numel()
                cosine = float(out @ want) / float(out.norm() * want.norm())
                cosines[a] += cosine / len(original_LD)
        total += sum(squares) - sum(map(math.log, cosines))
    return total / len(streams.original.hidden_SLD)


def test_the_loss_is_that_of_the_equations() -> None:
    block, streams, stats = pair()
    linears = start_of(block, stats)
    loss, least_cosine = BlockFit(block, streams).measure(linears)
    assert loss == pytest.approx(loss_by_loops(block.module, linears, streams), rel=1e-5)
    assert 0.5 < least_cosine < 1


def test_products_and_gradients_of_the_fit_are_those_of_the_stored_matrix() -> None:
    block, _, stats = pair()
    linear = start_of(block, stats)["b.up"]
    part = TrainedScales(linear, torch.float32)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
    x_Tm = torch.randn(30, 40, requires_grad=True)
    up_Tn = torch.randn(30, 72)
    part(x_Tm).backward(up_Tn)
    found = [x_Tm.grad, part.gain_n.grad, part.r1_n.grad, part.r2_r.grad]

    a, b, c = (p.detach().clone().requires_grad_() for p in (part.gain_n, part.r1_n, part.r2_r))
    high_nk, signs_nr = linear.constants(slice(None))
    low_nr = (a * part.alpha_n)[:, None] * signs_nr + part.mu_n[:, None]
    low_nr = b[:, None] * c * low_nr
    dense_nm = torch.zeros(72, 40)
    dense_nm = dense_nm.index_copy(1, part.high, high_nk).index_copy(1, part.low, low_nr)
    again = x_Tm.detach().clone().requires_grad_()
    (again @ dense_nm.T).backward(up_Tn)
    for one, other in zip(found, (again.grad, a.grad, b.grad, c.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    part.store()
    torch.testing.assert_close(linear.dequantize(), dense_nm.detach(), rtol=4e-3, atol=1e-5)


def test_what_is_reported_is_what_is_stored() -> None:
    block, streams, stats = pair()
    fitted = fit(epochs=5)
    linears = {
        name: filled(fields, block.matrices[name].shape, PTQ161.Config())
        for name, fields in fitted.fields.items()
    }
    after = loss_by_loops(block.module, linears, streams)
    before = loss_by_loops(block.module, start_of(block, stats), streams)
    assert fitted.report.loss_after == pytest.approx(after, rel=1e-5)
    assert fitted.report.loss_start == pytest.approx(before, rel=1e-5)
    assert after < 0.95 * before
    again = fit(epochs=5)
    assert again.report == fitted.report
    for name, fields in fitted.fields.items():
        assert all(torch.equal(fields[field], again.fields[name][field]) for field in fields)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 2, "lr": 30.0}])
def test_a_fit_that_does_not_help_leaves_the_start(options: dict[str, Any]) -> None:
    block, _, stats = pair()
    fitted = fit(**options)
    assert fitted.report.loss_after == fitted.report.loss_start
    assert fitted.report.best_epoch == 0
    for name, linear in start_of(block, stats).items():
        for field, value in linear.q.named_buffers():
            assert torch.equal(value, fitted.fields[name][field])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fit_in_half_precision(dtype: torch.dtype) -> None:
    report = fit(dtype, epochs=4).report
    assert report.loss_after < 0.97 * report.loss_start
    assert report.loss_after == pytest.approx(fit(epochs=4).report.loss_after, rel=0.05)


def test_flipped_rows_are_counted() -> None:
    block, streams, stats = pair()
    # The targets need one row with the opposite sign of the weights that are packed.
    block.weights["b.up"][5] *= -1
    block.module.down.weight[:, 5] *= 4
    block.weights["b.down"][:, 5] *= 4
    config = PTQ161.Config(ratio=0.0, epochs=8, lr=0.3)
    fitted = PTQ161(config).fit(block, streams, stats, torch.Generator(), lambda share: None)
    negative = sum(int((fields["row_a"] < 0).sum()) for fields in fitted.fields.values())
    assert fitted.report.rows_flipped == negative >= 1


def test_an_inverted_output_is_seen_and_pulled_round() -> None:
    block, streams, stats = pair()
    task = BlockFit(block, streams)
    for target in task.targets:
        target.hidden_SLD.neg_()
    linears = start_of(block, stats)
    loss, least_cosine = task.measure(linears)
    assert least_cosine < 0 and math.isfinite(loss)
    parts = {name: TrainedScales(linear, torch.float32) for name, linear in linears.items()}
    task.backward(0, parts)
    assert all(float(part.gain_n.grad.abs().max()) > 0 for part in parts.values())


def test_outputs_that_are_not_finite_are_refused() -> None:
    block, streams, stats = pair()
    streams.packed.hidden_SLD[3, 2, 1] = math.nan
    with pytest.raises(NotFinite, match="b: its output is NaN or infinite") as caught:
        PTQ161().fit(block, streams, stats, torch.Generator(), lambda share: None)
    assert "--dtype float32" in (caught.value.hint or "")


def test_progress_rises_and_stays_below_the_whole() -> None:
    block, streams, stats = pair()
    shares: list[float] = []
    quantizer = PTQ161(PTQ161.Config(epochs=2))
    quantizer.fit(block, streams, stats, torch.Generator(), shares.append)
    assert len(shares) == 12 and shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_checkpoint_has_the_planned_bits_and_every_block_gains(
    check_fitted: Callable[..., Any], family: str
) -> None:
    for block, fit in check_fitted("ptq161", family, job=SMALL_JOB, epochs=2):
        assert fit.loss_after < fit.loss_start and fit.best_epoch > 0
        experts = {layer.name for layer in block.layers if ".experts." in layer.name}
        assert set(block.data_free) == experts


def test_targets_in_files_give_the_same_bytes(
    checkpoint: Checkpoints, compress: Compress, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, job = checkpoint("llama"), {**SMALL_JOB, "calibration": [text_file]}
    memory = compress(source, "ptq161", out="memory", job=job, epochs=1)
    monkeypatch.setattr("spectool.quantize.stream.BUFFERS_IN_MEMORY", 0)
    files = compress(source, "ptq161", out="files", job=job, epochs=1)
    assert contents(memory) == contents(files)


def test_matrices_with_one_input_share_the_mask(
    checkpoint: Checkpoints, compress: Compress, text_file: str
) -> None:
    job = {**SMALL_JOB, "calibration": [text_file]}
    out = compress(checkpoint("llama"), "ptq161", job=job, epochs=0)
    stored = {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}
    for index in (0, 1):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        masks = [stored[f"{attention}.{leaf}_proj.q.mask"] for leaf in "qkv"]
        masks2 = [stored[f"{mlp}.{leaf}_proj.q.mask"] for leaf in ("gate", "up")]
        assert all(torch.equal(masks[0], mask) for mask in masks)
        assert torch.equal(*masks2) and not torch.equal(masks[0], masks2[0])


def test_the_command_says_what_the_fit_gained(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectool.cli.common.QUIET_SECONDS", -1.0)
    words = ["quantize", "ptq161", str(checkpoint("llama")), str(tmp_path / "out"), "--json"]
    words += ["--samples", "3", "--seq-len", "24", "--epochs", "2", "--ratio", "0.3"]
    words += ["--calibration", text_file]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["blocks"]) == 2
    for block in result["blocks"]:
        assert block["fits"][0]["loss_after"] < block["fits"][0]["loss_start"]
    assert "of that at its start, lower in 2 of 2 fits" in done.stderr
    assert "blocks packed: 0." in done.stderr, "a long block says how far it is"


def test_flipped_rows_and_turned_outputs_are_named() -> None:
    fine = FitReport(
        loss_start=2.0, loss_after=1.0, least_cosine=0.9, best_epoch=1, steps_skipped=0,
        rows_flipped=0,
    )  # fmt: skip
    odd = replace(fine, loss_after=2.0, least_cosine=-0.1, rows_flipped=3)
    assert len(list(fit_lines([(0, fine)]))) == 1
    output = "\n".join(fit_lines([(0, fine), (1, odd)]))
    assert "0.500 to 1.000 of that at its start, lower in 1 of 2 fits" in output
    assert "rows flipped by a negative scale: 3" in output and "in blocks 1: try more" in output


def test_a_block_left_dense_has_no_fit(
    compress: Callable[..., Path], checkpoint: Callable[..., Path], text_file: str
) -> None:
    reports: list[Any] = []
    text = {"calibration": [text_file], "samples": 2, "seq_len": 16}
    compress(
        checkpoint("llama"),
        "ptq161",
        epochs=1,
        job={**text, "skip": ["model.layers.0.*"], "allow_dense": True},
        reports=reports,
    )
    nothing, (fit,) = (block.fits for block in reports[0].blocks)
    assert not nothing and fit.loss_after <= fit.loss_start
