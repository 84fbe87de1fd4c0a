"""Texts that the checkpoint writes by itself: likelihood can survive while generation breaks.

Each opening (`Context.openings`) is continued twice, greedily and at temperature 0.8 with a fixed
seed. The figures, over texts without the token that ended them:

- `repetition`: the mean share of a text's 4-grams that occurred before in the same text (Welleck et
  al., 2020, seq-rep-4); 0 for texts of fewer tokens.
- `loops`: the share of texts that end in a cycle: for some p, the last max(3 p, 16) tokens have
  period p.
- `ends`: the share of texts that an end-of-text token ended.
- `distinct`: the number of different bigrams of all texts together, divided by that of all bigrams
  (Li et al., 2016, distinct-2); NaN if no text has two tokens.
- `exact_match`: of prompts with an answer of one line, the share whose text has that line as its
  first one that is not blank; space around lines is ignored.
- `agreement`: the mean number of tokens before greedy texts first differ from the reference's.

Shapes: N texts, K columns (`_COLUMNS`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from spectool.checkpoint.tensors import Checkpoint
from spectool.data.text import Prompt
from spectool.decode.generate import Runner
from spectool.decode.result import Result
from spectool.evaluate.bench import select_fitting
from spectool.evaluate.certify.texts import count_equal
from spectool.evaluate.context import Context, Need
from spectool.evaluate.intervals import Interval, bootstrap, share
from spectool.evaluate.measures.base import Measure
from spectool.evaluate.results import number_names

TEMPERATURES = {"greedy": 0.0, "sampled": 0.8}
BATCH = 16
GRAM = 4
CYCLES, CYCLE_TOKENS = 3, 16
# Of each text; the last two give `distinct`.
_COLUMNS = ("repetition", "loops", "ends", "exact_match", "new", "bigrams")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures of the texts at one temperature, or their differences from the reference's."""

    repetition: Interval
    loops: Interval
    ends: Interval
    distinct: Interval
    exact_match: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    greedy: Figures
    sampled: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Both):
    """Figures of a checkpoint's texts. `change`: minus the reference's, paired by prompt."""

    prompts: int
    max_new_tokens: int
    reference: Both | None = None
    change: Both | None = None
    agreement: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("openings",)

    generation: Texts

    @classmethod
    def run(cls, context: Context) -> Self:
        assert context.openings is not None
        limit = context.new_tokens
        runner = open_runner(context, context.checkpoint, context.load.kv)
        chosen = select_fitting(runner, context.openings, limit, context.reporter)
        prompts = [prompt for prompt, _ in chosen]
        written = _write(runner, chosen, limit)
        own = {name: _tabulate(texts, prompts) for name, texts in written.items()}
        found = Texts(
            greedy=_describe(own["greedy"]),
            sampled=_describe(own["sampled"]),
            prompts=len(prompts),
            max_new_tokens=limit,
        )
        if context.paired is None:
            return cls(generation=found)
        # One model is in memory at a time.
        del runner
        read = _write(open_runner(context, context.paired), chosen, limit)
        theirs = {name: _tabulate(texts, prompts) for name, texts in read.items()}
        pairs = zip(written["greedy"], read["greedy"], strict=True)
        agreed_N1 = torch.tensor([[float(count_equal(*pair))] for pair in pairs])
        return cls(
            generation=replace(
                found,
                reference=Both(**{name: _describe(each) for name, each in theirs.items()}),
                change=Both(**{name: _compare(own[name], theirs[name]) for name in own}),
                agreement=bootstrap(agreed_N1, lambda means_RK: means_RK[:, 0]),
            )
        )

    @classmethod
    def metrics(cls, context: Context | None = None) -> list[str]:
        names = number_names(cls)
        if context is None:
            return list(names)
        paired, parts = context.paired is not None, ("reference", "change", "agreement")
        answered = any(_answer_line(prompt) for prompt in context.openings or ())
        return [
            name
            for name in names
            if (paired or name.split(".")[1] not in parts)
            and (answered or "exact_match" not in name.split("."))
        ]

    def lines(self) -> Iterator[str]:
        found = self.generation
        yield f"{found.prompts} openings continued by up to {found.max_new_tokens} tokens:"
        for name, temperature in TEMPERATURES.items():
            yield from _list_figures(f"at temperature {temperature:g}", getattr(found, name))
            if found.change is not None:
                yield from _list_figures("  minus the reference's", getattr(found.change, name))
        if found.agreement is not None:
            yield f"greedy texts are the reference's for {found.agreement} tokens"


