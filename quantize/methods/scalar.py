"""Scalar codebooks (`scalar`): every input has levels of its own, more of them where it matters.

With b_j bits for input j, K_j = 2^b_j levels v_j that all rows share, and codes k_ij,

    w'_ij = v_j[k_ij].

No scale is stored, and inputs with large activations need no mask: they get more bits. With R as
`gptq` has it, an error of column j weighs R_jj^2, and the best levels of b bits leave the share c_b
of a Gaussian's variance; so bits go one at a time to the column where

    var_j R_jj^2 (c_b - c_(b+1))

is the largest (reverse water-filling), until the mean is `bits`. Columns are then taken one after
another as `gptq` takes them: the levels of a column are Lloyd's for the weights as they are by
then, a little wider, as in `jlcm`. Levels and codes may be fitted a block at a time (`fitting.py`),
codes in `jlcm`'s latent form.

Source: the scalar codebooks a dimension of Hsu et al., QLAE, 2023 (arXiv:2305.18378), where they
are a latent space's; for weights, with bits by water-filling and compensation, they are ours.
Shapes: n outputs, m inputs, K levels of an input at most, L levels of all inputs, T tries.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import UnsupportedError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.calibration import (
    Block,
    Fitted,
    LinearStats,
    PackedFields,
    Statistic,
    Stream,
    Streams,
    Tick,
)
from spectool.quantize.codebook import (
    SelectLevels,
    clamp_to_cells,
    fit_levels,
    nearest_codes,
    recompute_product,
)
from spectool.quantize.fitting import fit_block, init_linears
from spectool.quantize.methods.gptq import HessianFactor, compensate, factor_hessian
from spectool.quantize.methods.rtn import SCALE_MAX, SCALE_MIN

# As `gptq` has it.
DAMPING = 0.01
WIDEST = 4
# What is left of a Gaussian's variance by the best levels of 0, 1, … bits (Max 1960).
LEFT = (1.0, 0.3634, 0.1175, 0.0345, 0.0095)
# Levels that there is room for, over those of equal bits.
ROOM = 1.5
# So many times as wide as Lloyd's are levels tried.
WIDTHS = (1.0, 1.2, 1.4)


class Scalar:
    """The quantizer; see the module docstring."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: float = option(2.0, "mean bits of a code", minimum=1, maximum=WIDEST)
        epochs: int = option(4, "passes over the calibration sequences", minimum=0)
        lr: float = option(5e-3, "of levels: cells that the mean gradient moves one", minimum=0)
        lr_codes: float = option(
            5e-4, "of codes: cells that the mean gradient moves a weight", minimum=0
        )

    statistics: ClassVar[Mapping[Statistic, Stream]] = {"hessian": "packed"}

    @classmethod
    def layout(cls, shape: tuple[int, int], config: Scalar.Config) -> FieldSpec:
        n, m = shape
        return {
            "codes": (torch.uint8, (n, packed_bytes(int(config.bits * m), 1))),
            "levels": (torch.float16, (max_levels(m, config.bits),)),
            "bits": (torch.uint8, (m,)),
        }

    @classmethod
    def pack(
        cls,
        weight_nm: Tensor,
        stats: LinearStats | None,
        config: Scalar.Config,
        generator: torch.Generator,
    ) -> PackedFields:
        """One matrix before the fit; without statistics all inputs count alike."""
        weight_nm = weight_nm.float()
        m = weight_nm.shape[1]
        largest = float(weight_nm.abs().max())
        if largest > SCALE_MAX or 0 < largest < SCALE_MIN:
            raise UnsupportedError(
                f"its weights reach {largest:.3g}, and float16, which stores their levels, "
                f"reaches from {SCALE_MIN:.3g} to {SCALE_MAX:.0f}",
                hint="leave it dense with --skip, or rescale the checkpoint",
            )
        hessian_mm = torch.eye(m, device=weight_nm.device)
        if stats is not None and stats.hessian is not None:
            hessian_mm = stats.hessian
        given = factor_hessian(hessian_mm, DAMPING)
        worth_m = torch.empty(m, device=weight_nm.device)
        worth_m[given.order_m] = given.cost_m
        bits_m = allocate(worth_m * weight_nm.var(0, correction=0), config.bits)
        level_mK, codes_nm = _round_compensated(weight_nm, bits_m, given)
        return _make_fields(level_mK, codes_nm, bits_m, config.bits)

    @classmethod
    def fit_bytes(cls, config: Scalar.Config) -> int:
        """What chooses the codes with its gradient and momentum."""
        return 12

    @classmethod
    def fit(
        cls,
        block: Block,
        streams: Streams | None,
        stats: dict[str, LinearStats],
        config: Scalar.Config,
        generator: torch.Generator,
        tick: Tick,
    ) -> Fitted:
        if not block.weights:
            return Fitted({})
        assert streams is not None and block.module is not None
        device = next(block.module.parameters()).device
        moments = {
            name: known.hessian.diagonal().clone()
            for name, known in stats.items()
            if known.hessian is not None
        }
        linears: dict[str, ScalarLinear] = init_linears(cls, block, stats, config, generator)

        def make_part(name: str, dtype: torch.dtype) -> nn.Module:
            weight_nm = block.weights[name].to(device).float()
            return Part(linears[name], weight_nm, dtype, moments.get(name))

        def make_optimizers(parts: Sequence[nn.Module]) -> Sequence[torch.optim.Optimizer]:
            each: list[Any] = list(parts)
            groups = [
                {"params": [values], "lr": rate * part.unit}
                for part in each
                for values, rate in ((part.level_mK, config.lr), (part.choice_nm, config.lr_codes))
            ]
            # A level is few weights': its gradient's size says more than its sign.
            return [torch.optim.SGD(groups, momentum=0.9, dampening=0.9)]

        return fit_block(
            block,
            streams,
            linears,
            make_part,
            make_optimizers,
            epochs=config.epochs,
            generator=generator,
            tick=tick,
        )

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: Scalar.Config) -> ScalarLinear:
        return ScalarLinear(spec, shape, config)


