"""Baselines of `bench`: transformers' `generate` on the same model, prompts and limits.

Plain, with prompt lookup, and assisted by the draft checkpoints among the drafters. Prompts run one
at a time, since lookup and assistance of transformers support batch size 1 only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from spectool.data.text import Prompt
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter
from spectool.decode.result import Result
from spectool.decode.target.base import Target
from spectool.report import SILENT, NoAssistant, Reporter

PLAIN = "transformers plain"
PROMPT_LOOKUP = "transformers prompt lookup"
ASSISTED = "transformers assisted"
# Settings of the authors of prompt lookup decoding.
_LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}


@dataclass(slots=True, kw_only=True)
class Job:
    """A prompt to decode: up to `limit` new tokens; `ends` are end tokens besides the model's.

    `prompt` is what it was made from, which knows the turns that follow.
    """

    tokens: Sequence[int]
    limit: int
    ends: Collection[int] = ()
    category: str | None = None
    prompt: Prompt | None = None

    @property
    def num_turns(self) -> int:
        """Return the number of turns from this one on."""
        return 1 if self.prompt is None else self.prompt.num_turns


Decode = Callable[[Sequence[Job]], list[Result]]


def open_baselines(
    runner: Runner,
    drafters: Sequence[Drafter],
    *,
    control: SamplingParams,
    seed: int,
    reporter: Reporter = SILENT,
) -> dict[str, Decode]:
    """Return functions that decode the runner's model with transformers alone, by name."""

    def make(options: Mapping[str, object], assistant: Target[Any] | None = None) -> Decode:
        return lambda jobs: _generate(runner, jobs, control, seed, options, assistant)

    opened = {PLAIN: make({}), PROMPT_LOOKUP: make(_LOOKUP)}
    models = [each.draft_model for each in drafters if each.draft_model is not None]
    drafts = {draft.model.config._name_or_path: draft for draft in models}
    for path, draft in drafts.items():
        if draft.vocab_size != runner.target.vocab_size:
            sizes = runner.target.vocab_size, draft.vocab_size
            reporter.event(NoAssistant(ASSISTED, path, *sizes))
            continue
        opened[ASSISTED if len(drafts) == 1 else f"{ASSISTED} by {path}"] = make({}, draft)
    return opened


def _generate(
    runner: Runner,
    jobs: Sequence[Job],
    control: SamplingParams,
    seed: int,
    options: Mapping[str, object],
    assistant: Target[Any] | None,
) -> list[Result]:
    model, sampling = runner.target.model, _sampling_options(control)
    starts, begins = runner.target.start_ids, dict[str, object]()
    if starts:
        ids_1N = torch.tensor([starts], device=model.device)
        begins = {"decoder_input_ids": ids_1N, "decoder_start_token_id": starts[0]}
    results = []
    with _bare(model) as forwards:
        for index, job in enumerate(jobs):
            closing = sorted(runner.end_ids().union(job.ends))
            # transformers samples with the global generator.
            torch.manual_seed(seed + index)
            ids_1L = torch.tensor([job.tokens], device=model.device)
            before = len(forwards)
            assisted_by = None
            # As in spectool, a draft model is not used beyond its context.
            if assistant is not None and len(job.tokens) + job.limit <= assistant.context:
                assisted_by = assistant.model
            out_1L = model.generate(
                ids_1L,
                attention_mask=torch.ones_like(ids_1L),
                max_new_tokens=job.limit,
                eos_token_id=closing or None,
                pad_token_id=closing[0] if closing else 0,
                assistant_model=assisted_by,
                **begins,
                **sampling,
                **options,
            )
            results.append(
                Result(
                    token_ids=out_1L[0, len(starts or job.tokens) :].tolist(),
                    text="",
                    finish_reason="length",
                    forwards=len(forwards) - before,
                    drafted=0,
                    accepted=0,
                )
            )
    return results


def _sampling_options(control: SamplingParams) -> Mapping[str, object]:
    """Return the options of `generate` that give the same distribution."""
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
def _bare(model: Any) -> Iterator[list[None]]:
    """Remove the checkpoint's generation settings, which transformers would use as defaults.

    Yields a list that grows by one element at every forward of the model.
    """
    forwards: list[None] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: forwards.append(None))
    settings = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield forwards
    finally:
        model.generation_config = settings
        hook.remove()
