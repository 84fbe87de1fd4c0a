"""Reports of a run while it works: its plan, its progress and events, as data.

The library passes facts; `cli/events.py` makes sentences of them. Summaries of texts that were read
(`data.text.Reading`) are events too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Reporter:
    """Listener of a run. A subclass overrides what it wants to hear; the rest is ignored."""

    def plan(self, plan: Any) -> None:
        """Hear the estimate of a run, before its work begins."""

    def progress(self, done: float, total: int, what: str) -> None:
        """Hear how many of `total` steps are done, fractions included; `what` names the steps."""

    def event(self, event: Any) -> None:
        """Hear a fact: one of the dataclasses below, or a `Reading`."""


SILENT = Reporter()


class ReporterGroup(Reporter):
    """Reporter that tells several others."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def plan(self, plan: Any) -> None:
        for reporter in self._reporters:
            reporter.plan(plan)

    def progress(self, done: float, total: int, what: str) -> None:
        for reporter in self._reporters:
            reporter.progress(done, total, what)

    def event(self, event: Any) -> None:
        for reporter in self._reporters:
            reporter.event(event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint is ready to run on `device`, whole or, with `streamed_bytes`, block by block.

    `kind`: class of the model. `runtime`: how its weights are held. `unused`: stored tensors that
    no module takes. `notes`: of the checkpoint's layout. `streamed_bytes`: its size as a whole.
    """

    name: str
    kind: str
    device: str
    runtime: str
    unused: Sequence[str]
    notes: Sequence[str]
    streamed_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ShortCalibration:
    """The calibration text holds `found` of the `wanted` sequences."""

    found: int
    wanted: int


@dataclass(frozen=True, slots=True)
class FeaturesFound:
    """The features of `texts` texts are read from a store."""

    texts: int
    store: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoriesCollected:
    """The model continued `prompts` prompts; `texts`, of `tokens` in all, are left to train on.

    `passes_per_block`: how many passes solved a block, on average.
    """

    prompts: int
    texts: int
    tokens: int
    passes_per_block: float


@dataclass(frozen=True, slots=True)
class UnitsMined:
    """`texts` of `tokens` in the loss have `units`, of `tokens_in_units` in all."""

    texts: int
    tokens: int
    units: int
    tokens_in_units: int


@dataclass(frozen=True, slots=True)
class TrainingStarts:
    """A training of `steps` steps starts, which takes about `seconds`."""

    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step of a training is done; step 0 is the evaluation before the first.

    `name`: of what is trained. `metrics` are empty at step 0. `evaluation`: metrics on held-out
    text, None at most steps.
    """

    name: str
    step: int
    steps: int
    metrics: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class NotItsSource:
    """A packed checkpoint was not made of its reference, so that no matrices are compared."""

    name: str
    reference: str


@dataclass(frozen=True, slots=True)
class LayersNotCompared:
    """The decoder layers of a checkpoint are not compared with its reference's."""

    name: str
    reference: str
    reason: str


@dataclass(frozen=True, slots=True)
class StatesKept:
    """A reference file keeps states of `width` numbers in place of `vocabulary` log-probabilities.

    `error`: the largest difference of a log-probability that they give back.
    """

    path: str
    width: int
    vocabulary: int
    error: float


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A measure that was not asked for by name does not run with this model."""

    measure: str
    reason: str


@dataclass(frozen=True, slots=True)
class AnswersKept:
    """`count` answers of a checkpoint are in a file already."""

    count: int
    path: str
    name: str


@dataclass(frozen=True, slots=True)
class PromptsLeftOut:
    """Prompts of a benchmark leave no room for `room` new tokens in the context."""

    left_out: int
    total: int
    room: int
    context: int


@dataclass(frozen=True, slots=True)
class PlainDecoding:
    """A benchmark decodes its prompts plainly, to find loops and to warm up."""

    prompts: int


@dataclass(frozen=True, slots=True)
class Timing:
    """A way to decode was timed, on the prompts of a category or on all."""

    name: str
    category: str | None
    tokens_per_second: float
    tokens_per_forward: float


@dataclass(frozen=True, slots=True)
class NoBaselines:
    """Transformers' baselines do not run at this batch size."""

    batch_size: int


@dataclass(frozen=True, slots=True)
class NoAssistant:
    """A draft model's vocabulary size is not the target's, which transformers needs."""

    baseline: str
    path: str
    target_size: int
    draft_size: int


@dataclass(frozen=True, slots=True)
class ChainRates:
    """Tokens per forward of a drafter's chains by length; None if it has no chains."""

    name: str
    rates: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class OptionTuned:
    """The speedup of each value of a draft option."""

    option: str
    speedups: Mapping[Any, float]
