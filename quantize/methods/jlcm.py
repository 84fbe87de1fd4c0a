"""JLCM (`jlcm`): groups of rows share a codebook; codebooks and codes are trained jointly.

Rows are grouped by shape (k-means on the log of the spread and nine quantiles of w / spread). With
g the group of row i, s_i its scale, C_g the group's K = 2^b levels and k_ij the code of a weight,

    w'_ij = s_i C_g[k_ij].

Levels start as Lloyd's, weighted by the inputs' mean squares; codes start as those of column by
column rounding with compensation, as in `gptq`, which works best with wider levels: the codebook is
tried 1 to 1.8 times as wide. Then s, C and the codes are fitted per block (`fitting.py`). Codes are
trained in one of two forms. `latent`: a number u_ij per weight, k_ij the level nearest to u_ij, and
u gets the weight's gradient (straight-through). `preferences`: a number z_ijk per level, k_ij its
argmax, with the proximal rule below. Both move a weight to neighbouring levels first.

Source: Yvinec et al., JLCM, 2023 (arXiv:2309.17361); neither its code nor its full text was
available. The forms follow its abstract and reviews. Grouping, sizes and learning rates are ours,
and so is the start: from nearest codes training does not recover the loss.
Shapes: n outputs, m inputs, G groups, K levels, F features of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool import options
from spectool.errors import CheckpointError
from spectool.kernels.pack import pack_bits, packed_bytes, unpack_bits
from spectool.kernels.segments import Segment
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import option
from spectool.quantize.base import FitReport, PackedFields, Statistics
from spectool.quantize.codebook import (
    SelectLevels,
    clamp_to_cells,
    cluster_rows,
    fit_levels,
    nearest_codes,
    recompute_product,
)
from spectool.quantize.fitting import BlockQuantizer, TrainableMatrix
from spectool.quantize.methods.gptq import DAMPING, HessianFactor, compensate, factor_hessian
from spectool.quantize.methods.rtn import SCALE_MAX, SCALE_MIN, check_scale
from spectool.quantize.statistics import LinearStats

# Number of quantiles that describe a row's shape.
NUM_QUANTILES = 9
# Codebooks are tried this many times as wide as Lloyd's.
WIDTHS = (1.0, 1.2, 1.4, 1.6, 1.8)


class JLCM(BlockQuantizer):
    """JLCM; see the module docstring."""

    name = "jlcm"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: int = option(2, "bits of a code", minimum=1, maximum=4)
        groups: int = option(8, "codebooks of a matrix", minimum=1, maximum=256)
        form: Literal["latent", "preferences"] = option("latent", "how codes are trained")
        epochs: int = option(20, "passes over the calibration sequences", minimum=0)
        lr: float = option(2e-4, "learning rate of levels, in spreads of a row", minimum=0)
        lr_codes: float = option(
            5e-4, "learning rate of codes: levels per step of the mean gradient", minimum=0
        )

    config: Config
    statistics: ClassVar[Statistics] = {"hessian": "packed"}

    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        n, m = shape
        return {
            "codes": (torch.uint8, (n, packed_bytes(m, self.config.bits))),
            "codebook": (torch.float16, (min(self.config.groups, n), 2**self.config.bits)),
            "scale": (torch.float16, (n,)),
            "group": (torch.uint8, (n,)),
        }

    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix, as it is before the fit."""
        weight_nm = weight_nm.float()
        n, m = weight_nm.shape
        scale_n = weight_nm.square().mean(1).sqrt()
        check_scale(float(scale_n.max()))
        scale_n = torch.where(scale_n == 0, 1.0, scale_n.clamp(SCALE_MIN)).half().float()
        ratio_nm = weight_nm / scale_n[:, None]
        group_n = cluster_rows(_describe_rows(ratio_nm, scale_n), self.config.groups, generator)
        diagonal_m = torch.ones(m, device=weight_nm.device)
        if stats is not None and stats.hessian is not None:
            diagonal_m = stats.hessian.diagonal()
        # Weight of a squared error of the ratio in the output.
        cost_nm = scale_n[:, None].square() * diagonal_m
        levels = 2**self.config.bits
        codebook_GK = torch.zeros(min(self.config.groups, n), levels, device=weight_nm.device)
        for group in sorted(set(group_n.tolist())):
            rows_n = group_n == group
            codebook_GK[group] = fit_levels(
                ratio_nm[rows_n].flatten()[None], cost_nm[rows_n].flatten()[None], levels
            )[0]
        if stats is None or stats.hessian is None:
            codebook_GK = codebook_GK.half()
            codes_nm = nearest_codes(ratio_nm, codebook_GK[group_n].float())
        else:
            factor = factor_hessian(stats.hessian, DAMPING)
            tried = [
                _round_compensated(ratio_nm, scale_n, (width * codebook_GK).half(), group_n, factor)
                for width in WIDTHS
            ]
            _, codebook_GK, codes_nm = min(tried, key=lambda each: each[0])
        return {
            "codes": pack_bits(codes_nm, self.config.bits),
            "codebook": codebook_GK,
            "scale": scale_n.half(),
            "group": group_n.to(torch.uint8),
        }

    def fit_bytes(self) -> int:
        """Return the bytes per weight of `choice`, its gradient and its momentum."""
        return 12 if self.config.form == "latent" else 12 * 2**self.config.bits

    def make_trainable(
        self, linear: Any, weight_nm: Tensor, diagonal_m: Tensor | None, dtype: torch.dtype
    ) -> TrainedCodebook:
        form = LatentCodes if self.config.form == "latent" else PreferenceCodes
        return form(linear, weight_nm.to(linear.q.codes.device).float(), dtype)

    def make_optimizers(self, parts: Sequence[Any]) -> Sequence[torch.optim.Optimizer]:
        rate = self.config.lr_codes
        return [
            torch.optim.AdamW(
                [p for part in parts for p in (part.codebook_GK, part.gain_n)],
                lr=self.config.lr,
                weight_decay=0.0,
            ),
            # Not AdamW: rates per weight would undo the weighting of the gradients.
            torch.optim.SGD(
                [{"params": [part.choice], "lr": rate * part.unit} for part in parts],
                momentum=0.9,
                dampening=0.9,
            ),
        ]

    def extend_report(
        self, report: FitReport, before: Mapping[str, PackedFields], linears: Mapping[str, Any]
    ) -> FitReport:
        moved = further = total = 0
        for name, linear in linears.items():
            columns = linear.in_features
            old_nm = unpack_bits(before[name]["codes"], self.config.bits, columns, torch.int16)
            steps_nm = (linear.codes() - old_nm).abs()
            moved += int((steps_nm > 0).sum())
            further += int((steps_nm > 1).sum())
            total += steps_nm.numel()
        return replace(
            report,
            codes_moved=moved / total,
            codes_moved_further=further / total,
        )

    def build(self, shape: tuple[int, int]) -> JLCMLinear:
        return JLCMLinear(self.layout(shape), shape, self.config)


