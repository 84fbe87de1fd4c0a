"""Scripted drafters (right, guessing, always wrong), clocks, and a reference by transformers."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode import engine
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.policy import costs
from spectool.decode.policy import tuned as tuned_module
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.tree import Draft, Kind

from .trees import trie

Continuation = Callable[[Sequence[int], int], list[int]]


class Scripted(Drafter):
    """A drafter of the paths after the root that `script(tokens, budget)` returns."""

    def __init__(self, script: Callable[[list[int], int], list[list[int]]], needs: Needs) -> None:
        self.name = "scripted"
        self.needs = needs
        self.script = script
        self.outcomes: list[Outcome] = []
        self.prompts: list[PrefilledPrompt] = []

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: Any) -> None:
        self.prompts = list(prompts)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        drafts = []
        for request, limit in zip(requests, budget, strict=True):
            paths = [path[:limit] for path in self.script(list(request.tokens), limit)]
            drafts.append(trie(request.tokens[-1], paths, nodes=64))
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes += outcomes


def with_exits(
    model: PreTrainedModel, layers: Sequence[int], thresholds: Sequence[float]
) -> PreTrainedModel:
    """Copy a model and record exits after these layers in its configuration."""
    copied = copy.deepcopy(model)
    copied.config.exits = {"layers": list(layers), "thresholds": list(thresholds)}
    return copied


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Copy a model's first layers, with its final norm and lm_head."""
    cut: Any = copy.deepcopy(model)
    blocks = cut.transformer.h if hasattr(cut, "transformer") else cut.model.layers
    del blocks[count:]
    cut.config.num_hidden_layers = count
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = cut.config.layer_types[:count]
    made: PreTrainedModel = cut
    return made


def request_of(tokens: list[int], index: int = 0, **sampling: Any) -> Request:
    return Request(
        index=index,
        tokens=list(tokens),
        draws=Draws(0, index),
        sampling=SamplingParams(**sampling),
        max_new_tokens=1000,
        context=1000,
    )


@pytest.fixture
def begin() -> Callable[..., None]:
    """`begin(drafter, requests)` starts a batch of these requests without passes of a target."""

    def run(drafter: Drafter, requests: Sequence[Request], cache: Any = None) -> None:
        prompts = [
            PrefilledPrompt(request=request, logits_V=torch.zeros(320)) for request in requests
        ]
        drafter.add(prompts, cache)

    return run


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    return lambda script, needs=None: Scripted(script, needs or Needs())


@pytest.fixture
def adversaries(scripted: Callable[..., Scripted]) -> Callable[[list[int], int], dict[str, Any]]:
    """`adversaries(whole, vocab)` makes drafters by name for the text `whole`."""

    def make(whole: list[int], vocab: int) -> dict[str, Any]:
        noise = random.Random(7)

        def oracle(tokens: list[int], limit: int) -> list[list[int]]:
            return [whole[len(tokens) : len(tokens) + 5]]

        def branching(tokens: list[int], limit: int) -> list[list[int]]:
            """Return the truth for a random stretch, with siblings that leave it everywhere."""
            true = whole[len(tokens) : len(tokens) + noise.randint(0, 6)]
            paths = [
                [*true[:at], *(noise.randrange(vocab) for _ in range(noise.randint(1, 3)))]
                for at in range(len(true) + 1)
            ]
            paths.append(true)
            noise.shuffle(paths)
            return paths

        def guesses(tokens: list[int], limit: int) -> list[list[int]]:
            return [[noise.randrange(vocab) for _ in range(4)] for _ in range(3)]

        def wrong(tokens: list[int], limit: int) -> list[list[int]]:
            return [[(token + 1) % vocab for token in whole[len(tokens) : len(tokens) + 4]]]

        scripts = {"oracle": oracle, "branching": branching, "guesses": guesses, "wrong": wrong}
        return {name: scripted(script) for name, script in scripts.items()}

    return make


class Clock:
    """A clock that stands still unless moved, or ticks at every reading. No test reads a real one.

    `waits` is the share of time that the process waits for a processor.
    """

    def __init__(self, tick: Callable[[], float] = lambda: 0.0) -> None:
        self.now = self.waits = 0.0
        self.tick = tick

    def share(self) -> float:
        return self.waits

    def perf_counter(self) -> float:
        self.now += self.tick()
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the time that tuning and the engine read."""
    made = Clock()
    monkeypatch.setattr(costs, "Waiting", lambda: made)
    for module in (tuned_module, engine):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep this test's curves apart from those of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """`endless(model)` removes the end-of-text token for the length of the test."""

    def remove(model: PreTrainedModel) -> PreTrainedModel:
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        return model

    return remove


@pytest.fixture
def reference() -> Callable[..., list[int]]:
    """`reference(model, prompt, n)` returns the new tokens of transformers' greedy generation."""

    def run(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
        )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    return run


@functools.cache
def _plain_text(
    model: PreTrainedModel, prompt: tuple[int, ...], new_tokens: int, ends: tuple[Any, ...]
) -> tuple[int, ...]:
    (result,) = Runner(model).generate([list(prompt)], max_new_tokens=new_tokens)
    return tuple(result.token_ids)


def plain_text(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Return a greedy text without drafts, computed once for all drafters of a shared model."""
    end = model.generation_config.eos_token_id
    ends = tuple(end) if isinstance(end, list) else (end,)
    return list(_plain_text(model, tuple(prompt), new_tokens, ends))


@pytest.fixture
def prompt_of() -> Callable[..., list[int]]:
    """`prompt_of(n)` returns n random tokens; the second half repeats the first."""

    def make(length: int, *, seed: int = 0, vocab: int = 320) -> list[int]:
        noise = random.Random(seed)
        half = [noise.randrange(2, vocab) for _ in range((length + 1) // 2)]
        return (half + half)[:length]

    return make
