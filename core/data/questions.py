"""Reading of questions with several turns, each asked after the model's own answer to the last.

MT-Bench, Spec-Bench and SPEED-Bench give questions in this form: `turns`, a list of texts of the
user. Imports neither torch nor transformers; the tokenizer is an argument.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from spectool.data.rows import Message, Row
from spectool.data.template import Template, encode, find_stop_tokens, render_checked
from spectool.data.text import Prompt, Reading, read_rows, select_rows
from spectool.errors import TextError
from spectool.report import SILENT, Reporter

# The field that holds a question's turns; as `--field` it asks for plain text without a template.
TURNS = "turns"
# SPEED-Bench's hub has this in place of turns whose licence does not let it hold them.
_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"


def read_questions(
    source: str,
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Template | None = None,
    limit: int | None = None,
    per_category: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Prompt]:
    """Read questions, each as the prompt of its first turn, which knows what follows an answer.

    A row without turns is a question of one. With the field `turns` the turns and answers are
    plain text, one a line, for models without a chat template. `limit` and `per_category`: as
    `text.read_prompts`.

    Raises:
        TextError: as `text.read_rows`; no question; turns that are placeholders; no template.
    """
    plain = field == TURNS
    rows = read_rows(source, field=None if plain else field)
    reading, found = Reading(source, prompts=True), list[Prompt]()
    for row in select_rows(rows, limit=limit, per_category=per_category):
        texts = _read_turns(row)
        if any(_PLACEHOLDER in text for text in texts):
            raise TextError(
                f"{row.place}: holds no question but a placeholder for one",
                hint="make the data with prepare_data.py of NVIDIA's specdec_bench, then give the "
                "file that it writes",
            )
        found.append(_Question(row, texts, tokenizer, template, plain).ask(()))
        reading.add(row, texts[0], tokenizer)
    if not found:
        raise TextError(f"{source}: holds no question")
    reporter.event(reading)
    return found


def _read_turns(row: Row) -> list[str]:
    """Return what the user says in a row, turn by turn; a plain text is one turn.

    Raises:
        TextError: the user says nothing.
    """
    if row.text is not None:
        return [row.text[: row.answer]]
    texts = [str(message["content"]) for message in row.messages if message["role"] == "user"]
    if not texts:
        raise TextError(f"{row.place}: has no turn of a user")
    return texts


class _Question:
    """A question in turns, and how its history is written."""

    def __init__(
        self, row: Row, texts: list[str], tokenizer: Any, template: Template | None, plain: bool
    ) -> None:
        self._row, self._texts = row, texts
        self._is_plain = plain or row.text is not None
        self._tokenizer, self._template = tokenizer, template

    def ask(self, history: tuple[Message, ...]) -> Prompt:
        """Return the prompt of the turn after a history of questions and answers."""
        turn = len(history) // 2
        messages = (*history, {"role": "user", "content": self._texts[turn]})
        num_turns = len(self._texts) - turn

        def follow(answer: str) -> Prompt:
            return self.ask((*messages, {"role": "assistant", "content": answer}))

        given, ends = self._write(messages)
        return Prompt(
            given,
            self._row.category,
            ends,
            num_turns=num_turns,
            follow=follow if num_turns > 1 else None,
        )

    def _write(self, messages: tuple[Message, ...]) -> tuple[str | list[int], frozenset[int]]:
        """Return a conversation as text or token ids, and the tokens that end its answer."""
        if self._is_plain:
            return "\n".join(str(message["content"]) for message in messages), frozenset()
        system = tuple(each for each in self._row.messages if each["role"] == "system")
        row = dataclasses.replace(self._row, messages=(*system, *messages))
        text = render_checked(row, self._tokenizer, template=self._template, prompt=True)
        ends = find_stop_tokens(row, self._tokenizer, self._template)
        return encode(self._tokenizer, text), ends
