"""GPTQ against the authors' steps with a matrix inverse per column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UnsupportedError, UsageError
from spectool.model.architecture import Architecture
from spectool.quantize.ledger import measure
from spectool.quantize.methods.gptq import GPTQ, compensate, factor_hessian
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.plan import make_plan
from spectool.quantize.statistics import LinearStats


def inputs(tokens: int, m: int, *, seed: int = 0) -> Tensor:
    """Draw correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, m, generator=generator) @ torch.randn(m, m, generator=generator)
    return mixed * torch.rand(m, generator=generator).square() * 3


def stats_of(x_Tm: Tensor) -> LinearStats:
    stats = LinearStats(("hessian",))
    stats.add(x_Tm)
    return stats


def packed(weight_nm: Tensor, x_Tm: Tensor, **options: Any) -> Tensor:
    quantizer, (n, m) = GPTQ(GPTQ.Config(**options)), weight_nm.shape
    linear = quantizer.build((n, m))
    linear.q.load_state_dict(quantizer.pack(weight_nm, stats_of(x_Tm), torch.Generator()))
    return linear.dequantize()


def reference(
    weight_nm: Tensor, x_Tm: Tensor, *, bits: int, group_size: int, act_order: bool, damping: float
) -> Tensor:
    """Round column by column, each time with the least squares update of the remaining columns R.

    The update is the optimal brain surgeon's: w_k -= e (H_RR^-1)_jk / (H_RR^-1)_jj.
    """
    weight = weight_nm.double().clone()
    m = weight.shape[1]
    hessian = (x_Tm.double().T @ x_Tm.double()) / len(x_Tm)
    hessian += damping * hessian.diagonal().mean() * torch.eye(m)
    order = list(range(m))
    if act_order:
        order.sort(key=lambda j: -float(hessian[j, j]))
    columns, top = group_size or m, 2**bits - 1
    grids: dict[int, tuple[Tensor, Tensor]] = {}

    def grid(group: int) -> tuple[Tensor, Tensor]:
        part = weight[:, group * columns : (group + 1) * columns]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / top).half().double()
        return scale, (-low / scale).round().clamp(0, top)

    if act_order:
        grids = {group: grid(group) for group in range(-(-m // columns))}
    restored = torch.zeros_like(weight)
    left = list(order)
    for j in order:
        group = j // columns
        if not act_order and j % columns == 0:
            grids[group] = grid(group)
        scale, zero = grids[group]
        code = ((weight[:, j] / scale).round() + zero).clamp(0, top)
        restored[:, j] = scale * (code - zero)
        inverse = hessian[left][:, left].inverse()
        position = left.index(j)
        error = (weight[:, j] - restored[:, j]) / inverse[position, position]
        weight[:, left] -= error[:, None] * inverse[position]
        left.remove(j)
    return restored


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("m", "group_size"), [(40, 0), (40, 16), (150, 48), (170, 140)])
def test_equals_one_inverse_a_column(m: int, group_size: int, act_order: bool) -> None:
    weight_nm = torch.randn(6, m, generator=torch.Generator().manual_seed(1))
    x_Tm = inputs(400, m)
    asked: dict[str, Any] = {
        "bits": 3, "group_size": group_size, "act_order": act_order, "damping": 0.01,
    }  # fmt: skip
    found, wanted = packed(weight_nm, x_Tm, **asked), reference(weight_nm, x_Tm, **asked)
    # A weight half way between two codes may go either way.
    assert float((found - wanted).abs().gt(1e-4).double().mean()) < 0.01


def test_several_tries_at_once_and_what_they_err() -> None:
    weight_Tnm = torch.randn(3, 6, 150)
    x_Tm, step_T1 = inputs(400, 150), torch.tensor([[0.3], [0.5], [0.9]])
    x_Tm[:, ::9] = 0
    hessian_mm = stats_of(x_Tm).hessian
    assert hessian_mm is not None
    given = factor_hessian(hessian_mm, 0.01)

    def rounded(weight_Tnm: Tensor, step_T1: Tensor) -> tuple[Tensor, Tensor]:
        made_mTn = torch.empty(150, *weight_Tnm.shape[:-1])

        def round_column(j: int, weight_mTn: Tensor) -> Tensor:
            made_Tn = (weight_mTn[j] / step_T1).round() * step_T1
            made_mTn[given.order_m[j]] = made_Tn
            return made_Tn

        return compensate(weight_Tnm, given, 150, round_column), made_mTn.movedim(0, -1)

    error_Tn, made_Tnm = rounded(weight_Tnm, step_T1)
    for weight_nm, step_1, error_n, made_nm in zip(
        weight_Tnm, step_T1, error_Tn, made_Tnm, strict=True
    ):
        alone_n, alone_nm = rounded(weight_nm, step_1)
        assert torch.allclose(made_nm, alone_nm) and torch.allclose(error_n, alone_n)
        apart_nm = (made_nm - weight_nm).double()
        wanted_n = ((apart_nm @ hessian_mm.double()) * apart_nm).sum(1)
        assert torch.allclose(error_n.double(), wanted_n, rtol=1e-4)


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 4, "group_size": 32, "symmetric": True}])
def test_contract(check_contract: Callable[..., None], options: dict[str, Any]) -> None:
    check_contract("gptq", torch.randn(42, 123) * 0.05, **options)


