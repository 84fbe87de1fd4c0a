"""Drafters that know the answer, guess, or are always wrong; and a reference by transformers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode import tree
from spectool.decode.policy import curve
from spectool.decode.policy import tuned as tuned_module
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams
from spectool.decode.tree import Draft, Kind

Continuation = Callable[[Sequence[int], int], list[int]]


class Scripted(Drafter):
    """Drafts what `script(tokens, budget)` says: paths after the root, merged in their order."""

    def __init__(self, script: Callable[[list[int], int], list[list[int]]], needs: Needs) -> None:
        self.name = "scripted"
        self.needs = needs
        self.script = script
        self.outcomes: list[Outcome] = []
        self.prompts: list[PrefilledPrompt] = []

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def begin(self, prompts: Sequence[PrefilledPrompt], cache: Any) -> None:
        self.prompts = list(prompts)

    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        drafts = []
        for row, limit in zip(rows, budget, strict=True):
            paths = [path[:limit] for path in self.script(list(row.tokens), limit)]
            drafts.append(tree.trie(row.tokens[-1], paths, nodes=64))
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes += outcomes


@pytest.fixture
def begin() -> Callable[..., None]:
    """`begin(drafter, rows)`: a batch whose prompts these rows are, without a target's passes."""

    def run(drafter: Drafter, rows: Sequence[Request], cache: Any = None) -> None:
        prompts = [PrefilledPrompt(row=row, logits_V=torch.zeros(320)) for row in rows]
        drafter.begin(prompts, cache)

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much where a neighbour keeps a core busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    return lambda script, needs=None: Scripted(script, needs or Needs())


@pytest.fixture
def adversaries(scripted: Callable[..., Scripted]) -> Callable[[list[int], int], dict[str, Any]]:
    """`adversaries(whole, vocab)`: drafters by name for a text whose continuation is `whole`."""

    def make(whole: list[int], vocab: int) -> dict[str, Any]:
        noise = random.Random(7)

        def oracle(tokens: list[int], limit: int) -> list[list[int]]:
            return [whole[len(tokens) : len(tokens) + 5]]

        def branching(tokens: list[int], limit: int) -> list[list[int]]:
            """The truth for a random stretch, among siblings that leave it at every depth."""
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
    """Stands still unless it is moved, or is to move at every look. No test looks at a real one.

    Of its time the process waits the part `waits` for a processor.
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
    """What tuning and the measuring of passes take for the time."""
    made = Clock()
    for module in (curve, tuned_module):
        monkeypatch.setattr(module, "time", made)
        monkeypatch.setattr(module, "Waiting", lambda: made)
    return made


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's curves are kept, away from other tests' curves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """The model without an end-of-text token, for the length of the test."""

    def remove(model: PreTrainedModel) -> PreTrainedModel:
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        return model

    return remove


@pytest.fixture
def reference() -> Callable[..., list[int]]:
    """`reference(model, prompt, n)`: the new tokens of transformers' own greedy generation."""

    def run(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
        )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    return run


@pytest.fixture
def prompt_of() -> Callable[..., list[int]]:
    """`prompt_of(n)`: n random tokens; the second half repeats the first."""

    def make(length: int, *, seed: int = 0, vocab: int = 320) -> list[int]:
        noise = random.Random(seed)
        half = [noise.randrange(2, vocab) for _ in range((length + 1) // 2)]
        return (half + half)[:length]

    return make
