"""Costs of steps with each number of threads that may be chosen, and the number that is faster.

One thread is faster than many for small models, and where other processes keep processors busy:
threads wait for each other at every product. The two are compared in real steps. Threads change how
fast a step is, and no bit of what the kernels compute.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from spectool.decode.cache import BatchCache
from spectool.decode.policy.base import Policy
from spectool.decode.policy.curve import Curve, load_curve, store_curve
from spectool.decode.protocol import Outcome
from spectool.decode.request import Request
from spectool.decode.target.base import Target
from spectool.processors import Waiting

# If a thread waits for a processor for a larger share of the time, the machine is busy.
BUSY = 0.1
# Steps of a trial, of which the first is not counted; a number of threads must gain this factor.
_TRIAL, _GAIN = 5, 1.05
# A trial ends early where its steps take this many times as long.
_HOPELESS = 1.5
# Steps before the first trial of what is not known, and between two others: at first, and at most.
# Trials that change nothing double the distance.
_FIRST, _APART, _MOST_APART = 8, 256, 8192
# Steps between two doubts about a curve that drifts.
_DOUBTS_APART = 64


class Costs:
    """The curve of each number of threads. `threads` is the number that decoding uses.

    With `choose_threads`, a processor's steps may use one thread in place of torch's number. That
    number is in force outside of steps. `curves` replaces those that were stored.
    """

    def __init__(
        self,
        target: Target[Any],
        *,
        choose_threads: bool = False,
        curves: dict[int, Curve] | None = None,
    ) -> None:
        self._target = target
        self._usual = torch.get_num_threads()
        if curves is None:
            chooses = choose_threads and target.device.type == "cpu"
            choices = {self._usual, 1} if chooses else {self._usual}
            curves = {threads: load_curve(target, threads) for threads in choices}
        self._curves = curves
        known = [each for each in curves if curves[each].largest()]
        self.threads = min(known, key=lambda each: curves[each].seconds(1), default=self._usual)
        if len(known) < len(curves):
            self.threads = self._usual
        self._wait = _APART if len(known) == len(curves) else _FIRST
        # Steps since the last trial, and since the last doubt.
        self._since_trial = self._since_doubt = 0
        # What steps took, in those that the curve expected: the latest, and those of a trial.
        self._latest: deque[float] = deque(maxlen=_TRIAL - 1)
        self._trial: list[float] | None = None
        self._waiting = Waiting()

    @property
    def curve(self) -> Curve:
        """Return the curve of the threads of this step."""
        return self._curves[self._threads_now]

    @property
    def chooses(self) -> bool:
        """Return whether there is a choice of threads."""
        return len(self._curves) > 1

    @property
    def _threads_now(self) -> int:
        if self._trial is None:
            return self.threads
        return next(each for each in self._curves if each != self.threads)

    def begin(self) -> None:
        """Set the threads of a step."""
        if self.chooses:
            torch.set_num_threads(self._threads_now)

    def learn(self, nodes: int, seconds: float, batch: int) -> None:
        """Take a step into account, and end its threads."""
        # A coarse clock may not have moved.
        seconds = max(seconds, 1e-6)
        usual = self._curves[self.threads]
        share = seconds / usual.seconds(nodes, batch) if usual.largest() else 1.0
        self.curve.refine(nodes, seconds, batch)
        if self.chooses:
            torch.set_num_threads(self._usual)
        self._since_trial += 1
        self._since_doubt += 1
        if self._trial is not None:
            self._trial.append(share)
            self._end_trial(self._trial)
            return
        self._latest.append(share)
        drifted = usual.has_drifted and self._since_doubt >= _DOUBTS_APART
        if drifted:
            usual.doubt()
            self._since_doubt, self._wait = 0, _APART
        is_due = drifted or self._since_trial >= self._wait
        if self.chooses and is_due and len(self._latest) == self._latest.maxlen:
            self._trial = []

    def _end_trial(self, shares: Sequence[float]) -> None:
        """End a trial that is long enough or hopeless, and choose."""
        before = statistics.median(self._latest)
        hopeless = len(shares) == 2 and shares[1] > _HOPELESS * before
        if len(shares) < _TRIAL and not hopeless:
            return
        found = statistics.median(shares[1:])
        chosen, self._trial = self._threads_now, None
        self._since_trial = 0
        if found * _GAIN < before:
            self.threads, self._wait = chosen, _APART
            self._latest.clear()
        else:
            self._wait = min(max(2 * self._wait, _APART), _MOST_APART)

    def close(self) -> None:
        """Store the curves, unless the machine was busy."""
        is_busy = self._waiting.share() > BUSY
        for threads, curve in self._curves.items():
            curve.quiet = curve.quiet and not is_busy
            store_curve(self._target, threads, curve)

    def __str__(self) -> str:
        return str(self._curves[self.threads])


class Paced(Policy):
    """Plain decoding with the number of threads that is faster."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._batch = costs, 1

    def limit(
        self, requests: Sequence[Request], budgets: Sequence[int], cache: BatchCache
    ) -> Sequence[int]:
        self._batch = len(requests)
        self._costs.begin()
        return budgets

    def learn(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        self._costs.learn(1, seconds, self._batch)

    def close(self) -> None:
        self._costs.close()
