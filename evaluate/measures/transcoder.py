"""A transcoder of one MLP of the reference, and which of its features the model keeps.

The transcoder (`evaluate/transcoder.py`) learns what the reference's MLP computes, on windows all
over the text. Up to 16 others, which share no token with them, give the figures:

- `explained_variance`: 1 - sum |y' - y|^2 / sum |y - mean of y|^2, where y are the outputs of a
  model's MLP and y' the transcoder's for what goes into that MLP; `change`: the model's minus the
  reference's;
- `active`: the number of features above 0, of a token;
- `overlap`: the active features that both models' tokens have, divided by those that either has
  (Jaccard, 1901), as a mean over tokens; 1 where neither has any;
- `feature_error`: the sum of |W_d (z' - z)| divided by that of |W_d z|, where z are the features of
  the reference, and z' of the model: by how much other features change the output;
- `loss_rise`: what the cross-entropy of the reference rises by, in nats a token, with the
  transcoder in place of its MLP; `loss_recovered`: 1 minus this rise divided by the rise with the
  MLP's mean output there.

These are diagnostics of one layer: features that are lost may not matter, and a bad transcoder
(`explained_variance`, `loss_recovered`) shows little. The first token of a window is in no figure.

Shapes: S windows, L tokens of each, N = L - 1 of them in figures, T = S N, D width, F features,
K columns, R resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from spectool.data.windows import Windows
from spectool.errors import TextError, UsageError
from spectool.evaluate.context import Context, Need
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.mlp import TappedMlp, name_layer
from spectool.evaluate.transcoder import BATCH, Trained, read_transcoder, train, write_transcoder
from spectool.evaluate.transcoder import Transcoder as Module
from spectool.report import Reporter

HELD_OUT_WINDOWS = 16
# Text for fewer steps teaches nothing.
LEAST_TOKENS = 16 * BATCH

# What goes into an MLP and what comes out, of windows: [S, N, D] each.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well the transcoder fits the MLP of a model, and its active features of a token."""

    explained_variance: Interval
    active: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Figures of a transcoder; the module's description has the definitions.

    `tokens`: it was trained on; `dead`: features that none of the last ones activated.
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
class Transcoder(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("windows", "pair")
    by_default: ClassVar[bool] = False

    transcoder: Fidelity

    @classmethod
    def run(cls, context: Context) -> Self:
        assert context.pair is not None
        options, (reference, checkpoint) = context.options, context.pair
        layer = name_layer(reference, options.transcoder_layer)
        train_SL, held_SL = split(context.windows, options.transcoder_tokens)
        mlp = TappedMlp(context.load_model(reference), layer)
        reporter = context.reporter
        trained = _make(context, reference.fingerprint(), mlp, train_SL)
        theirs = _read(mlp, held_SL, reporter)
        losses = _splice(mlp, trained.transcoder, theirs[1].mean((0, 1)), held_SL, reporter)
        # One model is in memory at a time.
        del mlp
        ours = _read(TappedMlp(context.load_model(checkpoint), layer), held_SL, reporter)
        means = _compare(trained.transcoder, theirs, ours) | losses
        return cls(transcoder=_describe(layer, trained, means))

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


def split(windows: Windows, tokens: int) -> tuple[Tensor, Tensor]:
    """Return windows to train on, no more than give `tokens` tokens, and held-out ones [S, L].

    Both are from all over the text, so that they are of the same kinds.

    Raises:
        UsageError: windows may share tokens.
        TextError: the text is too short.
    """
    if windows.stride is not None or windows.protocol == "c4":
        name = "--stride" if windows.protocol != "c4" else "--protocol c4"
        raise UsageError(f"--measure transcoder holds windows out, which overlap with {name}")
    ids_SL = max(windows.groups, key=len)
    count, usable = len(ids_SL), ids_SL.shape[1] - 1
    held = min(HELD_OUT_WINDOWS, count // 4)
    if held < 2 or (count - held) * usable < LEAST_TOKENS:
        raise TextError(
            f"the text has {count} windows of {ids_SL.shape[1]} tokens; a transcoder needs 8 or "
            f"more, and {LEAST_TOKENS} tokens to learn from",
            hint="give a longer text with --text, or a smaller --window",
        )
    held_S = torch.linspace(0, count - 1, held).round().long()
    is_free = torch.ones(count, dtype=torch.bool)
    is_free[held_S] = False
    free_S = is_free.nonzero()[:, 0]
    wanted = min(len(free_S), math.ceil(tokens / usable))
    train_S = free_S[torch.linspace(0, len(free_S) - 1, wanted).round().long()]
    return ids_SL[train_S], ids_SL[held_S]


def _make(context: Context, reference: str, mlp: TappedMlp, train_SL: Tensor) -> Trained:
    """Train a transcoder and keep it in `--transcoder-file`, or read it from there.

    Raises:
        InputError: the file cannot be written, or holds another transcoder.
    """
    options, path = context.options, context.options.transcoder_file
    made_of = {
        "reference": reference,
        "layer": mlp.name,
        "text": Windows((train_SL,), train_SL.shape[1], None).digest(),
        "width": options.transcoder_width,
        "tokens": options.transcoder_tokens,
    }
    if path is not None and path.exists():
        return read_transcoder(path, made_of, context.device)
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"--transcoder-file {path}: there is no folder {path.parent}")
    x_TD, y_TD = (part.flatten(0, 1) for part in _read(mlp, train_SL, context.reporter))
    trained = train(
        x_TD,
        y_TD,
        features=options.transcoder_width * x_TD.shape[1],
        tokens=options.transcoder_tokens,
        device=context.device,
        reporter=context.reporter,
    )
    if path is not None:
        write_transcoder(path, trained, made_of)
    return trained


def _read(mlp: TappedMlp, ids_SL: Tensor, reporter: Reporter) -> Pair:
    """Return what goes into the MLP and what comes out [S, N, D], in the processor's memory."""
    x_SND = y_SND = torch.empty(0)
    for index, ids_L in enumerate(ids_SL):
        x_ND, y_ND = mlp.read(ids_L)
        if index == 0:
            x_SND, y_SND = (torch.empty(len(ids_SL), *each.shape) for each in (x_ND, y_ND))
        x_SND[index], y_SND[index] = x_ND, y_ND
        reporter.progress(index + 1, len(ids_SL), "windows read")
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
def _compare(transcoder: Module, theirs: Pair, ours: Pair) -> dict[str, Tensor]:
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
            "overlap": torch.where(either_N > 0, both_N / either_N.clamp(min=1), 1.0),
            "moved": torch.linalg.vector_norm(our_out_ND - out_ND, dim=-1),
            "size": torch.linalg.vector_norm(out_ND - silent_D, dim=-1),
        }
        for name, value_N in columns.items():
            found[name].append(float(value_N.double().mean()))
    return {name: torch.tensor(value_S, dtype=torch.float64) for name, value_S in found.items()}


def _describe(layer: str, trained: Trained, means: dict[str, Tensor]) -> Fidelity:
    """Make the figures of means over the tokens of each held-out window."""
    columns_SK = torch.stack(list(means.values()), 1)

    def over(statistic: Callable[[dict[str, Tensor]], Tensor]) -> Interval:
        return bootstrap(
            columns_SK,
            lambda means_RK: statistic(dict(zip(means, means_RK.unbind(1), strict=True))),
        )

    return Fidelity(
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
        overlap=over(lambda m: m["overlap"]),
        feature_error=over(lambda m: m["moved"] / m["size"]),
        loss_rise=over(lambda m: m["spliced"] - m["loss"]),
        loss_recovered=over(lambda m: 1 - (m["spliced"] - m["loss"]) / (m["ablated"] - m["loss"])),
    )
