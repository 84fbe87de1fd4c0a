"""Forecast of a training of draft heads, from finished trainings of such heads.

A finished training is one point: the tokens that it read, and the acceptance of the heads that it
wrote. The evaluations inside a training are no points: its learning rate falls over its own steps,
so that half-way it has not reached what a training of half its steps ends with.

The gain over untrained heads is fitted by a saturating power law of the tokens n,

    gain(n) = A (1 - (1 + n / k)^-b),

least squares in A for each k and b of a grid. The interval is for one further training: finished
ones are resampled (Efron 1979), the law is fitted again, and a residual of the fit is added, scaled
for the three parameters.

Shapes: N trainings, R resamples, C pairs of k and b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.headers import HEADS
from spectool.decode.heads.artifact import HeadsRecord, read_record
from spectool.errors import CheckpointError
from spectool.evaluate.intervals import Interval

# Fewer do not determine the three parameters and their spread.
LEAST_TRAININGS = 5
LEAST_BUDGETS = 3
_RESAMPLES = 2000
_NUM_SCALES = 60
_EXPONENTS = (0.0625, 0.125, 0.18, 0.25, 0.35, 0.42, 0.5, 0.6, 0.7, 0.85, 1.0, 1.4, 2.0, 4.0)
# What two trainings have in common if one foretells the other, besides method, options and target.
# The texts may be others of the same kind; which is not checked.
_COMPARED = (
    "regenerate", "regenerate_model", "temperature", "init_from", "learning_rate", "warmup",
    "optimizer", "batch_tokens", "seq_len", "sequence_packing",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A finished training: the tokens that it read, and acceptance before and after it.

    `tokens_per_forward` is estimated for the default tree, `accuracy` that of the first head's
    first guess; both on text that the target wrote.
    """

    tokens: int
    tokens_per_forward: tuple[float, float]
    accuracy: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Forecast of a training that reads `tokens` tokens.

    `trainings` were fitted, of up to `largest` tokens. The figures are None where there are too few
    to tell, and `reason` says what is missing.
    """

    tokens: int
    trainings: int
    largest: int
    tokens_per_forward: Interval | None = None
    accuracy: Interval | None = None
    reason: str | None = None


def read_finished(
    paths: Sequence[Path], method: str, options: Mapping[str, Any], identity: Mapping[str, Any]
) -> list[Finished]:
    """Read the finished trainings of such heads; others are left out.

    Each path is a directory of draft heads, or a folder of such directories. `identity` is that of
    the training to come (`distill.plan.make_identity`).

    Raises:
        CheckpointError: a path holds no draft heads, or damaged ones.
    """
    found = []
    for path in paths:
        directories = [path] if (path / HEADS).is_file() else sorted(_list_heads(path))
        if not directories:
            raise CheckpointError(f"{path}: holds no draft heads")
        records = [read_record(directory) for directory in directories]
        found += [as_finished(r) for r in records if _is_such(r, method, options, identity)]
    return found


def _list_heads(folder: Path) -> Iterator[Path]:
    return (file.parent for file in folder.glob(f"*/{HEADS}"))


def _is_such(
    record: HeadsRecord, method: str, options: Mapping[str, Any], identity: Mapping[str, Any]
) -> bool:
    """Return whether a training is like the one to come, apart from its length and its texts."""
    done = record.training
    return (
        record.method == method
        and record.options == options
        and record.target["fingerprint"] == identity["source"]["fingerprint"]
        # Records of older versions do not say how many tokens were read.
        and done.get("tokens", 0) > 0
        and all(done.get(key) == identity[key] for key in _COMPARED)
    )


def as_finished(record: HeadsRecord) -> Finished:
    """Return the tokens of a training and what it reached, by its record."""
    first, *_ = evaluations = record.training["evaluations"]
    # The weights of the highest score are those that were written.
    best = max(evaluations, key=lambda each: float(each["score"]))
    return Finished(
        tokens=record.training["tokens"],
        tokens_per_forward=(first["score"], best["score"]),
        accuracy=(first["accuracy"][0], best["accuracy"][0]),
    )


def forecast(finished: Sequence[Finished], tokens: int) -> Forecast:
    """Foretell what a training that reads so many tokens reaches."""
    budgets = {each.tokens for each in finished}
    found = Forecast(tokens=tokens, trainings=len(finished), largest=max(budgets, default=0))
    if not finished:
        return replace(found, reason="no finished training of such heads for this model")
    if len(finished) < LEAST_TRAININGS or len(budgets) < LEAST_BUDGETS:
        reason = (
            f"{len(finished)} finished trainings with {len(budgets)} numbers of tokens; a fit "
            f"needs {LEAST_TRAININGS} with {LEAST_BUDGETS}"
        )
        return replace(found, reason=reason)
    read_N = torch.tensor([each.tokens for each in finished], dtype=torch.float64)
    return replace(
        found,
        tokens_per_forward=_fit(read_N, [each.tokens_per_forward for each in finished], tokens),
        accuracy=_fit(read_N, [each.accuracy for each in finished], tokens),
    )


def _fit(read_N: Tensor, figures: Sequence[tuple[float, float]], tokens: int) -> Interval:
    """Fit the law to figures before and after trainings; return its value at `tokens`."""
    before_N, after_N = torch.tensor(figures, dtype=torch.float64).unbind(1)
    gain_N, count = after_N - before_N, len(read_N)
    scales = torch.logspace(-1, 1, _NUM_SCALES, dtype=torch.float64)
    # From a tenth of the smallest training to ten times the largest.
    span = (read_N.max() / read_N.min()).sqrt()
    middle = (read_N.max() * read_N.min()).sqrt()
    k_C = (middle * scales * span ** scales.log10()).repeat_interleave(len(_EXPONENTS))
    b_C = torch.tensor(_EXPONENTS, dtype=torch.float64).repeat(_NUM_SCALES)
    shape_NC = 1 - (1 + read_N[:, None] / k_C) ** -b_C
    there_C = 1 - (1 + tokens / k_C) ** -b_C
    generator = torch.Generator().manual_seed(0)
    drawn_RN = torch.randint(count, (_RESAMPLES, count), generator=generator)
    times_RN = torch.zeros(_RESAMPLES, count, dtype=torch.float64)
    times_RN.scatter_add_(1, drawn_RN, torch.ones_like(times_RN))
    best, height = _solve(torch.ones(1, count, dtype=torch.float64), shape_NC, gain_N)
    start = float(before_N.mean())
    value = start + float(height * there_C[best])
    residual_N = (gain_N - height * shape_NC[:, best].squeeze(1)) * (count / (count - 3)) ** 0.5
    best_R, height_R = _solve(times_RN, shape_NC, gain_N)
    noise_R = residual_N[torch.randint(count, (_RESAMPLES,), generator=generator)]
    drawn_R = start + height_R * there_C[best_R] + noise_R
    edges = torch.quantile(drawn_R, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value, min(value, float(edges[0])), max(value, float(edges[1])))


def _solve(times_RN: Tensor, shape_NC: Tensor, gain_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for trainings counted so many times, the best column [R] of the grid and its A [R].

    A is not negative: trained heads are kept only if they are better.
    """
    moments_RC = (times_RN * gain_N) @ shape_NC
    squares_RC = times_RN @ shape_NC**2
    height_RC = (moments_RC / squares_RC).clamp(min=0)
    # The sum of squared residuals without the part that is the same in all columns.
    error_RC = height_RC**2 * squares_RC - 2 * height_RC * moments_RC
    best_R = error_RC.argmin(-1)
    return best_R, height_RC.gather(1, best_R[:, None])[:, 0]
