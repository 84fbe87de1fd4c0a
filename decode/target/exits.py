"""Draft models with exits: a token is taken from the first layers where they are sure of it.

Kavehzadeh et al., S2D, 2024 (arXiv:2407.01955). For each token the layers up to the first exit run.
If the largest probability after the final norm and the lm_head exceeds the exit's threshold, the
token comes from this distribution, else the layers up to the next exit run. The exit depends on the
draft's own distribution after the text alone, so the distribution that a token is drawn from is a
function of the text, and verification is exact.

States of tokens that left early are kept at their exit. When a later token goes deeper they go with
it, in one pass, so that deeper layers have keys and values of their own for every token before it.
Layers that a pass leaves out return their input: the model's own forward runs unchanged.

Suffixes: B rows, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode.cache import BatchCache, TreeCache
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.base import Pass, Target
from spectool.decode.tree import Draft
from spectool.errors import CheckpointError, UnsupportedError, UsageError


@dataclass(frozen=True, slots=True)
class Exit:
    """An exit after the first `layer` layers, taken where the largest probability is higher."""

    layer: int
    threshold: float


class ExitCache(BatchCache):
    """Keys and values by the layers between two exits, which may lack the last tokens of a row.

    `parts[e]` are those of the layers that end at exit e. `states[e][b]` [T, D], in pieces, are the
    states at exit e of the tokens of row b that the layers after it have not seen.
    """

    def __init__(self, parts: Sequence[TreeCache]) -> None:
        super().__init__(batch=len(parts[0].tokens), context=parts[0].context)
        self.parts = parts
        self.states: list[list[list[Tensor]]] = [[[] for _ in self.tokens] for _ in parts[1:]]

    def commit(self, tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]) -> None:
        """Keep the first nodes of each row's chain, and forget the others."""
        for row, path in enumerate(paths):
            assert list(path) == list(range(len(path))), "a draft with exits is a chain"
            self.tokens[row].extend(tokens[row][node] for node in path)
            self.truncate(row, len(self.tokens[row]))

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        for part in self.parts:
            part.truncate(row, length)
        for above, below, states in zip(self.parts, self.parts[1:], self.states, strict=False):
            kept = above.lengths[row] - below.lengths[row]
            states[row] = [torch.cat(states[row])[:kept]] if kept else []

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        for part in self.parts:
            part.select(rows)
        self.states = [[states[row] for row in rows] for states in self.states]

    def join(self, other: ExitCache) -> None:
        super().join(other)
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.join(theirs)
        for states, more in zip(self.states, other.states, strict=True):
            states += more

    def take(self, at: int, rows: Collection[int]) -> Tensor:
        """Return the states [B, T, D] at exit `at` of these rows, zeros for others; forget them."""
        pieces = [
            torch.cat(states) if row in rows else None for row, states in enumerate(self.states[at])
        ]
        longest = max((part for part in pieces if part is not None), key=len)
        taken_BTD = longest.new_zeros(len(pieces), *longest.shape)
        for row, piece in enumerate(pieces):
            if piece is not None:
                taken_BTD[row, : len(piece)] = piece
                self.states[at][row] = []
        return taken_BTD


