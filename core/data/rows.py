"""Rows of data in the layouts that people publish: which fields are the text, and as what.

A row is a plain text, a conversation for a chat template, or a question and its answer. Knows no
files, no tokenizer and no template.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectool.errors import TextError

TEXT_FIELDS = ("text", "content", "document", "story")
PROMPT_FIELDS = ("prompt", "text")
CHAT_FIELDS = ("messages", "conversations", "conversation", "turns")
# The text before an answer goes on in it; the others ask for an answer.
CONTINUED = "prompt"
QUESTION_FIELDS = ("instruction", "question", "query", "problem", "input")
CONTEXT_FIELDS = ("input", "context")
ANSWER_FIELDS = (
    "completion",
    "output",
    "answer",
    "response",
    "solution",
    "canonical_solution",
)
# These may hold turns instead of a string.
SPOKEN_FIELDS = (CONTINUED, "completion", "chosen")
SYSTEM_FIELDS = ("system", "system_prompt")
# MT-Bench's categories. Spec-Bench counts its rows, which have `turns`, as one group.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
CONVERSATION = "conversation"

# Fields that say what a row is or where it comes from: no text, also as the only string of a row.
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

    `answer`: where an answer begins in the text, if one does. `joins`: without a chat template the
    turns, a line each, are the text. `fields`: what was read. `place`: the row, for errors.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    category: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: int | None = None
    joins: bool = False
    fields: str = "text"
    place: str = ""

    def joined(self) -> Row:
        """The turns as plain text."""
        contents = [str(message["content"]) for message in self.messages]
        answer = None
        if len(contents) > 1 and self.messages[-1]["role"] == "assistant":
            answer = len("\n".join(contents[:-1]))
        return dataclasses.replace(self, text="\n".join(contents), messages=(), answer=answer)

    def question(self) -> Row:
        """The row up to the answer that it ends with.

        Raises:
            TextError: nothing comes before it.
        """
        if self.text is not None:
            text, messages = self.text[: self.answer], self.messages
            holds, whole = bool(text.strip()), self.answer is None
        else:
            text, messages = None, self.messages
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            holds = any(m["role"] != "system" and _says_something(m) for m in messages)
            whole = messages == self.messages
        if not holds:
            what = "holds nothing to answer" if whole else "holds nothing before its answer"
            raise TextError(f"{self.place}: {self.fields} {what}; expected a prompt")
        if whole:
            return self
        fields = f"{self.fields} up to the answer"
        return dataclasses.replace(self, text=text, messages=messages, answer=None, fields=fields)


def read_row(
    record: Any, *, place: str = "", field: str | None = None, prompts: bool = False
) -> Row:
    """What a record of a file holds; the fields of its layout unless one is named.

    Raises:
        TextError: no layout that is known, or a field that holds something else.
    """
    if isinstance(record, str):
        return Row(record, fields="strings", place=place)
    if not isinstance(record, Mapping):
        raise TextError(f"{place}: expected an object with named fields")
    # What parquet fills in where a row has no such field.
    record = {key: value for key, value in record.items() if value is not None}
    reader = _Reader(record, place)
    row = reader.named(field, prompts=prompts) if field is not None else reader.found(prompts)
    return dataclasses.replace(row, category=_category(record), place=place)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A record, and the row of its file for errors."""

    record: Mapping[str, Any]
    place: str

    def found(self, prompts: bool) -> Row:
        """The row that the names of the fields tell."""
        if self.holds("chosen"):
            return self.preferred()
        chat = self.first(CHAT_FIELDS)
        if chat is not None:
            return self.chat(chat, prompts=prompts)
        question, answer = self.first((CONTINUED, *QUESTION_FIELDS)), self.first(ANSWER_FIELDS)
        if question is not None and answer not in (None, question):
            whole = None if prompts else self.first(TEXT_FIELDS)
            if whole is None:
                return self.pair(question, answer)
        if question == CONTINUED and isinstance(self.record[question], list):
            return self.chat(question, prompts=prompts)
        usual = self.first(PROMPT_FIELDS if prompts else TEXT_FIELDS)
        if usual is not None:
            return self.plain(usual)
        if prompts and question is not None and question != "input":
            return self.pair(question, None)
        strings = [key for key, value in self.record.items() if _is_text(key, value)]
        if len(strings) == 1:
            return self.plain(strings[0])
        if not self.record:
            raise TextError(f"{self.place}: the row has no field with a value")
        raise TextError(
            f"{self.place}: no field that is surely the text among {', '.join(self.record)}",
            hint="name it with --field",
        )

    def named(self, field: str, *, prompts: bool) -> Row:
        """The row that one field makes, whatever else there is."""
        value = self.record.get(field)
        if isinstance(value, str) and not _holds_turns(value):
            return Row(value, fields=field)
        if prompts and isinstance(value, list) and value and isinstance(value[0], str):
            # Who names it wants its text, for a model without a chat template say.
            return Row(value[0], fields=field)
        return self.chat(field, prompts=prompts)

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these fields that holds something to read."""
        return next((name for name in names if self.holds(name)), None)

    def holds(self, name: str) -> bool:
        value = self.record.get(name)
        if name in TEXT_FIELDS:
            return name in self.record
        if name in CHAT_FIELDS:
            return isinstance(value, (str, list, Mapping))
        if name in SPOKEN_FIELDS and not isinstance(value, str):
            return isinstance(value, Mapping) or _is_turns(value)
        # A number, or a list of choices, is no answer in words.
        return isinstance(value, str) and (name not in SYSTEM_FIELDS or bool(value.strip()))

    def plain(self, field: str) -> Row:
        value = self.record[field]
        if isinstance(value, str):
            return Row(value, fields=field)
        return self.chat(field, prompts=False)

    def chat(self, field: str, *, prompts: bool) -> Row:
        """A conversation; of questions that follow each other the first is the prompt."""
        value = self.value(field)
        if isinstance(value, str):
            return Row(value, fields=field)
        messages = self.turns(field, value)
        if field not in CHAT_FIELDS[:-1] and isinstance(value, list) and isinstance(value[0], str):
            messages = messages[:1] if prompts else messages
        return self.conversation(messages, field)

    def pair(self, question: str, answer: str | None) -> Row:
        """A question and its answer, or the question alone."""
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
            return _continued(asked, given, names)
        messages = self.turns(question, "\n".join(parts) if isinstance(asked, str) else asked)
        if texts and isinstance(self.record.get("history"), list):
            messages = (*self.history(self.record["history"]), *messages)
        if given is not None:
            messages = _follow(messages, self.turns(answer or "", given, role="assistant"))
        return self.conversation(messages, names, joins=texts)

    def preferred(self) -> Row:
        """The chosen one of two answers, after its question if that stands by itself."""
        chosen = self.value("chosen")
        base = self.first((*CHAT_FIELDS, CONTINUED, *QUESTION_FIELDS))
        if base is not None and base not in CHAT_FIELDS:
            return self.pair(base, "chosen")
        if base is not None:
            before = self.turns(base, self.value(base))
            while before and before[-1]["role"] == "assistant":
                before = before[:-1]
            answer = self.turns("chosen", chosen, role="assistant")
            return self.conversation(_follow(before, answer), f"{base} + chosen")
        if not isinstance(chosen, str):
            return self.conversation(self.turns("chosen", chosen), "chosen")
        rejected = self.record.get("rejected")
        if not isinstance(rejected, str):
            return Row(chosen, fields="chosen")
        # Both hold the same question, which ends with a mark of who speaks next.
        pairs = enumerate(zip(chosen, rejected, strict=False))
        parted = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
        asked = re.match(r".*[:>\n]", chosen[:parted], re.DOTALL)
        return Row(chosen, answer=asked.end() if asked else 0, fields="chosen")

    def value(self, field: str) -> Any:
        """A field's value; turns that were written as JSON are read."""
        value: Any = self.record.get(field)
        return json.loads(value) if _holds_turns(value) else value

    def history(self, pairs: Sequence[Any]) -> tuple[Message, ...]:
        """Earlier questions and answers, as pairs of strings."""
        flat = [part for pair in pairs if isinstance(pair, (list, tuple)) for part in pair]
        return _alternating(flat) if all(isinstance(part, str) for part in flat) else ()

    def conversation(self, messages: Sequence[Message], fields: str, *, joins: bool = False) -> Row:
        """A row of these turns, with the system message and the tools that stand beside them.

        Raises:
            TextError: no turn holds text.
        """
        system = self.first(SYSTEM_FIELDS)
        if system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self.record[system]}, *messages)
            fields = f"{system} + {fields}"
        if not any(map(_says_something, messages)):
            raise TextError(f"{self.place}: the turns of {fields} are empty")
        return Row(messages=tuple(messages), tools=self.tools(), joins=joins, fields=fields)

    def turns(self, field: str, value: Any, *, role: str = "user") -> tuple[Message, ...]:
        """Turns in the common form, of objects, of strings, or of one of either."""
        if isinstance(value, (str, Mapping)):
            value = [value]
        if isinstance(value, list) and value:
            if all(isinstance(turn, str) for turn in value):
                if len(value) > 1 and field in CHAT_FIELDS[:-1]:
                    return _alternating(value)
                return tuple({"role": role, "content": turn} for turn in value)
            if all(isinstance(turn, Mapping) for turn in value):
                return tuple(self.message(field, turn) for turn in value)
        raise TextError(
            f"{self.place}: field {field!r} is {'absent' if value is None else 'no text'}"
        )

    def message(self, field: str, turn: Mapping[str, Any]) -> Message:
        """A turn in the common form; what else it has is kept for the template."""
        turn = {key: value for key, value in turn.items() if value is not None}
        by = next((key for key in _ROLE_KEYS if isinstance(turn.get(key), str)), None)
        key = next((key for key in _CONTENT_KEYS if key in turn), None)
        calls = self.calls(field, turn.get("tool_calls") or turn.get("function_call") or [])
        if by is None and "role" in turn:
            raise TextError(
                f"{self.place}: a turn of {field!r} has the role {json.dumps(turn['role'])[:60]}, "
                "expected a name as user or assistant"
            )
        if by is None or (key is None and not calls):
            raise TextError(
                f"{self.place}: a turn of {field!r} has the fields {', '.join(turn) or '(none)'}; "
                "expected role and content, or from and value"
            )
        role = _ROLES.get(turn[by].lower())
        if role is None and by == "from":
            raise TextError(
                f"{self.place}: a turn of {field!r} is from {turn[by]!r}; expected human, gpt, "
                "system, function_call or observation"
            )
        content = "" if key is None else self.content(field, turn[key])
        if role == "call":
            found = _listed(_parsed(content))
            calls = found if all(map(_is_call, found)) else []
            role, content = "assistant", "" if calls else content
        used = (*_ROLE_KEYS, key, "tool_calls", "function_call")
        rest = {name: value for name, value in turn.items() if name not in used}
        message = {"role": role or turn[by], "content": content, **rest}
        return {**message, "tool_calls": list(map(_call, calls))} if calls else message

    def calls(self, field: str, value: Any) -> list[Any]:
        """A turn's calls of tools, also where they are written as JSON."""
        calls = _listed(_parsed(value))
        if all(map(_is_call, calls)):
            return calls
        raise TextError(
            f"{self.place}: a turn of {field!r} calls a tool as {value!r:.60}; expected "
            "an object with a name, or a list of these"
        )

    def content(self, field: str, value: Any) -> str:
        """A turn's text, also where it comes in parts."""
        if isinstance(value, str):
            return value
        parts = value if isinstance(value, list) else [None]
        texts: list[Any] = [
            part.get("text") if isinstance(part, Mapping) else part for part in parts
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts)
        raise TextError(f"{self.place}: a turn of {field!r} has content that is no text")

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """Descriptions of the tools that the conversation may call."""
        tools = self.record.get("tools") or []
        try:
            tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        except ValueError:
            tools = None
        if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
            return tuple(map(_tool, map(_without_none, tools)))
        raise TextError(f"{self.place}: field 'tools' is no list of objects, nor JSON of one")


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip()) or "tool_calls" in message


