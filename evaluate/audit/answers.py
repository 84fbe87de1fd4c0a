"""Answers of a checkpoint to the items of a suite, before anything is scored.

Each item is a batch of its own, so that no answer depends on the other items or their order.

Shapes: B options of an item, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.data import template
from spectool.data.rows import Row
from spectool.decode import prompts
from spectool.decode.generate import Runner
from spectool.decode.result import loop_start
from spectool.errors import NotFinite, UsageError
from spectool.evaluate.audit.items import Item
from spectool.files import disk_errors

# A reply repeats itself if a run of so many tokens occurs twice.
REPEATED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply: its text, its number of tokens, and whether it repeats itself."""

    text: str
    tokens: int
    repeats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Answer of a checkpoint to an item.

    `log_likelihoods` are those of the options of a choice; `replies` are the greedy one and then
    one for each seed.
    """

    log_likelihoods: tuple[float, ...] = ()
    replies: tuple[Reply, ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Make the answer of what `asdict` made of it."""
        replies = tuple(Reply(**reply) for reply in record["replies"])
        return cls(log_likelihoods=tuple(record["log_likelihoods"]), replies=replies)


class Respondent:
    """A loaded checkpoint that answers items."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seeds: tuple[int, ...],
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.seeds = model, tokenizer, seeds
        self.max_new_tokens = max_new_tokens
        self.runner = Runner(model, tokenizer=tokenizer)

    def answer(self, item: Item) -> Answer:
        """Answer an item.

        Raises:
            InputError: it does not fit the context, or the chat template refuses it.
            NotFinite: the model computes NaN or infinite values.
        """
        text = self._render(item)
        if item.task == "choice":
            return Answer(log_likelihoods=self._weigh(item, text))
        ends: frozenset[int] = frozenset()
        if item.messages:
            ends = template.find_end_of_turn(self.tokenizer, item.messages)
        laws = [(0.0, 0), *((1.0, seed) for seed in self.seeds)]
        return Answer(replies=tuple(self._reply(item, text, ends, *law) for law in laws))

    def _render(self, item: Item) -> str:
        if not item.messages:
            return item.prompt
        row = Row(messages=item.messages, place=item.place)
        return template.render_checked(row, self.tokenizer, prompt=True)

    def _encode(self, item: Item, text: str) -> list[int]:
        """Encode a text; a rendered conversation holds its special tokens already."""
        if item.messages:
            return template.encode(self.tokenizer, text)
        return prompts.encode(text, self.tokenizer)

    def _reply(
        self, item: Item, text: str, ends: frozenset[int], temperature: float, seed: int
    ) -> Reply:
        ids = self._encode(item, text)
        self._check_length(item, len(ids) + self.max_new_tokens)
        (result,) = self.runner.generate(
            [ids], max_new_tokens=self.max_new_tokens, eos=ends, temperature=temperature, seed=seed
        )
        tokens = result.token_ids
        repeats = loop_start(tokens, REPEATED_TOKENS) < len(tokens)
        return Reply(text=result.text, tokens=len(tokens), repeats=repeats)

    @torch.inference_mode()
    def _weigh(self, item: Item, text: str) -> tuple[float, ...]:
        """Return log p of each option after the prompt.

        Prompt and option are encoded together, as they stand in a text. Where the last token of the
        prompt joins with the option, the option begins with it.
        """
        before = self._encode(item, text)
        rows, starts = [], []
        for option in item.options:
            row = self._encode(item, text + option)
            start = next((i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b),
                         min(len(before), len(row)))  # fmt: skip
            if not start:
                first = self.tokenizer.bos_token_id
                first = self.tokenizer.eos_token_id if first is None else first
                # Without either, the first token itself cannot be scored.
                row, start = ([first, *row], 1) if first is not None else (row, 1)
            rows.append(row)
            starts.append(start)
        self._check_length(item, length := max(map(len, rows)))
        # Padded at the right, where causal attention does not look.
        ids_BL = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
        ids_BL = ids_BL.to(self.model.device)
        logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        found = []
        for row, start, ids_L, logits_LV in zip(rows, starts, ids_BL, logits_BLV, strict=True):
            logp_LV = torch.log_softmax(logits_LV[start - 1 : len(row) - 1].float(), -1)
            taken_L = logp_LV.gather(-1, ids_L[start : len(row), None])
            found.append(float(taken_L.sum(dtype=torch.float64)))
        if not all(map(math.isfinite, found)):
            raise NotFinite(
                f"{self.model.config._name_or_path}: cannot be audited: its log-likelihoods of "
                f"{item.id} are {found}"
            )
        return tuple(found)

    def _check_length(self, item: Item, length: int) -> None:
        """Raise UsageError if so many tokens do not fit the context."""
        if length > self.runner.target.context:
            raise UsageError(
                f"{item.place}: needs {length} tokens; the context holds "
                f"{self.runner.target.context}"
            )


# How a file of answers begins.
_BEGIN = b'{"made_for": '


class Outputs:
    """Answers that are there already, and a file that keeps those that come.

    `made_for` is all that determines the answers; the file's first line has it.

    Raises:
        UsageError: the file is no file of answers, or was made for something else.
    """

    def __init__(self, path: Path | None, made_for: dict[str, Any]) -> None:
        self.path, self.records = path, dict[str, Any]()
        self._file = None
        if path is None:
            return
        with disk_errors(path):
            data = path.read_bytes() if path.exists() else b""
        # What follows the last line break was cut off by a kill.
        whole = data.rfind(b"\n") + 1
        kept = data[:whole].decode(errors="replace").split("\n")[:-1]
        if kept or not data.startswith(_BEGIN[: len(data)]):
            self._check(kept, made_for)
        with disk_errors(path):
            self._file = path.open("a", encoding="utf-8")
            self._file.truncate(whole)
        if not kept:
            self._write({"made_for": made_for})

    def _check(self, kept: list[str], made_for: dict[str, Any]) -> None:
        """Take the records of a file's lines; raise UsageError if they are of another run."""
        try:
            first, *rest = map(json.loads, kept)
            before = dict(first["made_for"])
            self.records = {record["key"]: record["value"] for record in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path}: holds no answers of an audit", hint="name another file"
            ) from error
        changed = [key for key in made_for if before.get(key) != made_for[key]]
        if changed:
            raise UsageError(
                f"{self.path}: holds answers with another {', '.join(changed)}",
                hint="name another file, or remove this one",
            )

    def add(self, key: str, value: Any) -> None:
        """Keep a record."""
        self.records[key] = value
        self._write({"key": key, "value": value})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            with disk_errors(self.path):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def record_of(answer: Answer) -> dict[str, Any]:
    """Return the record that `Answer.from_json` reads."""
    return asdict(answer)