def _round_compensated(
    ratio_nm: Tensor, scale_n: Tensor, codebook_GK: Tensor, group_n: Tensor, factor: HessianFactor
) -> tuple[float, Tensor, Tensor]:
    """Round column by column with compensation.

    Returns the squared error of the outputs, the codebook and the codes [n, m].
    """
    level_nK = codebook_GK[group_n].float()
    n, m = ratio_nm.shape
    codes_mn = torch.empty(m, n, dtype=torch.uint8, device=ratio_nm.device)
    order = factor.order_m.tolist()

    def round_column(j: int, ratio_mn: Tensor) -> Tensor:
        code_n1 = nearest_codes(ratio_mn[j, :, None], level_nK)
        codes_mn[order[j]] = code_n1[:, 0]
        return level_nK.gather(1, code_n1.long())[:, 0]

    error_n = compensate(ratio_nm, factor, m, round_column)
    return float(scale_n.square() @ error_n), codebook_GK, codes_mn.T


def _describe_rows(ratio_nm: Tensor, scale_n: Tensor) -> Tensor:
    """Describe each row for grouping: log of the spread, and quantiles, each of unit variance."""
    shares = torch.linspace(0, 1, NUM_QUANTILES + 2, device=ratio_nm.device)[1:-1]
    # Not torch.quantile, which refuses large rows.
    indices = (shares * (ratio_nm.shape[1] - 1)).round().long()
    features_nF = torch.cat([scale_n.log()[:, None], ratio_nm.sort(1).values[:, indices]], 1)
    return (features_nF - features_nF.mean(0)) / features_nF.std(0, correction=0).clamp(min=1e-6)