def _continued(question: str, answer: str | None, fields: str) -> Row:
    """A text and how it goes on; on a new line where nothing else parts them."""
    if answer is None:
        return Row(question, fields=fields)
    together = not question or question[-1].isspace() or answer[:1].isspace()
    text = question + ("" if together else "\n") + answer
    return Row(text, answer=len(question), fields=fields)


def _follow(before: Sequence[Message], answer: Sequence[Message]) -> tuple[Message, ...]:
    """A question and its answer, which may repeat the question."""
    spoken = [message for message in answer if message["role"] != "system"]
    if spoken and spoken[0]["role"] == "user":
        return tuple(answer)
    return (*before, *answer)


def _alternating(contents: Sequence[str]) -> tuple[Message, ...]:
    return tuple(
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    )


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as templates expect it."""
    if "function" in tool or "name" not in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_call(value: Any) -> bool:
    """Whether this is a call of a tool, with its name in it or in its function."""
    function = (value.get("function") or value) if isinstance(value, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _call(value: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool as templates expect it: its arguments as an object."""
    call = _tool(_without_none(value))
    function = dict(call["function"])
    arguments = _parsed(function.get("arguments", {}))
    if arguments is not None:
        function["arguments"] = arguments
    return {**call, "function": function}


def _without_none(value: Any) -> Any:
    """Without the empty fields that parquet makes of objects that differ."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """What a string of JSON holds, if it is an object or a list."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, (dict, list)) else None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (str, Mapping))


def _holds_turns(value: Any) -> bool:
    """Whether a string is JSON of a conversation."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    found = _parsed(value)
    return _is_turns(found) and any(key in found[0] for key in _ROLE_KEYS)


def _is_text(key: str, value: Any) -> bool:
    """Whether a field may be the text where it is the only one."""
    if not isinstance(value, str) or key.lower() in _LABELS or _LABEL_NAME.search(key):
        return False
    return not _LABEL_VALUE.fullmatch(value.strip())


def _category(record: Mapping[str, Any]) -> str | None:
    category = record.get("category")
    if not isinstance(category, str):
        return None
    return CONVERSATION if "turns" in record and category in MT_BENCH else category