class ExitTarget(Target[ExitCache]):
    """A draft model that answers from its first layers where they are sure; it takes chains only.

    `row_passes[e]` counts the passes of a row through the layers that end at exit e.

    Raises:
        UnsupportedError: an architecture for which passes of some layers cannot be correct.
    """

    takes_trees = False

    def __init__(
        self, model: PreTrainedModel, exits: Sequence[Exit], forward: str = "auto"
    ) -> None:
        self._whole = AttentionTarget(model, forward=forward)
        super().__init__(model, None)
        self.exits = list(exits)
        self.row_passes = [0] * len(exits)
        self._num_extra: int | None = None
        self._check()

    def span(self, length: int) -> int:
        return self._whole.span(length)

    def cache(self, batch: int, context: int | None = None) -> ExitCache:
        return ExitCache([self._whole.cache(batch, context) for _ in self.exits])

    def verify(self, cache: ExitCache, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        raise UnsupportedError(f"{self.name}: a model with exits drafts, and verifies nothing")

    @torch.inference_mode()
    def grow(
        self,
        cache: ExitCache,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        *,
        fed: int = 0,
        seen: Sequence[int] | None = None,
    ) -> Tensor:
        """Feed the last node of each chain; a later node that is its own parent is padding."""
        pairs = zip(tokens, parents, strict=True)
        new = [[] if fed and above[fed] == fed else list(row[fed:]) for row, above in pairs]
        return self._feed(cache, new)[:, None]

    def _feed_prompts(
        self, cache: ExitCache, tokens: Sequence[Sequence[int]], needs: Needs
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Feed and commit tokens; a model with exits has no features to give."""
        logits_BV = self._feed(cache, tokens)
        cache.commit(tokens, [range(len(row)) for row in tokens])
        return logits_BV, [{} for _ in tokens]

    def _feed(self, cache: ExitCache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed tokens, and return the logits [B, V] after each row at its exit, zeros for none."""
        first, logits_BV = 0, None
        pending, inputs_BTD = [list(row) for row in tokens], None
        for at, (exit, part) in enumerate(zip(self.exits, cache.parts, strict=True)):
            is_last = exit is self.exits[-1]
            needs = Needs() if is_last else Needs(layers=(exit.layer - 1,))
            with self._only(first, exit.layer, inputs_BTD):
                found = self._whole.prefill(part, pending, needs)
            fed = [row for row, new in enumerate(pending) if new]
            self.row_passes[at] += len(fed)
            if logits_BV is None:
                logits_BV = found.logits_BV
            else:
                logits_BV[fed] = found.logits_BV[fed]
            if is_last:
                break
            for row in fed:
                cache.states[at][row].append(found.features[row][f"layer {exit.layer - 1}"])
            sure_B = found.logits_BV.float().softmax(-1).amax(-1)
            deeper = {row for row in fed if sure_B[row] <= exit.threshold}
            if not deeper:
                break
            lengths = cache.parts[at + 1].lengths
            pending = [
                row_tokens[lengths[row] :] if row in deeper else []
                for row, row_tokens in enumerate(cache.parts[0].tokens)
            ]
            first, inputs_BTD = exit.layer, cache.take(at, deeper)
        assert logits_BV is not None, "a model with exits has one"
        return logits_BV

    @contextmanager
    def _only(self, first: int, last: int, inputs_BTD: Tensor | None) -> Iterator[None]:
        """Let only the layers from `first` to before `last` run, the first of them on inputs.

        The passes within the context take the inputs in turns.
        """
        taken = 0

        def give(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal taken
            assert inputs_BTD is not None
            start, taken = taken, taken + hidden_states.shape[1]
            return self._as_output(inputs_BTD[:, start:taken])

        def leave_out(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
            return self._as_output(hidden_states)

        outside = {
            layer: give if index == 0 else leave_out
            for index, layer in enumerate(self.layers())
            if not first <= index < last
        }
        try:
            for layer, instead in outside.items():
                layer.forward = instead
            yield
        finally:
            for layer in outside:
                # The instance attribute hid the class's method; without it that is back.
                layer.__dict__.pop("forward", None)

    def _as_output(self, hidden: Tensor) -> Any:
        """Return a state as the model's layers return it: alone, or first in a tuple."""
        return hidden if self._num_extra is None else (hidden, *[None] * self._num_extra)

    @torch.no_grad()
    def _check(self) -> None:
        """Raise an UnsupportedError unless layers that run in two passes give the model's logits.

        Reads from a whole pass what a layer returns besides the state.
        """

        def note(layer: Any, inputs: Any, output: Any) -> None:
            self._num_extra = len(output) - 1 if isinstance(output, tuple) else None

        text, first = [[0, 1]], self.exits[0].layer
        handle = self.layers()[0].register_forward_hook(note)
        expected_BV = self._whole.prefill(self._whole.cache(1), text).logits_BV
        handle.remove()
        needs = Needs(layers=(first - 1,))
        with self._only(0, first, None):
            features = self._whole.prefill(self._whole.cache(1), text, needs).features
        with self._only(first, self.num_layers, features[0][f"layer {first - 1}"][None]):
            found_BV = self._whole.prefill(self._whole.cache(1), text).logits_BV
        if not (found_BV - expected_BV).abs().max() <= 1e-2 * expected_BV.abs().max():
            raise UnsupportedError(
                f"{self.name}: its layers cannot run in several passes, so it has no exits"
            )


def parse_exits(text: str, model: PreTrainedModel) -> list[Exit]:
    """Parse the exits of a draft model: `auto`, or a threshold for each of them as in `.5/.5/0`.

    An exit whose threshold is 1 is never taken, one of 0 always, and neither needs a pass apart.

    Raises:
        UsageError: the draft model records no exits, or the thresholds do not fit them.
        CheckpointError: its record of exits is damaged.
    """
    config: Any = model.config
    name, record = config._name_or_path or config.model_type, getattr(config, "exits", None)
    if record is None:
        raise UsageError(
            f"exits={text}: the configuration of {name} names no exits",
            hint="spectool distill sorted makes a draft model with exits",
        )
    try:
        layers = [int(layer) for layer in record["layers"]]
        stored = [float(threshold) for threshold in record["thresholds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: config.json: exits are damaged") from error
    count = config.get_text_config(decoder=True).num_hidden_layers
    if not layers or layers != sorted({*layers} & {*range(1, count + 1)}):
        raise CheckpointError(f"{name}: config.json: exits after {layers} of {count} layers")
    try:
        given = stored if text == "auto" else [float(part) for part in text.split("/")]
    except ValueError as error:
        raise UsageError(f"exits={text}: expected auto, or numbers as in .5/.5/0") from error
    if len(given) != len(layers) or not all(0 <= each <= 1 for each in given) or 0 not in given:
        raise UsageError(
            f"exits={text}: {name} has exits after layers {', '.join(map(str, layers))}: expected "
            f"{len(layers)} thresholds from 0 to 1, one of them 0"
        )
    pairs = zip(layers[: given.index(0) + 1], given, strict=False)
    return [Exit(layer, threshold) for layer, threshold in pairs if threshold < 1]


def open_draft(model: PreTrainedModel, exits: str | None, forward: str = "auto") -> Target[Any]:
    """Open a draft model, with these exits if they are given; `forward` is that of `open_target`.

    Raises:
        InputError: see `parse_exits`, or an architecture that cannot draft.
    """
    if exits is None:
        return AttentionTarget(model, forward=forward)
    return ExitTarget(model, parse_exits(exits, model), forward)
