"""A transcoder of one MLP of the reference, and which of its features the model keeps.

The transcoder (`evaluate/transcoder.py`) learns what the reference's MLP computes, on windows all
over the text. Up to 16 others, which share no token with them, give the figures:

- `explained_variance`: 1 - sum |y' - y|^2 / sum |y - mean of y|^2, where y are the outputs of a
  model's MLP and y' those of the transcoder on the same inputs; `change`: the model's minus the
  reference's;
- `active`: the number of features above 0, of a token;
- `overlap`: the features that are active in both models, divided by those that are active in one
  or both (Jaccard, 1901), as a mean over the tokens that activate any; NaN where none does;
- `feature_error`: the sum of |W_d (z' - z)| divided by that of |W_d z|, where z are the features of
  the reference, and z' of the model: by how much other features change the output;
- `loss_rise`: the rise of the reference's cross-entropy, in nats a token, with the transcoder in
  place of its MLP; `loss_recovered`: 1 minus this rise divided by the rise with the MLP's mean
  output there.

These are diagnostics of one layer: features that are lost may not matter, and a bad transcoder
(`explained_variance`, `loss_recovered`) shows little. The first token of a window is in no figure.

Shapes: S windows, L tokens of each, N = L - 1 of them in figures, T = S N, D width, F features,
K columns, R resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from spectool.errors import UnsupportedError
from spectool.evaluate.context import Context, Need
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.mlp import TappedMlp
from spectool.evaluate.transcoder import Trained, Transcoder, train
from spectool.evaluate.transcoder_plan import TranscoderPlan, read_transcoder, write_transcoder
from spectool.report import Reporter

# Outputs whose variance is at most this share of their mean square are one vector, rounded.
LEAST_VARIANCE = 1e-12

# The input and the output of an MLP on windows: [S, N, D] each.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Fit of the transcoder to the MLP of a model, and its active features of a token."""

    explained_variance: Interval
    active: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscoderFigures:
    """Figures of a transcoder; the module's description has the definitions.

    `tokens`: the number that it was trained on; `dead`: the number of features that none of the
    last of them activated.
    """

    layer: str
    features: int
    tokens: int
    seconds: float
    dead: int
    reference: Fit
    model: Fit
    change: Interval
    overlap: Interval
    feature_error: Interval
    loss_rise: Interval
    loss_recovered: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscoderFidelity(Measure):
    """Features of one MLP that the checkpoint keeps; see the module's description."""

    needs: ClassVar[tuple[Need, ...]] = ("windows", "transcoder")
    by_default: ClassVar[bool] = False

    transcoder: TranscoderFigures

    @classmethod
    def run(cls, context: Context) -> Self:
        plan, reporter = context.transcoder, context.reporter
        assert plan is not None
        mlp = TappedMlp(context.load_model(plan.reference), plan.mlp)
        trained = _make(context, plan, mlp)
        theirs = _read(mlp, plan.held_SL, reporter)
        losses = _splice(mlp, trained.transcoder, theirs[1].mean((0, 1)), plan.held_SL, reporter)
        # One model is in memory at a time.
        del mlp
        mlp = TappedMlp(context.load_model(context.checkpoint), plan.mlp)
        means = _compare(trained.transcoder, theirs, _read(mlp, plan.held_SL, reporter)) | losses
        return cls(transcoder=_describe(plan.mlp.layer, trained, means))

    def lines(self) -> Iterator[str]:
        found = self.transcoder
        yield (
            f"transcoder of {found.layer}: {found.features} features ({found.dead} dead), trained "
            f"on {found.tokens} tokens in {found.seconds:.0f} s"
        )
        yield (
            f"in place of the reference's MLP: cross-entropy {found.loss_rise:+.4f}, "
            f"loss recovered {found.loss_recovered:.1%}"
        )
        yield (
            f"variance of the MLP's output explained: {found.model.explained_variance:.2%}, "
            f"the reference's {found.reference.explained_variance:.2%}, change {found.change:+.2%}"
        )
        yield (
            f"active features of a token: {found.model.active:.1f}, the reference's "
            f"{found.reference.active:.1f}, overlap {found.overlap:.2%}"
        )
        yield f"change of the output by features: {found.feature_error:.2%}"


def _make(context: Context, plan: TranscoderPlan, mlp: TappedMlp) -> Trained:
    """Train a transcoder and keep it in `--transcoder-file`, or read it from there."""
    if plan.path is not None and plan.path.exists():
        return read_transcoder(plan.path, plan.made_of, context.device)
    x_TD, y_TD = (part.flatten(0, 1) for part in _read(mlp, plan.train_SL, context.reporter))
    trained = train(
        x_TD,
        y_TD,
        features=plan.made_of["width"] * x_TD.shape[1],
        tokens=plan.made_of["tokens"],
        device=context.device,
        reporter=context.reporter,
    )
    if plan.path is not None:
        write_transcoder(plan.path, trained, plan.made_of)
    return trained