def open_runner(context: Context, checkpoint: Checkpoint, kv: str = "dense") -> Runner:
    """Load a checkpoint to decode plainly."""
    model = context.load_model(checkpoint)
    return Runner(model, tokenizer=context.tokenizer, kv=kv, forward=context.load.forward)


def _write(
    runner: Runner, chosen: Sequence[tuple[Prompt, list[int]]], limit: int
) -> dict[str, list[Result]]:
    """Continue the prompts at each temperature; a prompt has the same random numbers every time."""
    return {
        name: runner.generate(
            [tokens for _, tokens in chosen],
            max_new_tokens=limit,
            batch_size=BATCH,
            eos=[prompt.ends for prompt, _ in chosen],
            temperature=temperature,
        )
        for name, temperature in TEMPERATURES.items()
    }


def _tabulate(texts: Sequence[Result], prompts: Sequence[Prompt]) -> Tensor:
    """Return the columns [N, K] of texts; NaN as `exact_match` where a prompt has no answer."""
    seen: set[tuple[int, ...]] = set()
    rows: list[list[float]] = []
    for text, prompt in zip(texts, prompts, strict=True):
        tokens, answer = _without_end(text), _answer_line(prompt)
        bigrams = list_grams(tokens, 2)
        # Each text counts those that none before it has, so that their sum is that of all texts.
        new = set(bigrams) - seen
        seen |= new
        first = next((line.strip() for line in text.text.splitlines() if line.strip()), "")
        rows.append(
            [
                repeated_share(tokens),
                float(ends_in_cycle(tokens)),
                float(text.finish_reason == "eos"),
                float(first == answer) if answer else torch.nan,
                float(len(new)),
                float(len(bigrams)),
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def _describe(columns_NK: Tensor) -> Figures:
    by_name = dict(zip(_COLUMNS, columns_NK.unbind(1), strict=True))
    answered = by_name["exact_match"][~by_name["exact_match"].isnan()]
    return Figures(
        repetition=bootstrap(columns_NK, lambda means_RK: means_RK[:, 0]),
        loops=share(int(by_name["loops"].sum()), len(columns_NK)),
        ends=share(int(by_name["ends"].sum()), len(columns_NK)),
        distinct=bootstrap(columns_NK, lambda means_RK: means_RK[:, 4] / means_RK[:, 5]),
        exact_match=share(int(answered.sum()), len(answered)) if len(answered) else None,
    )


def _compare(own_NK: Tensor, their_NK: Tensor) -> Figures:
    """Return own minus their figures, both resampled by prompt."""
    width = len(_COLUMNS)
    pairs_NK = torch.cat([own_NK, their_NK], 1)

    def subtract(column: int, rows_NK: Tensor = pairs_NK) -> Interval:
        return bootstrap(rows_NK, lambda means: means[:, column] - means[:, width + column])

    answered_NK = pairs_NK[~pairs_NK[:, 3].isnan()]
    return Figures(
        repetition=subtract(0),
        loops=subtract(1),
        ends=subtract(2),
        distinct=bootstrap(
            pairs_NK, lambda means: means[:, 4] / means[:, 5] - means[:, 10] / means[:, 11]
        ),
        exact_match=subtract(3, answered_NK) if len(answered_NK) else None,
    )


def _list_figures(title: str, figures: Figures) -> Iterator[str]:
    parts = {
        "repetition": figures.repetition,
        "loops": figures.loops,
        "ends": figures.ends,
        "distinct bigrams": figures.distinct,
        "exact match": figures.exact_match,
    }
    yield f"{title}: " + ", ".join(
        f"{name} {part.value:.1%} [{part.lower:.1%}, {part.upper:.1%}]"
        for name, part in parts.items()
        if part is not None
    )


def _without_end(text: Result) -> list[int]:
    return text.token_ids[:-1] if text.finish_reason == "eos" else text.token_ids


def _answer_line(prompt: Prompt) -> str:
    """Return the answer of a prompt if it is one line, else an empty text."""
    return prompt.answer if len(prompt.answer.splitlines()) == 1 else ""


def list_grams(tokens: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    """List the runs of `size` tokens, in order."""
    return [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before; 0 if there are none."""
    grams = list_grams(tokens, GRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_cycle(tokens: Sequence[int]) -> bool:
    """Return whether the last max(3 p, 16) tokens have period p, for some p."""
    for period in range(1, len(tokens) // CYCLES + 1):
        size = max(CYCLES * period, CYCLE_TOKENS)
        tail = tokens[-size:]
        if len(tail) == size and tail[period:] == tail[:-period]:
            return True
    return False