def max_levels(m: int, bits: float) -> int:
    """Levels that are stored of a matrix with m inputs; those that no input has are zeros."""
    return int(ROOM * 2**bits * m)


def allocate(worth_m: Tensor, bits: float) -> Tensor:
    """The bits [m] of each input, uint8: int(bits m) together, or fewer if levels run out.

    `worth_m` is what an input's error weighs times the variance of its weights.
    """
    worth = worth_m.double().tolist()
    left, levels_left = int(bits * len(worth)), max_levels(len(worth), bits) - len(worth)
    given = [0] * len(worth)
    # The first of equal ones first.
    queue = [(-value * (LEFT[0] - LEFT[1]), j) for j, value in enumerate(worth)]
    heapq.heapify(queue)
    while left and queue:
        _, j = heapq.heappop(queue)
        more = 1 << given[j]
        if more > levels_left:
            continue
        given[j] += 1
        left -= 1
        levels_left -= more
        if given[j] < WIDEST:
            gain = worth[j] * (LEFT[given[j]] - LEFT[given[j] + 1])
            heapq.heappush(queue, (-gain, j))
    return torch.tensor(given, dtype=torch.uint8, device=worth_m.device)


def _round_compensated(
    weight_nm: Tensor, bits_m: Tensor, given: HessianFactor
) -> tuple[Tensor, Tensor]:
    """Levels [m, K] as stored, the last one repeated, and codes [n, m], a column after another:
    of the `WIDTHS`, all taken in one go, those of the least squared error of the outputs."""
    tries, (n, m) = len(WIDTHS), weight_nm.shape
    bits, order = bits_m.tolist(), given.order_m.tolist()
    wider_T1 = torch.tensor(WIDTHS, device=weight_nm.device)[:, None]
    weight_Tnm = weight_nm.expand(tries, -1, -1)
    level_TmK = torch.empty(tries, m, 1 << max(bits), device=weight_nm.device)
    codes_mTn = torch.empty(m, tries, n, dtype=torch.uint8, device=weight_nm.device)

    def round_column(j: int, weight_mTn: Tensor) -> Tensor:
        column_Tn, place = weight_mTn[j], order[j]
        level_TK = fit_levels(column_Tn, torch.ones_like(column_Tn), 1 << bits[place])
        middle_T1 = level_TK.mean(1, keepdim=True)
        level_TK = middle_T1 + wider_T1 * (level_TK - middle_T1)
        level_TK = level_TK.clamp(-SCALE_MAX, SCALE_MAX).half().float()
        count = level_TK.shape[1]
        level_TmK[:, place, :count] = level_TK
        level_TmK[:, place, count:] = level_TK[:, -1:]
        code_Tn = nearest_codes(column_Tn, level_TK)
        codes_mTn[place] = code_Tn
        return level_TK.gather(1, code_Tn.long())

    best = int(compensate(weight_Tnm, given, m, round_column).sum(1).argmin())
    return level_TmK[best], codes_mTn[:, best].T


def _make_fields(level_mK: Tensor, codes_nm: Tensor, bits_m: Tensor, bits: float) -> PackedFields:
    m = len(bits_m)
    known_mK = (
        torch.arange(level_mK.shape[1], device=level_mK.device) < (1 << bits_m.long())[:, None]
    )
    level_L = torch.zeros(max_levels(m, bits), dtype=torch.float16, device=level_mK.device)
    used = level_mK[known_mK].half()
    level_L[: len(used)] = used
    planes = []
    for column in range(WIDEST):
        planes.append((codes_nm >> column) & 1)
    bits_nmb = torch.stack(planes, -1)
    asked_mb = torch.arange(WIDEST, device=bits_m.device) < bits_m[:, None]
    flat_nB = bits_nmb[:, asked_mb]
    flat_nB = F.pad(flat_nB, (0, int(bits * m) - flat_nB.shape[1]))
    return {"codes": pack_bits(flat_nB, 1), "levels": level_L, "bits": bits_m}