@pytest.mark.parametrize(
    ("bits", "act_order"), [(2, True), (3, True), (4, True), (3, False), (4, False)]
)
@pytest.mark.parametrize("group_size", [0, 32])
def test_outputs_err_less_than_those_of_rounding(
    act_order: bool, bits: int, group_size: int
) -> None:
    """2 bits without act_order are left out: there the last groups carry too much error."""
    weight_nm, x_Tm = torch.randn(64, 128), inputs(1500, 128)
    x_Tm, other = x_Tm[:1000], x_Tm[1000:]
    grid = {"bits": bits, "group_size": group_size}
    found = packed(weight_nm, x_Tm, act_order=act_order, **grid)
    config = RTN.Config(**grid)
    linear = RTN(config).build((64, 128))
    linear.q.load_state_dict(RTN(config).pack(weight_nm, None, torch.Generator()))
    rounded = linear.dequantize()
    gptq, rtn = (float(((x - weight_nm) @ other.T).square().sum()) for x in (found, rounded))
    assert gptq < 0.8 * rtn


def test_without_correlations_it_is_rounding() -> None:
    weight_nm = torch.randn(8, 24)
    found = packed(weight_nm, torch.eye(24) * 3, bits=3, group_size=8)
    config = RTN.Config(bits=3, group_size=8)
    linear = RTN(config).build((8, 24))
    linear.q.load_state_dict(RTN(config).pack(weight_nm, None, torch.Generator()))
    assert torch.equal(found, linear.dequantize())


def test_weights_on_the_grid_stay() -> None:
    weight_nm = torch.randint(0, 16, (6, 40)).float() * 0.25 - 1.75
    weight_nm[:, ::20], weight_nm[:, 1::20] = -1.75, 2.0
    assert torch.equal(packed(weight_nm, inputs(200, 40), group_size=20), weight_nm)


def test_inputs_that_were_never_seen_are_rounded_alone() -> None:
    weight_nm, x_Tm = torch.randn(6, 40), inputs(300, 40)
    x_Tm[:, 7] = 0
    found = packed(weight_nm, x_Tm, bits=8)
    assert float((found - weight_nm)[:, 7].abs().max()) < 0.05
    # They do not reduce the compensation of the others, however small the activations are.
    few, size = (
        float(((packed(weight_nm, x, bits=3) - weight_nm) @ x_Tm.T).square().sum())
        for x in (x_Tm, 1e-3 * x_Tm)
    )
    assert size == pytest.approx(few, rel=0.05)


def test_few_tokens_and_no_damping_are_singular() -> None:
    weight_nm, x_Tm = torch.randn(6, 40), inputs(5, 40)
    assert torch.isfinite(packed(weight_nm, x_Tm)).all()
    with pytest.raises(UnsupportedError, match=r"singular with a damping of 0\.0"):
        packed(weight_nm, x_Tm, damping=0.0)
    x_Tm[0, 0] = torch.inf
    with pytest.raises(UnsupportedError, match="not finite"):
        packed(weight_nm, x_Tm)


@pytest.mark.parametrize("options", [{"bits": 1}, {"damping": -0.1}, {"group_size": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GPTQ.Config(**options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_checkpoint_has_the_planned_bits(
    checkpoint: Callable[..., Path], compress: Callable[..., Path], text_file: str, family: str
) -> None:
    source = checkpoint(family)
    plan = make_plan(
        Architecture(open_checkpoint(source)), GPTQ(GPTQ.Config(bits=3)), allow_dense=True
    )
    job = {"calibration": [text_file], "samples": 6, "seq_len": 32, "allow_dense": True}
    layout = read_layout(compress(source, "gptq", job=job, bits=3))
    assert measure(layout).linears == plan.bits_linears
    assert layout.num_bytes == plan.file_bytes
