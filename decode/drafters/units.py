"""Lexical unit decoding: placeholders after the last token guess the rest of a unit in one pass.

`distill lexical-units` trains a model for it. Placeholder j (from 1) of a node at position t has
position t + j, and sees the node's context and the placeholders before it; the likeliest token
there guesses x_{t+j+1}. The model's own token x_{t+1} is always taken. Placeholders are extra rows
(`tree.Draft`): no node sees them, and their keys and values are dropped.

Without `beta` the guesses are drafts, which the next pass verifies: lossless. With `beta`, as in
the paper, guesses are taken from left to right as long as their probability is above it, and are
fed as ordinary tokens with the next pass; no guess behind a refused one is taken. The request's
controls apply to these guesses too: a repetition penalty takes the place of the paper's repetition
control. From 1 on, `beta` takes no guess. The last token that a text's limit allows is no guess.

Source: Sun et al., Lexical Unit Decoding, 2024 (arXiv:2405.15208). Suffixes: N rows, V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectool import options
from spectool.checkpoint.headers import TRAINING, read_json
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Needs, Outcome
from spectool.decode.request import Request
from spectool.decode.target.base import Target
from spectool.decode.tree import Draft, Kind
from spectool.errors import UnsupportedError, UsageError
from spectool.options import option

# Key of what decoding must know, in the record of a training.
RECORD = "units"


class UnitsDrafter(Drafter):
    """Drafter of what the placeholders after the last accepted token guessed: a chain."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `units`."""

        longest: int | None = option(
            None, "tokens of a unit at most; default: as in training", minimum=2, maximum=64
        )
        placeholder: int | None = option(
            None, "token id of the placeholders; default: as in training", minimum=0
        )
        beta: float | None = option(
            None, "accept guesses above this probability untested; lossy", minimum=0
        )

    name = "units"
    needs = Needs()
    # Placeholders belong to the nodes of the chain.
    combines = can_be_cut = False
    uses_target = True
    applies_controls = True

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self._kind: Kind = "deterministic" if self.config.beta is None else "forced"
        self._guesses: dict[Request, list[int]] = {}

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        beta = self.config.beta
        return (self._kind,) if beta is None or beta < 1 else ()

    def check_chains(self, target: str) -> None:
        raise UnsupportedError(
            f"{self.name} cannot draft for {target}: a recurrent state takes no extra rows"
        )

    def attach(self, target: Target[Any]) -> None:
        """Choose the placeholder and how many of them follow a node.

        Raises:
            UsageError: the target was not trained for units, or does not have the placeholder.
        """
        longest, placeholder = self.config.longest, self.config.placeholder
        if longest is None or placeholder is None:
            trained = _read_record(target)
            longest = longest or trained.get("longest")
            placeholder = trained.get("placeholder") if placeholder is None else placeholder
        if longest is None or placeholder is None:
            raise UsageError(
                "units: MODEL was not trained by distill lexical-units",
                hint="for another model: --draft units:longest=4,placeholder=ID, any token's",
            )
        if placeholder >= (size := target.num_tokens):
            raise UsageError(f"units:placeholder={placeholder}: the model has {size} tokens")
        self._num_placeholders = longest - 1
        ids_1 = torch.tensor([placeholder], device=target.device)
        table = target.model.get_input_embeddings()

        def embed(hidden_BND: Tensor, slots_BN: Tensor, owners_BN: Tensor) -> Tensor:
            # During the pass, when split weights are whole; this hook does not run once more.
            row_1D = table.forward(ids_1)
            return torch.where((slots_BN >= 0)[..., None], row_1D, hidden_BND)

        self.needs = Needs(inject={-1: embed})

    def remove(self, request: Request) -> None:
        self._guesses.pop(request, None)

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(each, most) for each, most in zip(requests, budget, strict=True)]

    def _draft(self, request: Request, most: int) -> Draft:
        """Make the chain of the guesses, at most `most` deep, with its nodes' placeholders."""
        tokens = [request.tokens[-1], *self._guesses.get(request, [])[:most]]
        # A path of untested guesses ends at the last one.
        first = 0 if self._kind == "deterministic" else len(tokens) - 1
        extra_rows: list[tuple[int, int]] = []
        # With no budget left this step's token is the last, and no next step needs guesses.
        for node in range(first, len(tokens)) if most > 0 else ():
            for slot in range(self._num_placeholders):
                above = len(tokens) + len(extra_rows) - 1
                extra_rows.append((above if slot else node, slot))
        parents = list(range(-1, len(tokens) - 1))
        return Draft(tokens, parents, [self._kind] * len(tokens), extra_rows=extra_rows)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Read the guesses at the placeholders of each path's last node."""
        for outcome in outcomes:
            assert outcome.extra_logits_NV is not None
            draft, last = outcome.draft, outcome.path[-1]
            owners = draft.owners()[len(draft) :]
            kept = [row for row, owner in enumerate(owners) if owner == last]
            self._guesses[outcome.request] = self._guess(
                outcome.request, outcome.extra_logits_NV[kept]
            )

    def _guess(self, request: Request, logits_NV: Tensor) -> list[int]:
        """Return the likeliest tokens; with beta, up to the first whose probability is below."""
        if self.config.beta is None:
            likeliest: list[int] = logits_NV.argmax(-1).tolist()
            return likeliest
        guesses: list[int] = []
        with request.guard():
            states = request.control_states()
            for logits_V in logits_NV.float():
                best = states.process(logits_V.clone()).softmax(-1).max(-1)
                # Not a number where the controls exclude every token.
                if not best.values > self.config.beta:
                    break
                guesses.append(int(best.indices))
                states = states.advance(guesses[-1])
        return guesses


def _read_record(target: Target[Any]) -> dict[str, Any]:
    """Read how the target was trained for units; empty if it was not."""
    checkpoint = target.checkpoint
    path = None if checkpoint is None else checkpoint.path / TRAINING
    record = {} if path is None or not path.is_file() else read_json(path)
    found: dict[str, Any] = record.get(RECORD, {})
    return found
