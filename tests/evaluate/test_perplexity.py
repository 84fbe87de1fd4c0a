"""Perplexity and its parts, by the definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

import pytest
import torch

from spectool.data.windows import Windows, cut
from spectool.decode.options import CacheOptions
from spectool.evaluate.context import Context
from spectool.evaluate.fidelity import Scores
from spectool.evaluate.measures.perplexity import Perplexity


class FakeContext:
    """What the measure takes of a context."""

    load = CacheOptions(model="none")

    def __init__(self, windows: Windows, **figures: torch.Tensor) -> None:
        self.windows, self.scores = windows, Scores(windows, figures)


def measure(windows: Windows, **figures: torch.Tensor) -> Any:
    return Perplexity.run(cast(Context, FakeContext(windows, **figures))).perplexity


def test_parts_by_place_and_by_frequency_are_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    # Zipf's law: some tokens make up more than a decile, many occur once.
    weights = 1 / torch.arange(1.0, 201.0)
    ids = torch.multinomial(weights, 1100, replacement=True, generator=generator).tolist()
    windows = cut(ids, length=101, bos=7)
    nll_N = torch.rand(windows.num_tokens, generator=generator)
    found = measure(windows, nll=nll_N, reference_nll=nll_N - 0.5)
    assert found.value == pytest.approx(math.exp(float(nll_N.mean())), rel=1e-6)

    by_place: dict[tuple[int, int], list[float]] = {}
    rows = [row for group in windows.groups for row in group.tolist()]
    scored = [(place, row[place]) for row in rows for place in range(1, len(row))]
    for (place, _), nll in zip(scored, nll_N.tolist(), strict=True):
        part = next(p for p in ((1, 31), (32, 63), (64, 100)) if p[0] <= place <= p[1])
        by_place.setdefault(part, []).append(nll)
    assert [(p.first, p.last) for p in found.by_position] == sorted(by_place)
    for part in found.by_position:
        values = by_place[part.first, part.last]
        assert part.tokens == len(values)
        assert part.perplexity == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-6)
        assert part.ratio == pytest.approx(math.exp(0.5), rel=1e-6)

    counts = Counter(token for _, token in scored)
    order = sorted(counts, key=lambda token: (-counts[token], token))
    decile, before = {}, 0
    for token in order:
        decile[token] = 1 + int(10 * (before + counts[token] / 2) / len(scored))
        before += counts[token]
    assert [part.decile for part in found.by_frequency] == sorted(set(decile.values()))
    for part in found.by_frequency:
        inside = [decile[token] == part.decile for _, token in scored]
        values = [nll for nll, yes in zip(nll_N.tolist(), inside, strict=True) if yes]
        members = [counts[token] for token in order if decile[token] == part.decile]
        assert (part.tokens, part.most, part.least) == (len(values), max(members), min(members))
        assert part.perplexity == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-6)


def test_without_a_reference_there_is_no_ratio() -> None:
    found = measure(cut([1, 2, 3] * 10, length=5, bos=None), nll=torch.ones(24))
    assert found.by_position[0].ratio is None and found.by_frequency[0].ratio is None
    assert found.lower == found.upper == pytest.approx(math.e)