class Part(nn.Module):
    """One matrix during the fit: levels in spreads of their column, and a number a weight, which
    goes to the nearest of them."""

    def __init__(
        self,
        linear: ScalarLinear,
        weight_nm: Tensor,
        dtype: torch.dtype,
        moment_m: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.dtype = linear, dtype
        if moment_m is None:
            moment_m = torch.ones(weight_nm.shape[1], device=weight_nm.device)
        level_mK, codes_nm = linear.table(), linear.codes()
        self.spread_m = weight_nm.std(0, correction=0).clamp(min=SCALE_MIN)
        self.level_mK = nn.Parameter(level_mK / self.spread_m[:, None])
        apart_mK = self.level_mK.detach().diff(dim=1)
        # The mean distance of neighbouring levels.
        self.unit = float(apart_mK[apart_mK > 0].mean()) if (apart_mK > 0).any() else 1.0
        ratio_nm = weight_nm / self.spread_m
        self.choice_nm = nn.Parameter(
            clamp_to_cells(ratio_nm.T, self._ascending().detach(), codes_nm.T).T
        )
        self.choice_nm.register_post_accumulate_grad_hook(_normalise_gradient)  # type: ignore[no-untyped-call]
        # What the loss bends along a level: with its input's mean square and the weights that have
        # chosen it. Without this, levels of large inputs run away before others have moved.
        count_mK = torch.zeros_like(level_mK).scatter_add_(
            1, codes_nm.T.long(), torch.ones_like(weight_nm.T)
        )
        bend_mK = count_mK * (moment_m * self.spread_m.square())[:, None]

        def precondition(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad /= bend_mK.clamp(min=1e-30)
                _normalise_gradient(parameter)

        self.level_mK.register_post_accumulate_grad_hook(precondition)  # type: ignore[no-untyped-call]

    def _ascending(self) -> Tensor:
        """The levels [m, K]; infinite where an input has no more."""
        count_m1 = (1 << self.linear.q.bits.long())[:, None]
        places_K = torch.arange(self.level_mK.shape[1], device=count_m1.device)
        return self.level_mK.masked_fill(places_K >= count_m1, torch.inf).sort(-1).values

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Levels [m, K] with gradients, ascending, and codes [n, m]."""
        level_mK = self._ascending()
        codes_nm = nearest_codes(self.choice_nm.detach().T, level_mK.detach()).T
        return level_mK, codes_nm

    def forward(self, x: Tensor) -> Tensor:
        return recompute_product(self._product, x).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        level_mK, codes_nm = self.chosen()
        value_mn: Tensor = SelectLevels.apply(self.choice_nm.T, level_mK, codes_nm.T)  # type: ignore[no-untyped-call]
        return F.linear(x, (value_mn.T * self.spread_m).to(self.dtype))

    @torch.no_grad()
    def store(self) -> None:
        level_mK, codes_nm = self.chosen()
        level_mK = (level_mK * self.spread_m[:, None]).clamp(-SCALE_MAX, SCALE_MAX)
        fields = self.linear.q
        made = _make_fields(level_mK, codes_nm, fields.bits, self.linear.bits)
        for name, value in made.items():
            fields.get_buffer(name).copy_(value)


def _normalise_gradient(parameter: Tensor) -> None:
    """Make a gradient relative to the matrix's mean."""
    if parameter.grad is not None:
        sizes = parameter.grad.abs()
        parameter.grad /= (sizes.sum() / sizes.count_nonzero().clamp(min=1)).clamp(min=1e-30)


class ScalarLinear(PackedLinear):
    """Fields: codes U8 [n, packed row], levels F16 [L], bits U8 [m].

    A row's codes follow each other, b_j bits of each, the lowest first; so do the levels.
    """

    def __init__(self, spec: FieldSpec, shape: tuple[int, int], config: Scalar.Config) -> None:
        super().__init__(spec, shape)
        self.bits = config.bits

    def table(self) -> Tensor:
        """The levels of each input [m, K], the last one repeated."""
        count_m = 1 << self.q.bits.long()
        places_K = torch.arange(int(count_m.max()), device=count_m.device)
        begin_m = count_m.cumsum(0) - count_m
        return self.q.levels.float()[begin_m[:, None] + places_K.minimum(count_m[:, None] - 1)]

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """[n, m], uint8."""
        bits_m = self.q.bits
        flat_nB = unpack_bits(self.q.codes[rows], 1, int(self.bits * self.in_features))
        asked_mb = torch.arange(WIDEST, device=bits_m.device) < bits_m[:, None]
        bits_nmb = flat_nB.new_zeros(len(flat_nB), self.in_features, WIDEST)
        bits_nmb[:, asked_mb] = flat_nB[:, : int(asked_mb.sum())]
        shifts_b = torch.arange(WIDEST, dtype=torch.uint8, device=bits_m.device)
        return (bits_nmb << shifts_b).sum(-1, dtype=torch.uint8)

    def rows(self, rows: slice | Tensor) -> Tensor:
        return self.table().gather(1, self.codes(rows).T.long()).T