class TrainedCodebook(TrainableMatrix):
    """One matrix in training: codebook, gains of the scales, and `choice`, which selects codes.

    The two forms of `choice` are subclasses.
    """

    choice: nn.Parameter

    def __init__(self, linear: JLCMLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dtype = linear, dtype
        self.group_n = linear.q.group.long()
        self.scale_n = linear.q.scale.float()
        self.gain_n = nn.Parameter(torch.ones_like(self.scale_n))
        self.codebook_GK = nn.Parameter(linear.q.codebook.float())
        used_GK = self.codebook_GK.detach()[sorted(set(self.group_n.tolist()))]
        # Mean distance of neighbouring levels.
        self.unit = float(used_GK.diff(dim=1).mean())

    def place_weights(self, weight_nm: Tensor) -> Tensor:
        """Return weights [n, m] in units of their scale, clamped to the cells of their codes."""
        ratio_nm = weight_nm / self.scale_n[:, None]
        return clamp_to_cells(ratio_nm, self.row_levels().detach(), self.linear.codes())

    def _normalise_gradient(self, choice: Tensor) -> None:
        """Divide gradients of `choice` by their mean size over the matrix."""

        def scale(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad /= parameter.grad.abs().mean().clamp(min=1e-30)

        choice.register_post_accumulate_grad_hook(scale)  # type: ignore[no-untyped-call]

    def row_levels(self) -> Tensor:
        """Return each row's levels [n, K], ascending."""
        return self.codebook_GK.sort(-1).values[self.group_n]

    @abstractmethod
    def select(self, level_nK: Tensor) -> tuple[Tensor, Tensor]:
        """Select codes [n, m]; also return their levels [n, m], differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return (recompute_product(self._product, x) * (self.scale_n * self.gain_n)).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        _, value_nm = self.select(self.row_levels())
        return F.linear(x, value_nm.to(self.dtype))

    @torch.no_grad()
    def store(self) -> None:
        """Write the current codes, codebook and scales into the linear's fields."""
        codes_nm, _ = self.select(self.row_levels())
        fields = self.linear.q
        fields.codes.copy_(pack_bits(codes_nm.to(torch.uint8), self.linear.config.bits))
        fields.codebook.copy_(self.codebook_GK.sort(-1).values)
        fields.scale.copy_((self.scale_n * self.gain_n).clamp(-SCALE_MAX, SCALE_MAX))


class LatentCodes(TrainedCodebook):
    """Latent form: `choice` is a number per weight, rounded to the nearest level."""

    def __init__(self, linear: JLCMLinear, weight_nm: Tensor, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self.choice = nn.Parameter(self.place_weights(weight_nm))
        self._normalise_gradient(self.choice)

    def select(self, level_nK: Tensor) -> tuple[Tensor, Tensor]:
        codes_nm = nearest_codes(self.choice.detach(), level_nK.detach())
        value_nm: Tensor = SelectLevels.apply(self.choice, level_nK, codes_nm)  # type: ignore[no-untyped-call]
        return codes_nm, value_nm


class PreferenceCodes(TrainedCodebook):
    """Preferences form: `choice` is a number per weight and level, of which the largest wins."""

    def __init__(self, linear: JLCMLinear, weight_nm: Tensor, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        ratio_nm1 = self.place_weights(weight_nm)[..., None]
        level_n1K = self.row_levels().detach()[:, None]
        # Decreasing with the distance, so that neighbours win first; the scale makes a step of the
        # mean gradient move a weight as far as in the latent form.
        self.choice = nn.Parameter(-(ratio_nm1 - level_n1K).square() / (2 * self.unit))
        self._normalise_gradient(self.choice)

    def select(self, level_nK: Tensor) -> tuple[Tensor, Tensor]:
        codes_nm = self.choice.detach().argmax(-1)
        value_nm: Tensor = Proximal.apply(self.choice, level_nK, codes_nm, self.unit)  # type: ignore[no-untyped-call]
        return codes_nm, value_nm


class Proximal(torch.autograd.Function):
    """Levels selected by preferences, with the proximal rule as the gradient of the preferences.

    With G the gradient of w'_ij, k* the selected level and d the mean distance of neighbouring
    levels,

        dL/dz_ijk = s_i G sign(C_k - C_k*) d^2 / |C_k - C_k*|,    dL/dz_ijk* = 0.

    Distant levels get smaller gradients, while those of a softmax would grow with the distance.
    """

    @staticmethod
    def forward(
        ctx: Any, choice_nmK: Tensor, level_nK: Tensor, codes_nm: Tensor, unit: float
    ) -> Tensor:
        ctx.save_for_backward(level_nK, codes_nm)
        ctx.unit = unit
        return level_nK.gather(1, codes_nm)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (slope_nm,) = slopes
        level_nK, codes_nm = ctx.saved_tensors
        level_slope_nK = torch.zeros_like(level_nK).scatter_add_(1, codes_nm, slope_nm)
        distance_nmK = level_nK[:, None] - level_nK.gather(1, codes_nm)[..., None]
        proximal_nmK = torch.where(distance_nmK == 0, 0.0, ctx.unit**2 / distance_nmK)
        return slope_nm[..., None] * proximal_nmK, level_slope_nK, None, None


class JLCMLinear(PackedLinear):
    """Packed linear of `jlcm`.

    Fields: codes U8 [n, bit-packed row], codebook F16 [G, K], scale F16 [n], group U8 [n].
    """

    config: JLCM.Config

    def codes(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Unpack codes [n, m] as int16."""
        return unpack_bits(self.q.codes[rows], self.config.bits, self.in_features, torch.int16)

    def rows(self, rows: slice | Tensor) -> Tensor:
        group_n, scale_n = self.q.group[rows].long(), self.q.scale[rows].float()
        levels_nK = self.q.codebook.float()[group_n] * scale_n[:, None]
        return levels_nK.gather(1, self.codes(rows).long())

    def segments(self) -> list[Segment]:
        table_n = self.q.group.long()
        if int(table_n.max()) >= len(self.q.codebook):
            raise CheckpointError("the groups of a jlcm matrix are damaged: no such codebook")
        return [
            Segment(
                codes=unpack_bits(self.q.codes, self.config.bits, self.in_features),
                bits=self.config.bits,
                group_size=self.in_features,
                scale=self.q.scale.float()[:, None],
                levels=self.q.codebook.float(),
                table=table_n,
            )
        ]
