"""The chat template: conversations written as text, and what ends a turn of theirs.

Imports neither torch nor transformers; the tokenizer that holds the template is handed in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spectool.data.rows import Message, Row
from spectool.errors import TextError

Template = Mapping[str, Any]

# Arguments of `apply_chat_template` that say how a prompt ends: given, they win.
ENDING = ("add_generation_prompt", "continue_final_message")
# Stands for an answer where a template is asked what it writes around one.
ANSWER = "zqxj"


def has_template(tokenizer: Any) -> bool:
    return bool(tokenizer is not None and getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a long text, without special tokens, without the length warning."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoding["input_ids"]
    return ids


def render(
    row: Row, tokenizer: Any, *, template: Template | None = None, prompt: bool = False
) -> str:
    """The row's text; a conversation goes through the tokenizer's chat template.

    Raises:
        TextError: a conversation, but the tokenizer has no template, or its template fails.
    """
    if row.text is not None:
        return row.text
    place = f"{row.place}: " if row.place else ""
    if not has_template(tokenizer):
        raise TextError(
            f"{place}a conversation, but the tokenizer has no chat template",
            hint="name a plain field with --field; --field turns takes a first turn as it is",
        )
    given = dict(template or {})
    if not prompt:
        given = {key: value for key, value in given.items() if key not in ENDING}
    elif given.get("continue_final_message"):
        prompt = False
    arguments = {"add_generation_prompt": prompt, **given}
    if row.tools and takes_tools(tokenizer):
        arguments.setdefault("tools", list(row.tools))

    def written(*, as_json: bool) -> str:
        messages = [_understood(m, str(tokenizer.chat_template), as_json) for m in row.messages]
        found: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return found

    try:
        try:
            return written(as_json=False)
        except TypeError:
            # Most templates write what a tool is called with from an object, some from its JSON.
            return written(as_json=True)
    except Exception as error:
        # The template is a program from the checkpoint: it may fail in any way, also on purpose.
        raise TextError(f"{place}the chat template refuses a conversation: {error}") from error


def takes_tools(tokenizer: Any) -> bool:
    """Whether the template describes tools to the model."""
    return "tools" in str(tokenizer.chat_template)


def write(
    row: Row, tokenizer: Any, *, template: Template | None = None, prompt: bool = False
) -> str:
    """As `render`, for a row of data: a conversation whose text is lost on the way is an error.

    Raises:
        TextError: as `render`; or the template writes nothing of what the turns say.
    """
    rendered = render(row, tokenizer, template=template, prompt=prompt)
    if row.text is None and not _says(row, rendered, tokenizer, template, prompt):
        raise TextError(
            f"{row.place}: the chat template writes nothing of the turns of {row.fields}",
            hint="name another field with --field, or give the template what it asks for with "
            "--template-arg",
        )
    return rendered


def end_of_turn(
    tokenizer: Any, messages: Sequence[Message], template: Template | None = None
) -> frozenset[int]:
    """The special token that the template writes after the answer to these messages, if it does.

    Raises:
        TextError: the template fails.
    """
    row = Row(messages=(*messages, {"role": "assistant", "content": ANSWER}))
    _, answer, after = render(row, tokenizer, template=template).rpartition(ANSWER)
    ids = encode(tokenizer, after.lstrip()) if answer else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special.intersection(ids[:1]))


def ends_of(row: Row, tokenizer: Any, template: Template | None = None) -> frozenset[int]:
    """The end of a turn of this conversation, which the template could write.

    None where it refuses to write another answer.
    """
    answered = row.messages[-1]["role"] == "assistant"
    try:
        return end_of_turn(tokenizer, row.messages[: -1 if answered else None], template)
    except TextError:
        return frozenset()


def template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`--template-arg key=value` pairs; values are JSON where they parse as it, else strings."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TextError(f"--template-arg {pair}: expected key=value")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _understood(message: Message, source: str, as_json: bool) -> dict[str, Any]:
    """The message as a template of this source knows it: one without tools reads plain turns."""
    message = dict(message)
    if message["role"] == "tool" and "tool" not in source:
        message["role"] = "user"
    if "tool_calls" not in message:
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    if "tool_calls" not in source:
        del message["tool_calls"]
        lines = [json.dumps(call, ensure_ascii=False) for call in calls]
        message["content"] = "\n".join(filter(None, (message["content"], *lines)))
        return message
    if as_json:
        message["tool_calls"] = [
            {**whole, "function": {**call, "arguments": json.dumps(call.get("arguments"))}}
            for whole, call in zip(message["tool_calls"], calls, strict=True)
        ]
    return message


def _says(row: Row, rendered: str, tokenizer: Any, template: Template | None, prompt: bool) -> bool:
    """Whether something of what the turns say is in the text."""
    if not rendered.strip():
        return False
    contents = [message["content"].strip() for message in row.messages]
    if any(content and content in rendered for content in contents):
        return True
    # The template may trim or rewrite what is said: then another text would be written of less.
    silent = tuple(
        {key: "" if key == "content" else value for key, value in message.items()
         if key != "tool_calls"}
        for message in row.messages
    )  # fmt: skip
    try:
        emptied = dataclasses.replace(row, messages=silent)
        return rendered != render(emptied, tokenizer, template=template, prompt=prompt)
    except TextError:
        return True
