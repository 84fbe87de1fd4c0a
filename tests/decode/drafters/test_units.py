"""Lexical unit decoding: guesses and text are those of slow loops that follow the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode.control.base import ControlStates
from spectool.decode.drafters.units import UnitsDrafter
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError, UsageError

Tiny = Callable[..., PreTrainedModel]
PLACEHOLDER = 7
FAMILIES = [
    "llama",
    "gemma3",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "gpt2")),
]


@torch.inference_mode()
def logits_behind(model: Any, context: Sequence[int], count: int) -> Tensor:
    """Return the logits [1 + count, V] after a context and at each of `count` placeholders."""
    ids = torch.tensor([[*context, *[PLACEHOLDER] * count]])
    logits: Tensor = model(ids, use_cache=False).logits[0, len(context) - 1 :].float()
    return logits


class Recorded(UnitsDrafter):
    """Drafter that keeps each draft with the tokens that it followed."""

    def __init__(self, config: UnitsDrafter.Config) -> None:
        super().__init__(config)
        self.drafts: list[tuple[list[int], Draft]] = []

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        drafts = super().propose(requests, budget)
        self.drafts += [(list(r.tokens), draft) for r, draft in zip(requests, drafts, strict=True)]
        return drafts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_drafts_are_the_likeliest_tokens_at_the_placeholders(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    family: str,
    options: dict[str, Any],
) -> None:
    """Whatever was accepted of the draft before; placeholders leave no trace in the cache."""
    model = endless(tiny(family))
    drafter = Recorded(UnitsDrafter.Config(longest=4, placeholder=PLACEHOLDER))
    (result,) = Runner(model, draft=drafter).generate([prompt_of(12)], max_new_tokens=20, **options)
    # Prompts are fed without placeholders.
    assert len(drafter.drafts[0][1]) == 1
    for tokens, draft in drafter.drafts[1:]:
        best = logits_behind(model, tokens[:-1], 3)[1:].argmax(-1).tolist()
        most = min(3, 20 - (len(tokens) - 12) - 1)
        assert draft.tokens == [tokens[-1], *best[:most]]
        assert set(draft.kinds) == {"deterministic"}
        assert draft.num_rows == len(draft) * 4 or most == 0
    assert result.lossless and result.drafted > result.accepted


@torch.inference_mode()
def decode_by_definition(
    model: Any, prompt: list[int], *, beta: float, new: int, params: SamplingParams
) -> tuple[list[int], int]:
    """Decode with passes over whole texts; return the new tokens and the passes after the first."""
    tokens, passes, longest = list(prompt), 0, 4

    def controlled(logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        return ControlStates.start(params.controls(), tokens).process(logits_V.clone())

    tokens.append(int(controlled(logits_behind(model, tokens, 0)[0], tokens).argmax()))
    while len(tokens) < len(prompt) + new:
        logits = logits_behind(model, tokens, longest - 1)
        passes += 1
        tokens.append(int(controlled(logits[0], tokens).argmax()))
        for logits_V in logits[1:]:
            probs_V = controlled(logits_V, tokens).softmax(-1)
            # The last token that the limit allows is the model's own.
            if probs_V.max() <= beta or len(tokens) >= len(prompt) + new - 1:
                break
            tokens.append(int(probs_V.argmax()))
    return tokens[len(prompt) :], passes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}])
def test_guesses_above_beta_are_taken_from_left_to_right(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    family: str,
    options: dict[str, Any],
) -> None:
    model, prompts = endless(tiny(family)), [prompt_of(12), prompt_of(5), prompt_of(20)]
    # The median probability of a guess: about half of them are taken.
    beta = float(logits_behind(model, prompts[0], 40)[1:].softmax(-1).amax(-1).median())
    drafter = Recorded(UnitsDrafter.Config(longest=4, placeholder=PLACEHOLDER, beta=beta))
    runner = Runner(model, draft=drafter)
    results = runner.generate(prompts, max_new_tokens=24, batch_size=3, lossy=True, **options)
    expected = [
        decode_by_definition(model, prompt, beta=beta, new=24, params=SamplingParams(**options))
        for prompt in prompts
    ]
    assert [result.token_ids for result in results] == [tokens for tokens, _ in expected]
    assert not any(result.lossless for result in results)
    # A unit comes with the pass that feeds it: one more than passes that found units.
    for result, (_, passes) in zip(results, expected, strict=True):
        assert passes <= result.forwards <= passes + 2
    lengths = {len(draft) for _, draft in drafter.drafts}
    assert len(lengths) > 1 and sum(result.accepted for result in results) > 0
    # Only the last node of a path that is accepted whole has placeholders.
    assert all(draft.num_rows in (len(draft), len(draft) + 3) for _, draft in drafter.drafts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
@pytest.mark.parametrize("beta", [1, 1.5])
def test_beta_from_one_on_is_plain_decoding(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    family: str,
    options: dict[str, Any],
    beta: float,
) -> None:
    model, prompts = endless(tiny(family)), [prompt_of(12), prompt_of(5)]
    plain = Runner(model).generate(prompts, max_new_tokens=16, **options)
    runner = Runner(model, draft=f"units:longest=4,placeholder={PLACEHOLDER},beta={beta}")
    results = runner.generate(prompts, max_new_tokens=16, batch_size=2, **options)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert all(r.lossless and r.drafted == 0 for r in results)


def test_sampled_text_takes_guesses_too(
    tiny: Tiny, endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    """With beta 0 every pass brings four tokens; the first two passes have no guesses yet."""
    draft = f"units:longest=4,placeholder={PLACEHOLDER},beta=0"
    runner = Runner(endless(tiny("llama")), draft=draft)
    (result,) = runner.generate([prompt_of(9)], max_new_tokens=42, lossy=True, temperature=1.0)
    assert (result.accepted, result.forwards) == (30, 12) and not result.lossless


@pytest.mark.parametrize("draft", ["units:longest=4,placeholder=7,beta=0.5", "jacobi:cap=2"])
def test_what_is_taken_untested_does_not_depend_on_time(tiny: Tiny, draft: str) -> None:
    runner = Runner(tiny("llama"), draft=draft, tune=True)
    assert runner.drafter.policies == []
    runner.use(f"{draft},tune")
    assert not runner.is_tuned


def test_what_is_refused(tiny: Tiny, prompt_of: Callable[..., list[int]]) -> None:
    runner = Runner(tiny("llama"))
    with pytest.raises(UsageError, match="was not trained by distill lexical-units"):
        runner.use("units")
    with pytest.raises(UsageError, match="placeholder=320: the model has 320 tokens"):
        runner.use("units:longest=4,placeholder=320")
    with pytest.raises(UsageError, match="does not share a tree"):
        runner.use("units:longest=4,placeholder=7+ngram")
    with pytest.raises(UnsupportedError, match="a recurrent state takes no extra rows"):
        Runner(tiny("mamba"), draft="units:longest=4,placeholder=7")
    runner.use("units:longest=4,placeholder=7,beta=0.9")
    with pytest.raises(UsageError, match="accepts some of its tokens untested"):
        runner.generate([prompt_of(5)], max_new_tokens=3)
