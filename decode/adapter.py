"""A drafter in transformers' own `model.generate`.

    with drafting(model, "ngram"):
        model.generate(**inputs, max_new_tokens=64)

`generate` takes no source of candidates. It takes a loop as `custom_generate`, but then drops
the streamer and the tokenizer of stop strings (5.17 to 5.24): who listens waits for ever. So the
model is set to assisted decoding as by prompt lookup, and its method that makes candidates is
replaced on this one object for the length of a block; a pipeline inside it drafts as well. They go
without laws: transformers then takes the model's own token at each position, drawn or greedy, and
keeps those that agree, which is exact for any draft. Of a tree only the first path goes.
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
from spectool.decode.drafters.combined import Combined
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import Draws, SamplingParams
from spectool.decode.spec import open_plain, parse_spec
from spectool.errors import UsageError

# Criteria that need not be asked: what they say of a draft is known.
_KNOWN = (MaxLengthCriteria, EosTokenCriteria)


@contextmanager
def drafting(model: PreTrainedModel, draft: str | Drafter) -> Iterator[Drafter]:
    """Inside the block `model.generate` drafts: one text a call and one call at a time.

    `draft` is a specification (`drafters/spec.py`), closed at the end, or a drafter. What it learns
    serves later calls. Stopping criteria are asked about drafts too, lest one is missed inside.

    Raises:
        UsageError: an unknown drafter, one that needs more than the text, or a model that drafts
            already. A `generate` with an `assistant_model` raises it too.
    """
    drafter = open_plain(draft) if isinstance(draft, str) else draft
    _refuse(drafter)
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

    def candidates(*, generation_config: Any, assistant_model: Any = None, **_: Any) -> Candidates:
        if assistant_model is not None:
            raise UsageError(f"{drafter.name} drafts here; generate without an assistant_model")
        return Candidates(drafter, generation_config, criteria)

    ours = {"_get_stopping_criteria": note_criteria, "_get_candidate_generator": candidates}
    config, before = model.generation_config, model.generation_config.prompt_lookup_num_tokens
    # Any number: it chooses the way of decoding.
    config.prompt_lookup_num_tokens = 1
    vars(model).update(ours)
    try:
        yield drafter
    finally:
        config.prompt_lookup_num_tokens = before
        for name in ours:
            del vars(model)[name]
        if isinstance(draft, str):
            drafter.close()


def _refuse(drafter: Drafter) -> None:
    """Refuse what needs more than the text."""
    for part in drafter.drafters if isinstance(drafter, Combined) else [drafter]:
        # `attach` is how a drafter comes by the model itself.
        attached = getattr(part.attach, "__func__", None) is not Drafter.attach
        drawn = set(part.kinds(SamplingParams(temperature=1.0))) - {"deterministic"}
        if part.needs != Needs() or attached or drawn:
            raise UsageError(
                f"{part.name} cannot draft for transformers' generate: it needs more than the text",
                hint="ngram and trigram can; spectool.generate takes every drafter",
            )


class Candidates(CandidateGenerator):
    """One text's candidates: the first paths of the drafter's trees."""

    def __init__(self, drafter: Drafter, config: Any, criteria: StoppingCriteriaList) -> None:
        self._drafter, ends = drafter, config.eos_token_id
        self._max_length: int = config.max_length
        self._ends = [ends] if isinstance(ends, int) else ends or []
        self._criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, _KNOWN))
        self._row: Request | None = None
        self._draft = tree.root(0)

    # The base promises laws; None is what prompt lookup returns.
    def get_candidates(self, input_ids: Tensor, **given: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """The text [1, T] with the draft behind it; without one before the first new token."""
        if self._row is None:
            return input_ids, None
        # The model adds a token of its own.
        limit = max(0, self._max_length - input_ids.shape[1] - 1)
        (draft,) = self._drafter.propose([self._row], [limit])
        path = tree.first_path(draft)
        proposed = input_ids.new_tensor([path.tokens[1:]], dtype=input_ids.dtype)
        text = torch.cat([input_ids, proposed], dim=1)
        kept = self._open_part(text, path.tokens[1:])
        self._draft = tree.chain(path.tokens[: kept + 1], kind="deterministic")
        return text[:, : input_ids.shape[1] + kept], None

    def _open_part(self, text: Tensor, drafted: Sequence[int]) -> int:
        """How many drafted tokens stand before the first that ends the text."""
        # transformers asks its criteria about the last token of a step: an end must come there.
        start = text.shape[1] - len(drafted)
        for at, token in enumerate(drafted):
            if token in self._ends:
                return at
            # Scores are None also where nobody asked for them.
            if self._criteria and self._criteria(text[:, : start + at + 1], None).any():
                return at
        return len(drafted)

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Tell the drafter what became of its draft; the step's tokens stand in the text now."""
        if self._row is None:
            room = self._max_length
            row = self._row = Request(
                index=0,
                tokens=input_ids[0].tolist(),
                draws=Draws(0, 0),
                control=SamplingParams(),
                max_new_tokens=room,
                context=room,
            )
            # Without the target's rows: who reads them is refused.
            cache = TreeCache(batch=1, num_layers=1, context=1)
            self._drafter.begin([PrefilledPrompt(row=row, logits_V=scores[0, -1])], cache)
            return
        row = self._row
        new = input_ids[0, len(row.tokens) :].tolist()
        row.tokens += new
        path = list(range(len(new)))
        self._drafter.observe([Outcome(row=row, draft=self._draft, path=path, next_token=new[-1])])
