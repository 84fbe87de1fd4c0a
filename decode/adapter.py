"""A drafter in transformers' own `model.generate`.

    with drafting(model, "ngram"):
        model.generate(**inputs, max_new_tokens=64)

`generate` has no argument for a candidate generator. It takes a loop as `custom_generate`, but then
drops the streamer and the tokenizer of stop strings (5.17 to 5.24), so a streamer's reader waits
for ever. Therefore the model is set to assisted decoding as by prompt lookup, and its method that
makes the candidate generator is replaced on this one object for the length of a block; a pipeline
inside it drafts as well. Candidates come without probabilities: transformers then takes the model's
own token at each position, drawn or greedy, and keeps those that agree, which is exact for any
draft. Only the first path of a tree is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation.candidate_generator import CandidateGenerator

from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.spec import open_standalone, parse_spec
from spectool.errors import UsageError

# Criteria whose answer on a draft is known without calling them.
_KNOWN = (MaxLengthCriteria, EosTokenCriteria)


@contextmanager
def drafting(model: PreTrainedModel, draft: str | Drafter) -> Iterator[Drafter]:
    """Let `model.generate` draft inside the block: one text a call and one call at a time.

    `draft` is a specification (`decode/spec.py`), closed at the end of the block, or a drafter. Its
    statistics serve later calls. Stopping criteria are evaluated inside drafts too, lest an end is
    missed there.

    Raises:
        UsageError: an unknown drafter, one that needs more than the text, or a model that drafts
            already. A `generate` with an `assistant_model` raises it too.
    """
    drafter = open_standalone(draft) if isinstance(draft, str) else draft
    _refuse_model_drafters(drafter)
    if isinstance(draft, str) and parse_spec(draft).tune:
        raise UsageError(f"{draft}: only spectool.generate tunes; leave out tune")
    if "_get_candidate_generator" in vars(model):
        raise UsageError("the model drafts already; leave the other block first")
    kind: Any = type(model)
    criteria: Any = None

    def note_criteria(*given: Any, **named: Any) -> Any:
        nonlocal criteria
        criteria = kind._get_stopping_criteria(model, *given, **named)
        return criteria

    def make_candidates(
        *, generation_config: Any, assistant_model: Any = None, **_: Any
    ) -> Candidates:
        if assistant_model is not None:
            raise UsageError(f"{drafter.name} drafts here; generate without an assistant_model")
        return Candidates(drafter, generation_config, criteria)

    patches = {"_get_stopping_criteria": note_criteria, "_get_candidate_generator": make_candidates}
    config = model.generation_config
    lookup_tokens = config.prompt_lookup_num_tokens
    # Any number selects assisted decoding.
    config.prompt_lookup_num_tokens = 1
    vars(model).update(patches)
    try:
        yield drafter
    finally:
        config.prompt_lookup_num_tokens = lookup_tokens
        for name in patches:
            del vars(model)[name]
        if isinstance(draft, str):
            drafter.close()


def _refuse_model_drafters(drafter: Drafter) -> None:
    """Refuse a drafter that needs more than the text."""
    for part in drafter.parts:
        drawn = set(part.kinds(SamplingParams(temperature=1.0))) - {"deterministic"}
        if part.needs != Needs() or part.uses_target or drawn:
            raise UsageError(
                f"{part.name} cannot draft for transformers' generate: it needs more than the text",
                hint="ngram and trigram can; spectool.generate takes every drafter",
            )


class Candidates(CandidateGenerator):
    """The candidates for one text: the first paths of the drafter's trees."""

    def __init__(self, drafter: Drafter, config: Any, criteria: StoppingCriteriaList) -> None:
        self._drafter, ends = drafter, config.eos_token_id
        self._max_length: int = config.max_length
        self._ends = [ends] if isinstance(ends, int) else ends or []
        self._criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, _KNOWN))
        self._request: Request | None = None
        self._draft = tree.root(0)

    # The base class declares logits; prompt lookup returns None as well.
    def get_candidates(self, input_ids: Tensor, **given: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the text [1, T] with the draft appended; no draft before the first new token."""
        if self._request is None:
            return input_ids, None
        # The model adds one token of its own.
        limit = max(0, self._max_length - input_ids.shape[1] - 1)
        (draft,) = self._drafter.propose([self._request], [limit])
        path = tree.first_path(draft)
        proposed = input_ids.new_tensor([path.tokens[1:]], dtype=input_ids.dtype)
        text = torch.cat([input_ids, proposed], dim=1)
        kept = self._count_before_end(text, path.tokens[1:])
        self._draft = tree.chain(path.tokens[: kept + 1], kind="deterministic")
        return text[:, : input_ids.shape[1] + kept], None

    def _count_before_end(self, text: Tensor, drafted: Sequence[int]) -> int:
        """Return how many drafted tokens come before the first that ends the text."""
        # transformers evaluates its criteria on the last token of a step: an end must be there.
        start = text.shape[1] - len(drafted)
        for at, token in enumerate(drafted):
            if token in self._ends:
                return at
            # transformers itself passes None for scores that were not requested.
            if self._criteria and self._criteria(text[:, : start + at + 1], None).any():
                return at
        return len(drafted)

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Pass the outcome of the draft to the drafter; the text ends with the step's tokens."""
        if self._request is None:
            request = self._request = Request(
                index=0,
                tokens=input_ids[0].tolist(),
                draws=Draws(0, 0),
                sampling=SamplingParams(),
                max_new_tokens=self._max_length,
                context=self._max_length,
            )
            # An empty cache: drafters that read the target's rows were refused.
            cache = TreeCache(batch=1, num_layers=1, context=1)
            self._drafter.add([PrefilledPrompt(request=request, logits_V=scores[0, -1])], cache)
            return
        request = self._request
        new = input_ids[0, len(request.tokens) :].tolist()
        request.tokens += new
        path = list(range(len(new)))
        self._drafter.observe(
            [Outcome(request=request, draft=self._draft, path=path, next_token=new[-1])]
        )
