"""Interpretation of data rows in the common published layouts: which fields hold the text.

A row becomes a plain text, a conversation for a chat template, or a question and its answer. Knows
no files, no tokenizer and no template.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectool.data.tools import convert_call, parse_json, read_calls, read_tools
from spectool.errors import TextError

TEXT_FIELDS = ("text", "content", "document", "story")
PROMPT_FIELDS = ("prompt", "text")
CHAT_FIELDS = ("messages", "conversations", "conversation", "turns")
# The field whose text the completion continues; `QUESTION_FIELDS` are answered instead.
CONTINUED = "prompt"
QUESTION_FIELDS = ("instruction", "question", "query", "problem", "input")
CONTEXT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("completion", "output", "answer", "response", "solution", "canonical_solution")
# Fields that may hold turns instead of a string.
SPOKEN_FIELDS = (CONTINUED, "completion", "chosen")
SYSTEM_FIELDS = ("system", "system_prompt")
# MT-Bench's categories, which Spec-Bench counts as one group; their rows have `turns`.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
CONVERSATION = "conversation"

# Metadata of a row: never its text, even if it is the only string.
_LABELS = frozenset(
    (
        *("id", "idx", "index", "uid", "uuid", "guid", "key", "hash", "md5", "sha1", "sha256"),
        *("url", "uri", "link", "path", "file", "filename", "source", "origin", "dataset", "split"),
        *("tools", "functions", "category", "task", "type", "kind", "label", "tag", "tags", "name"),
        *("model", "lang", "language", "license", "licence", "date", "timestamp", "created"),
        *SYSTEM_FIELDS,
    )
)
_LABEL_NAME = re.compile(r"(_|-)(id|ids|idx|uid|uuid|hash|url|name)$|[a-z0-9](Id|ID|Uuid|Url)$")
_LABEL_VALUE = re.compile(
    r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{16,}|\d+|https?://\S+"
)

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A plain text, or a conversation in the common form: role, content, perhaps tool_calls.

    `answer`: index in `text` where an answer begins, if any. `joinable`: without a chat template
    the turns may be joined, one per line. `fields`: the fields that were read. `place`: source and
    number of the row, for errors.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    category: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: int | None = None
    joinable: bool = False
    fields: str = "text"
    place: str = ""

    def join_turns(self) -> Row:
        """Return the turns as a plain text, one per line."""
        contents = [str(message["content"]) for message in self.messages]
        answer = None
        if len(contents) > 1 and self.messages[-1]["role"] == "assistant":
            answer = len("\n".join(contents[:-1]))
        return dataclasses.replace(self, text="\n".join(contents), messages=(), answer=answer)

    def read_answer(self) -> str:
        """Return the answer that the row ends with, an empty text if it ends with none."""
        if self.text is not None:
            return "" if self.answer is None else self.text[self.answer :].strip()
        last = self.messages[-1]
        return str(last["content"]).strip() if last["role"] == "assistant" else ""

    def cut_answer(self) -> Row:
        """Return the row without the answer that it ends with.

        Raises:
            TextError: no text is left.
        """
        if self.text is not None:
            text, messages = self.text[: self.answer], self.messages
            has_text, is_whole = bool(text.strip()), self.answer is None
        else:
            text, messages = None, _drop_answers(self.messages)
            has_text = any(m["role"] != "system" and _has_content(m) for m in messages)
            is_whole = messages == self.messages
        if not has_text:
            what = "holds nothing to answer" if is_whole else "holds nothing before its answer"
            raise TextError(f"{self.place}: {self.fields} {what}; expected a prompt")
        if is_whole:
            return self
        fields = f"{self.fields} up to the answer"
        return dataclasses.replace(self, text=text, messages=messages, answer=None, fields=fields)


def read_row(
    record: Any, *, place: str = "", field: str | None = None, prompts: bool = False
) -> Row:
    """Interpret a record of a file, by the names of its fields or as the one `field`.

    `prompts`: read it as a prompt rather than as a text.

    Raises:
        TextError: an unknown layout, or a field that holds something else than text or turns.
    """
    if isinstance(record, str):
        return Row(record, fields="strings", place=place)
    if not isinstance(record, Mapping):
        raise TextError(f"{place}: expected an object with named fields")
    # Parquet fills in None where a row lacks a field.
    record = {key: value for key, value in record.items() if value is not None}
    reader = _Reader(record, place)
    if field is not None:
        row = reader.read_field(field, prompts=prompts)
    else:
        row = reader.read_layout(prompts)
    return dataclasses.replace(row, category=_category(record), place=place)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reader of one record; `place` is its source and number, for errors."""

    record: Mapping[str, Any]
    place: str

    def read_layout(self, prompts: bool) -> Row:
        """Interpret the record by the names of its fields."""
        if self.holds("chosen"):
            return self.read_preference()
        chat = self.first(CHAT_FIELDS)
        if chat is not None:
            return self.read_chat(chat, prompts=prompts)
        question, answer = self.first((CONTINUED, *QUESTION_FIELDS)), self.first(ANSWER_FIELDS)
        if question is not None and answer not in (None, question):
            text_field = None if prompts else self.first(TEXT_FIELDS)
            if text_field is None:
                return self.read_pair(question, answer)
        if question == CONTINUED and isinstance(self.record[question], list):
            return self.read_chat(question, prompts=prompts)
        text_field = self.first(PROMPT_FIELDS if prompts else TEXT_FIELDS)
        if text_field is not None:
            return self.read_plain(text_field)
        if prompts and question is not None and question != "input":
            return self.read_pair(question, None)
        strings = [key for key, value in self.record.items() if _is_text(key, value)]
        if len(strings) == 1:
            return self.read_plain(strings[0])
        if not self.record:
            raise TextError(f"{self.place}: the row has no field with a value")
        raise TextError(
            f"{self.place}: no field that is surely the text among {', '.join(self.record)}",
            hint="name it with --field",
        )

    def read_field(self, field: str, *, prompts: bool) -> Row:
        """Interpret one field, whatever the others hold."""
        value = self.record.get(field)
        if isinstance(value, str) and not _holds_turns(value):
            return Row(value, fields=field)
        if prompts and isinstance(value, list) and value and isinstance(value[0], str):
            # A field named explicitly is taken as plain text: the model may have no chat template.
            return Row(value[0], fields=field)
        return self.read_chat(field, prompts=prompts)

    def first(self, names: Sequence[str]) -> str | None:
        """Return the first of these fields that holds text or turns."""
        return next((name for name in names if self.holds(name)), None)

    def holds(self, name: str) -> bool:
        """Whether a field may hold text or turns, by its name and type."""
        value = self.record.get(name)
        if name in TEXT_FIELDS:
            return name in self.record
        if name in CHAT_FIELDS:
            return isinstance(value, (str, list, Mapping))
        if name in SPOKEN_FIELDS and not isinstance(value, str):
            return isinstance(value, Mapping) or _is_turns(value)
        # Answers that are numbers or lists of choices are not text.
        return isinstance(value, str) and (name not in SYSTEM_FIELDS or bool(value.strip()))

    def read_plain(self, field: str) -> Row:
        """Read a field as plain text, or as a conversation if it is not a string."""
        value = self.record[field]
        if isinstance(value, str):
            return Row(value, fields=field)
        return self.read_chat(field, prompts=False)

    def read_chat(self, field: str, *, prompts: bool) -> Row:
        """Read a conversation; of a list of successive questions, the first is the prompt."""
        value = self.value(field)
        if isinstance(value, str):
            return Row(value, fields=field)
        messages = self.turns(field, value)
        if field not in CHAT_FIELDS[:-1] and isinstance(value, list) and isinstance(value[0], str):
            messages = messages[:1] if prompts else messages
        return self.conversation(messages, field)

    def read_pair(self, question: str, answer: str | None) -> Row:
        """Read a question and its answer, or the question alone."""
        asked = self.value(question)
        fields, parts = [question], [asked]
        if isinstance(asked, str) and question != CONTINUED:
            for name in CONTEXT_FIELDS:
                more = self.record.get(name)
                if name != question and isinstance(more, str) and more.strip():
                    fields.append(name)
                    parts.append(more)
        given = None if answer is None else self.value(answer)
        fields += [] if answer is None else [answer]
        names = " + ".join(fields)
        system = self.first(SYSTEM_FIELDS)
        texts = all(isinstance(part, str) for part in (*parts, given or ""))
        if texts and question == CONTINUED and system is None:
            return _join_completion(asked, given, names)
        messages = self.turns(question, "\n".join(parts) if isinstance(asked, str) else asked)
        if texts and isinstance(self.record.get("history"), list):
            messages = (*self.history(self.record["history"]), *messages)
        if given is not None:
            messages = _append_answer(messages, self.turns(answer or "", given, role="assistant"))
        return self.conversation(messages, names, joinable=texts)

    def read_preference(self) -> Row:
        """Read the chosen one of two answers, after its question if that has its own field."""
        chosen = self.value("chosen")
        base = self.first((*CHAT_FIELDS, CONTINUED, *QUESTION_FIELDS))
        if base is not None and base not in CHAT_FIELDS:
            return self.read_pair(base, "chosen")
        if base is not None:
            before = _drop_answers(self.turns(base, self.value(base)))
            answer = self.turns("chosen", chosen, role="assistant")
            return self.conversation(_append_answer(before, answer), f"{base} + chosen")
        if not isinstance(chosen, str):
            return self.conversation(self.turns("chosen", chosen), "chosen")
        rejected = self.record.get("rejected")
        if not isinstance(rejected, str):
            return Row(chosen, fields="chosen")
        # Both texts begin with the question, which ends with a mark of the next speaker, as
        # "Assistant:".
        pairs = enumerate(zip(chosen, rejected, strict=False))
        differs = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
        question = re.match(r".*[:>\n]", chosen[:differs], re.DOTALL)
        return Row(chosen, answer=question.end() if question else 0, fields="chosen")

    def value(self, field: str) -> Any:
        """Return a field's value, parsed if it is a conversation in JSON."""
        value: Any = self.record.get(field)
        return json.loads(value) if _holds_turns(value) else value

    def history(self, pairs: Sequence[Any]) -> tuple[Message, ...]:
        """Convert earlier questions and answers, given as pairs of strings, to turns."""
        flat = [part for pair in pairs if isinstance(pair, (list, tuple)) for part in pair]
        return _alternate_roles(flat) if all(isinstance(part, str) for part in flat) else ()

    def conversation(
        self, messages: Sequence[Message], fields: str, *, joinable: bool = False
    ) -> Row:
        """Make a row of these turns, with the record's system message and tools."""
        system = self.first(SYSTEM_FIELDS)
        if system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self.record[system]}, *messages)
            fields = f"{system} + {fields}"
        if not any(map(_has_content, messages)):
            raise TextError(f"{self.place}: the turns of {fields} are empty")
        tools = read_tools(self.record.get("tools") or [])
        if tools is None:
            raise TextError(f"{self.place}: field 'tools' is no list of objects, nor JSON of one")
        return Row(messages=tuple(messages), tools=tools, joinable=joinable, fields=fields)

    def turns(self, field: str, value: Any, *, role: str = "user") -> tuple[Message, ...]:
        """Convert one or several objects or strings to turns in the common form."""
        if isinstance(value, (str, Mapping)):
            value = [value]
        if isinstance(value, list) and value:
            if all(isinstance(turn, str) for turn in value):
                if len(value) > 1 and field in CHAT_FIELDS[:-1]:
                    return _alternate_roles(value)
                return tuple({"role": role, "content": turn} for turn in value)
            if all(isinstance(turn, Mapping) for turn in value):
                return tuple(self.message(field, turn) for turn in value)
        raise TextError(
            f"{self.place}: field {field!r} is {'absent' if value is None else 'no text'}"
        )

    def message(self, field: str, turn: Mapping[str, Any]) -> Message:
        """Convert a turn to the common form; its other keys are kept for the template."""
        turn = {key: value for key, value in turn.items() if value is not None}
        role_key = next((key for key in _ROLE_KEYS if isinstance(turn.get(key), str)), None)
        key = next((key for key in _CONTENT_KEYS if key in turn), None)
        calls = self.calls(field, turn.get("tool_calls") or turn.get("function_call") or [])
        if role_key is None and "role" in turn:
            raise TextError(
                f"{self.place}: a turn of {field!r} has the role {json.dumps(turn['role'])[:60]}, "
                "expected a name as user or assistant"
            )
        if role_key is None or (key is None and not calls):
            raise TextError(
                f"{self.place}: a turn of {field!r} has the fields {', '.join(turn) or '(none)'}; "
                "expected role and content, or from and value"
            )
        role = _ROLES.get(turn[role_key].lower())
        if role is None and role_key == "from":
            raise TextError(
                f"{self.place}: a turn of {field!r} is from {turn[role_key]!r}; expected human, "
                "gpt, system, function_call or observation"
            )
        content = "" if key is None else self.content(field, turn[key])
        if role == "call":
            calls = read_calls(content) or []
            role, content = "assistant", "" if calls else content
        used = (*_ROLE_KEYS, key, "tool_calls", "function_call")
        rest = {name: value for name, value in turn.items() if name not in used}
        message = {"role": role or turn[role_key], "content": content, **rest}
        return {**message, "tool_calls": list(map(convert_call, calls))} if calls else message

    def calls(self, field: str, value: Any) -> list[Any]:
        """Return a turn's tool calls, parsed if they are JSON."""
        calls = read_calls(value)
        if calls is not None:
            return calls
        raise TextError(
            f"{self.place}: a turn of {field!r} calls a tool as {value!r:.60}; expected "
            "an object with a name, or a list of these"
        )

    def content(self, field: str, value: Any) -> str:
        """Return a turn's text, joined if it comes in parts."""
        if isinstance(value, str):
            return value
        parts = value if isinstance(value, list) else [None]
        texts: list[Any] = [
            part.get("text") if isinstance(part, Mapping) else part for part in parts
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
        raise TextError(f"{self.place}: a turn of {field!r} has content that is no text")


def _has_content(message: Message) -> bool:
    return bool(message["content"].strip()) or "tool_calls" in message


def _drop_answers(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Drop the turns of the assistant at the end."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _join_completion(question: str, answer: str | None, fields: str) -> Row:
    """Join a text and its completion, with a line break unless whitespace separates them."""
    if answer is None:
        return Row(question, fields=fields)
    is_separated = not question or question[-1].isspace() or answer[:1].isspace()
    text = question + ("" if is_separated else "\n") + answer
    return Row(text, answer=len(question), fields=fields)


def _append_answer(before: Sequence[Message], answer: Sequence[Message]) -> tuple[Message, ...]:
    """Append an answer to the turns before it, unless the answer repeats them."""
    turns = [message for message in answer if message["role"] != "system"]
    if turns and turns[0]["role"] == "user":
        return tuple(answer)
    return (*before, *answer)


def _alternate_roles(contents: Sequence[str]) -> tuple[Message, ...]:
    """Make turns of user and assistant in alternation."""
    return tuple(
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    )


def _is_turns(value: Any) -> bool:
    """Whether a value is a list of strings or objects."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], (str, Mapping))


def _holds_turns(value: Any) -> bool:
    """Whether a string is the JSON of a conversation."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    parsed = parse_json(value)
    return _is_turns(parsed) and any(key in parsed[0] for key in _ROLE_KEYS)


def _is_text(key: str, value: Any) -> bool:
    """Whether a field is a string and not metadata by its name or value."""
    if not isinstance(value, str) or key.lower() in _LABELS or _LABEL_NAME.search(key):
        return False
    return not _LABEL_VALUE.fullmatch(value.strip())


def _category(record: Mapping[str, Any]) -> str | None:
    """Return a record's category, the categories of MT-Bench as one."""
    category = record.get("category")
    if not isinstance(category, str):
        return None
    # SPEED-Bench has categories of these names of its own; its rows have a `sub_category` too.
    is_mt_bench = "turns" in record and "sub_category" not in record and category in MT_BENCH
    return CONVERSATION if is_mt_bench else category
