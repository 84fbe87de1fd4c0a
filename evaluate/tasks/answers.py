"""Answers of one checkpoint to the requests of tasks: scored pairs, and continued texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectool.decode.generate import Runner
from spectool.decode.options import SamplingOptions
from spectool.evaluate.tasks.kept import KeptAnswers
from spectool.evaluate.tasks.scorer import BATCH, Likelihood, Pair, Scorer
from spectool.report import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A text to continue: its tokens, where it ends, and how tokens are drawn."""

    tokens: list[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    eos: Collection[int] = ()
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions())

    def as_json(self) -> list[Any]:
        """Return all that the answer depends on."""
        sampling = dict(self.sampling)
        return [self.tokens, self.max_new_tokens, list(self.stop), sorted(self.eos), sampling]


class Answers:
    """Answers of a runner's model, computed where they are not kept already.

    Batches are made of all requests of a call, whatever is kept, and pass whole: a run that was
    killed and goes on has the bits of one that was not.
    """

    def __init__(
        self,
        runner: Runner,
        kept: KeptAnswers,
        *,
        batch_size: int | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.runner, self.kept, self.reporter = runner, kept, reporter
        self.batch_size = batch_size or BATCH
        self.scorer = Scorer(runner.target, batch_size)

    def score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Return the likelihood of each pair's continuation."""
        requests = [["score", list(context), list(end)] for context, end in pairs]
        answers = [self.kept.get(request) for request in requests]
        done = 0
        for batch in self.scorer.plan(pairs):
            asked = [i for group in batch for each in group.continuations.values() for i in each]
            if any(answers[index] is None for index in asked):
                for index, found in self.scorer.run(batch).items():
                    answers[index] = [found.value, found.greedy]
                    self.kept.add(requests[index], answers[index])
            done += len(asked)
            self.reporter.progress(done, len(pairs), "continuations scored")
        return [Likelihood(value, greedy) for value, greedy in answers]

    def write(self, questions: Sequence[Question]) -> list[list[int]]:
        """Return the new tokens of each question; sampled ones are drawn by its place in the call.

        Raises:
            UsageError: an option of sampling is out of its range.
        """
        requests = [
            ["write", index if each.sampling.get("temperature") else 0, *each.as_json()]
            for index, each in enumerate(questions)
        ]
        answers = [self.kept.get(request) for request in requests]
        size = self.batch_size
        for start in range(0, len(questions), size):
            part = range(start, min(start + size, len(questions)))
            if any(answers[index] is None for index in part):
                for index, tokens in zip(part, self._continue(questions, part), strict=True):
                    answers[index] = tokens
                    self.kept.add(requests[index], tokens)
            self.reporter.progress(part.stop, len(questions), "texts written")
        return answers

    def _continue(self, questions: Sequence[Question], part: Sequence[int]) -> list[list[int]]:
        """Return the new tokens of a batch of questions."""
        runner = self.runner
        requests = [
            runner.make_request(
                questions[index].tokens,
                index=index,
                max_new_tokens=questions[index].max_new_tokens,
                stop=questions[index].stop,
                eos=questions[index].eos,
                live=False,
                **questions[index].sampling,
            )
            for index in part
        ]
        engine = runner.engine(len(requests))
        for request in requests:
            engine.submit(request)
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
        return [request.new_tokens for request in requests]