def _read(mlp: TappedMlp, ids_SL: Tensor, reporter: Reporter) -> Pair:
    """Return the input and the output [S, N, D] of the MLP, in the processor's memory.

    Raises:
        NotFinite: one of them is NaN or infinite.
        UnsupportedError: the output is the same for all tokens.
    """
    x_SND = y_SND = torch.empty(0)
    for index, ids_L in enumerate(ids_SL):
        x_ND, y_ND = mlp.read(ids_L)
        if index == 0:
            x_SND, y_SND = (torch.empty(len(ids_SL), *each.shape) for each in (x_ND, y_ND))
        x_SND[index], y_SND[index] = x_ND, y_ND
        reporter.progress(index + 1, len(ids_SL), "windows read")
    y_TD = y_SND.flatten(0, 1)
    mean_square = torch.linalg.vector_norm(y_TD).square() / len(y_TD)
    if y_TD.var(0).sum() <= LEAST_VARIANCE * mean_square:
        raise UnsupportedError(f"{mlp.name}: the MLP's output does not vary")
    return x_SND, y_SND


def _splice(
    mlp: TappedMlp, transcoder: nn.Module, mean_D: Tensor, ids_SL: Tensor, reporter: Reporter
) -> dict[str, Tensor]:
    """Return the mean losses [S] of windows: as it is, with the transcoder, with a mean output."""
    stand_ins = {
        "loss": None,
        "spliced": transcoder,
        "ablated": mean_D.to(mlp.model.device).expand_as,
    }
    rows = []
    for index, ids_L in enumerate(ids_SL):
        rows.append([float(mlp.score(ids_L, each).mean()) for each in stand_ins.values()])
        reporter.progress(index + 1, len(ids_SL), "windows with the transcoder inside")
    return dict(zip(stand_ins, torch.tensor(rows, dtype=torch.float64).unbind(1), strict=True))


@torch.inference_mode()
def _compare(transcoder: Transcoder, theirs: Pair, ours: Pair) -> dict[str, Tensor]:
    """Return means over tokens [S] of what the figures are made of, for each held-out window."""
    their_mean_D, our_mean_D = (y_SND.mean((0, 1)) for _, y_SND in (theirs, ours))
    found: dict[str, list[float]] = defaultdict(list)
    for x_ND, y_ND, our_x_ND, our_y_ND in zip(*theirs, *ours, strict=True):
        inputs = (each.to(transcoder.device) for each in (x_ND, our_x_ND))
        z_NF, our_z_NF = map(transcoder.encode, inputs)
        out_ND, our_out_ND = (transcoder.decode(each).cpu() for each in (z_NF, our_z_NF))
        silent_D = transcoder.decode(torch.zeros_like(z_NF[0])).cpu()
        is_on_NF, is_ours_on_NF = z_NF > 0, our_z_NF > 0
        both_N, either_N = (is_on_NF & is_ours_on_NF).sum(-1), (is_on_NF | is_ours_on_NF).sum(-1)
        columns = {
            "error": (out_ND - y_ND).square().sum(-1),
            "spread": (y_ND - their_mean_D).square().sum(-1),
            "our_error": (our_out_ND - our_y_ND).square().sum(-1),
            "our_spread": (our_y_ND - our_mean_D).square().sum(-1),
            "active": is_on_NF.sum(-1),
            "our_active": is_ours_on_NF.sum(-1),
            "any": either_N > 0,
            "shared": both_N / either_N.clamp(min=1),
            "moved": torch.linalg.vector_norm(our_out_ND - out_ND, dim=-1),
            "size": torch.linalg.vector_norm(out_ND - silent_D, dim=-1),
        }
        for name, value_N in columns.items():
            found[name].append(float(value_N.double().mean()))
    return {name: torch.tensor(value_S, dtype=torch.float64) for name, value_S in found.items()}


def _describe(layer: str, trained: Trained, means: dict[str, Tensor]) -> TranscoderFigures:
    """Make the figures of means over the tokens of each held-out window."""
    columns_SK = torch.stack(list(means.values()), 1)

    def over(statistic: Callable[[dict[str, Tensor]], Tensor]) -> Interval:
        return bootstrap(
            columns_SK,
            lambda means_RK: statistic(dict(zip(means, means_RK.unbind(1), strict=True))),
        )

    return TranscoderFigures(
        layer=layer,
        features=len(trained.transcoder.b_enc),
        tokens=trained.tokens,
        seconds=trained.seconds,
        dead=trained.dead,
        reference=Fit(
            explained_variance=over(lambda m: 1 - m["error"] / m["spread"]),
            active=over(lambda m: m["active"]),
        ),
        model=Fit(
            explained_variance=over(lambda m: 1 - m["our_error"] / m["our_spread"]),
            active=over(lambda m: m["our_active"]),
        ),
        change=over(lambda m: m["error"] / m["spread"] - m["our_error"] / m["our_spread"]),
        overlap=over(lambda m: m["shared"] / m["any"]),
        feature_error=over(lambda m: m["moved"] / m["size"]),
        loss_rise=over(lambda m: m["spliced"] - m["loss"]),
        loss_recovered=over(lambda m: 1 - (m["spliced"] - m["loss"]) / (m["ablated"] - m["loss"])),
    )
