"""transformers' own `generate` on the same model, prompts and limits, for comparison in `bench`.

Plain, with prompt lookup, and assisted by the draft checkpoints among the drafters. One prompt at a
time: its lookup and assistance take no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Result, Runner
from spectool.decode.policy.tuned import Tuned
from spectool.decode.protocol import Drafter
from spectool.decode.sampling import SamplingParams
from spectool.decode.target import Target

PLAIN = "transformers plain"
PROMPT_LOOKUP = "transformers prompt lookup"
ASSISTED = "transformers assisted"
# What the authors of prompt lookup decoding use, and longer n-grams first.
_LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}

# Prompts, the most tokens to add to each, and what ends each besides the model's own end of text.
Decode = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[Collection[int]]], list[Result]]


def baselines_of(
    runner: Runner,
    drafters: Sequence[Drafter],
    *,
    control: SamplingParams,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Decode]:
    """Ways to decode the runner's model with transformers alone, by name."""

    def peer(options: dict[str, Any], assistant: Target | None = None) -> Decode:
        def decode(
            prompts: Sequence[Sequence[int]],
            limits: Sequence[int],
            ends: Sequence[Collection[int]],
        ) -> list[Result]:
            return _generate(runner, prompts, limits, ends, control, seed, options, assistant)

        return decode

    found = {PLAIN: peer({}), PROMPT_LOOKUP: peer(_LOOKUP)}
    drafts = {draft.model.config._name_or_path: draft for draft in map(_draft, drafters) if draft}
    for path, draft in drafts.items():
        if draft.vocab_size != runner.target.vocab_size:
            say(
                f"no {ASSISTED} by {path}: transformers wants the target's "
                f"{runner.target.vocab_size} rows in its head, it has {draft.vocab_size}"
            )
            continue
        found[ASSISTED if len(drafts) == 1 else f"{ASSISTED} by {path}"] = peer({}, draft)
    return found


def _draft(drafter: Drafter) -> Target | None:
    if isinstance(drafter, Tuned):
        drafter = drafter.drafter
    return drafter._draft if isinstance(drafter, DraftModelDrafter) else None


def _generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Sequence[Collection[int]],
    control: SamplingParams,
    seed: int,
    options: dict[str, Any],
    assistant: Target | None,
) -> list[Result]:
    model, sampling = runner.target.model, _processors(control)
    results = []
    with _own_defaults(model), _count_forwards(model) as forwards:
        for index, (prompt, limit, own) in enumerate(zip(prompts, limits, ends, strict=True)):
            closing = sorted(runner.end_ids().union(own))
            # transformers draws from the global generator only.
            torch.manual_seed(seed + index)
            ids_1L = torch.tensor([prompt], device=model.device)
            before = len(forwards)
            assisted_by = None
            # Beyond its own context a draft proposes nothing, as in spectool.
            if assistant is not None and len(prompt) + limit <= assistant.context:
                assisted_by = assistant.model
            out_1L = model.generate(
                ids_1L,
                attention_mask=torch.ones_like(ids_1L),
                max_new_tokens=limit,
                eos_token_id=closing or None,
                pad_token_id=closing[0] if closing else 0,
                assistant_model=assisted_by,
                **sampling,
                **options,
            )
            results.append(
                Result(
                    token_ids=out_1L[0, len(prompt) :].tolist(),
                    text="",
                    finish_reason="length",
                    forwards=len(forwards) - before,
                    drafted=0,
                    accepted=0,
                )
            )
    return results


def _processors(control: SamplingParams) -> dict[str, Any]:
    """The options of `generate` that mean the same law."""
    options = {
        "do_sample": not control.greedy,
        "repetition_penalty": float(control.repetition_penalty),
        "no_repeat_ngram_size": control.no_repeat_ngram_size,
    }
    if control.greedy:
        return options
    return {
        **options,
        "temperature": float(control.temperature),
        "top_k": control.top_k,
        "top_p": float(control.top_p),
        "min_p": control.min_p or None,
    }


@contextmanager
def _own_defaults(model: Any) -> Iterator[None]:
    """transformers fills what is not given from the checkpoint's settings; spectool does not."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = settings


@contextmanager
def _count_forwards(model: Any) -> Iterator[list[None]]:
    """A list that grows by one at every forward of the model."""
    forwards: list[None] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: forwards.append(None))
    try:
        yield forwards
    finally:
        hook.remove()
