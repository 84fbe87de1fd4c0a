"""JLCM: initial codes, the gradients of both forms by hand, and the gain of the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.errors import UnsupportedError, UsageError
from spectool.kernels.pack import pack_bits
from spectool.quantize.methods.jlcm import JLCM, JLCMLinear, LatentCodes, PreferenceCodes
from spectool.quantize.statistics import LinearStats

from .pair import make_pair

SMALL_JOB = {"samples": 3, "seq_len": 24}


def start(weight_nm: Tensor, diagonal_m: Tensor | None = None, **options: Any) -> JLCMLinear:
    config = JLCM.Config(**options)
    stats = None
    if diagonal_m is not None:
        # Uncorrelated inputs.
        stats = LinearStats(("hessian",), 100, hessian=torch.diag(diagonal_m))
    fields = JLCM(config).pack(weight_nm, stats, torch.Generator().manual_seed(0))
    shape = (weight_nm.shape[0], weight_nm.shape[1])
    linear = JLCM(config).build(shape)
    linear.q.load_state_dict(fields)
    return linear


def two_kinds(n: int, m: int) -> Tensor:
    """Draw a matrix whose odd rows are bimodal and of another size."""
    torch.manual_seed(0)
    weight_nm = torch.randn(n, m)
    weight_nm[1::2] = 3 * (weight_nm[1::2].sign() + 0.1 * weight_nm[1::2])
    return weight_nm


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 5])
def test_contract(check_contract: Callable[..., None], bits: int, groups: int) -> None:
    check_contract("jlcm", torch.randn(42, 123) * 0.05, bits=bits, groups=groups)


def test_the_start_is_nearest_in_its_groups_levels() -> None:
    weight_nm, diagonal_m = two_kinds(12, 60), torch.rand(60) + 0.1
    linear = start(weight_nm, diagonal_m, bits=2, groups=2)
    assert linear.q.group.tolist() == [0, 1] * 6
    for row, weight_m in enumerate(weight_nm):
        scale = float(linear.q.scale[row])
        assert scale == pytest.approx(float(weight_m.square().mean().sqrt()), rel=1e-3)
        level_K = linear.q.codebook[row % 2].float() * scale
        restored_m = linear.dequantize()[row]
        apart_mK = (weight_m[:, None] - level_K).abs()
        assert torch.equal((weight_m - restored_m).abs(), apart_mK.amin(1))
    # Lloyd's fixed point under the inputs' weights.
    for group in range(2):
        rows = slice(group, None, 2)
        codes, scale_n1 = linear.codes()[rows], linear.q.scale[rows, None].float()
        cost_nm = scale_n1.square() * diagonal_m
        for code in range(4):
            members = codes == code
            mean = (cost_nm * weight_nm[rows] / scale_n1)[members].sum() / cost_nm.expand_as(
                members
            )[members].sum()
            level = float(linear.q.codebook[group, code])
            assert level == pytest.approx(float(mean), abs=5e-3)


def test_more_groups_are_no_worse() -> None:
    weight_nm = two_kinds(32, 100)
    errors = [
        float((start(weight_nm, groups=count).dequantize() - weight_nm).square().sum())
        for count in (1, 2, 8)
    ]
    assert errors[0] > 1.3 * errors[1] and errors[1] >= errors[2] * 0.99


def test_codes_take_the_inputs_into_account() -> None:
    """Levels fit the weights of an input with a large Hessian entry."""
    weight_nm = torch.randn(40, 50)
    weight_nm[:, 3] = 2.75
    diagonal_m = torch.ones(50)
    diagonal_m[3] = 1000
    plain, aware = start(weight_nm, groups=1), start(weight_nm, diagonal_m, groups=1)
    apart = [float((x.dequantize()[:, 3] - 2.75).abs().mean()) for x in (plain, aware)]
    assert apart[1] < 0.2 * apart[0]


def by_hand() -> tuple[JLCMLinear, Tensor]:
    """Make two weights with scale 2 that use three of four levels: -1, 0, 3 (and 9)."""
    linear = start(torch.tensor([[0.2, 5.0]]), groups=1)
    linear.q.codebook.copy_(torch.tensor([[-1.0, 0.0, 3.0, 9.0]]))
    linear.q.scale.fill_(2)
    linear.q.codes.copy_(pack_bits(torch.tensor([[1, 2]], dtype=torch.uint8), 2))
    return linear, torch.tensor([[0.2, 5.0]])


def test_gradients_of_the_latent_form() -> None:
    linear, weight_nm = by_hand()
    part = LatentCodes(linear, weight_nm, torch.float32)
    assert torch.equal(part.choice.detach(), weight_nm / 2)
    x = torch.tensor([[1.0, -10.0]])
    part(x).sum().backward()
    # w' = (0, 6): the output's slope by w' is x, by s C is x, by C is s x; u takes s x relative
    # to the matrix's mean.
    assert part.codebook_GK.grad is not None and part.choice.grad is not None
    assert part.codebook_GK.grad.tolist() == [[0.0, 2.0, -20.0, 0.0]]
    torch.testing.assert_close(part.choice.grad, x * 2 / 11)
    assert part.gain_n.grad is not None and part.gain_n.grad.tolist() == [-60.0]


def test_gradients_of_the_proximal_rule() -> None:
    linear, weight_nm = by_hand()
    part = PreferenceCodes(linear, weight_nm, torch.float32)
    assert part.choice.detach().argmax(-1).tolist() == [[1, 2]]
    x = torch.tensor([[1.0, -10.0]])
    part(x).sum().backward()
    assert part.codebook_GK.grad is not None and part.choice.grad is not None
    assert part.codebook_GK.grad.tolist() == [[0.0, 2.0, -20.0, 0.0]]
    unit = 10 / 3
    # s G sign(C_k - C*) unit^2 / |C_k - C*|, by hand, for the codes 1 (level 0) and 2 (level 3).
    first = [2 * unit**2 / d if d else 0.0 for d in (-1.0, 0.0, 3.0, 9.0)]
    second = [-20 * unit**2 / d if d else 0.0 for d in (-4.0, -3.0, 0.0, 6.0)]
    wanted = torch.tensor([[first, second]])
    torch.testing.assert_close(part.choice.grad, wanted / wanted.abs().mean())


@pytest.mark.parametrize("form", [LatentCodes, PreferenceCodes])
def test_the_part_computes_what_it_stores(form: Any) -> None:
    weight_nm = two_kinds(10, 30)
    linear = start(weight_nm, bits=3, groups=2)
    part = form(linear, weight_nm, torch.float32)
    before = linear.dequantize()
    part.store()
    assert torch.equal(linear.dequantize(), before), "nothing was learnt yet"
    with torch.no_grad():
        part.codebook_GK += 0.05 * torch.randn(part.codebook_GK.shape)
        part.gain_n *= 1.1
        part.choice += 0.3 * torch.randn(part.choice.shape)
    part.store()
    x = torch.randn(5, 30)
    torch.testing.assert_close(part(x), x @ linear.dequantize().T, rtol=1e-2, atol=2e-2)
    assert torch.equal(linear.q.codebook, linear.q.codebook.sort(-1).values)


def fit(**options: Any) -> Any:
    # Correlated inputs, or there is nothing to compensate.
    block, streams = make_pair(40, correlated=True)
    generator = torch.Generator().manual_seed(0)
    return JLCM(JLCM.Config(**options)).fit(block, streams, {}, generator, lambda share: None)


@pytest.mark.parametrize("form", ["latent", "preferences"])
def test_learning_gains_and_moves_codes_to_their_neighbours(form: str) -> None:
    report = fit(form=form, epochs=12, lr=1e-3, lr_codes=3e-3).report
    levels_alone = fit(form=form, epochs=12, lr=1e-3, lr_codes=0.0).report
    assert report.loss_after < 0.8 * levels_alone.loss_after
    assert levels_alone.loss_after < levels_alone.loss_start
    assert 0.01 < report.codes_moved < 0.5
    assert report.codes_moved_further < 0.1 * report.codes_moved


def test_no_epochs_keep_the_start() -> None:
    report = fit(epochs=0).report
    assert report.loss_after == report.loss_start and report.codes_moved == 0


def test_rows_of_any_size() -> None:
    weight_nm = torch.randn(8, 40)
    weight_nm[2] *= 1e-9
    weight_nm[3] *= 1e4
    for diagonal_m in (None, torch.rand(40)):
        found_nm = start(weight_nm, diagonal_m).dequantize()
        assert torch.isfinite(found_nm).all()
        assert float((found_nm - weight_nm)[3].norm() / weight_nm[3].norm()) < 0.6


def test_zero_rows_and_what_is_refused() -> None:
    weight_nm = torch.randn(6, 40)
    weight_nm[2] = 0
    assert float(start(weight_nm).dequantize()[2].abs().max()) < 1e-3
    with pytest.raises(UnsupportedError, match="float16"):
        start(weight_nm * 1e9)
    with pytest.raises(UnsupportedError, match="not finite"):
        start(weight_nm, torch.full((40,), torch.nan))


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 5}, {"groups": 0}, {"groups": 257}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        JLCM.Config(**options)


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "qwen3_moe"]
)
def test_a_checkpoint_has_the_planned_bits_and_the_fit_gains(
    check_fitted: Callable[..., Any], family: str
) -> None:
    fits = [fit for _, fit in check_fitted("jlcm", family, job=SMALL_JOB, epochs=4)]
    assert all(fit.loss_after <= fit.loss_start for fit in fits)
    assert any(fit.loss_after < fit.loss_start for fit in fits)
