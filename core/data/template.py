"""Rendering of conversations by the chat template, and the tokens that end a turn.

Imports neither torch nor transformers; the tokenizer that holds the template is an argument.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spectool.data.rows import Message, Row
from spectool.errors import TextError

Template = Mapping[str, Any]

# Arguments of `apply_chat_template` for the end of a prompt; the user's override the default.
ENDING = ("add_generation_prompt", "continue_final_message")
# Placeholder of an answer, to find what a template writes after one.
ANSWER = "zqxj"


def has_template(tokenizer: Any) -> bool:
    """Whether there is a tokenizer with a chat template."""
    return bool(tokenizer is not None and getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encode a text of any length, without special tokens and without the length warning."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoding["input_ids"]
    return ids


def render(
    row: Row, tokenizer: Any, *, template: Template | None = None, prompt: bool = False
) -> str:
    """Return a plain row's text, or render a conversation with the tokenizer's chat template.

    `template`: arguments of the chat template. `prompt`: end with the start of an answer.

    Raises:
        TextError: a conversation, but the tokenizer has no template, or its template fails.
    """
    if row.text is not None:
        return row.text
    location = f"{row.place}: " if row.place else ""
    if not has_template(tokenizer):
        raise TextError(
            f"{location}a conversation, but the tokenizer has no chat template",
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

    def apply(*, as_json: bool) -> str:
        messages = [_adapt(m, str(tokenizer.chat_template), as_json) for m in row.messages]
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return rendered

    try:
        try:
            return apply(as_json=False)
        except TypeError:
            # Most templates expect the arguments of a tool call as an object, some as its JSON.
            return apply(as_json=True)
    except Exception as error:
        # The template is a program from the checkpoint: it may raise any error, also on purpose.
        raise TextError(f"{location}the chat template refuses a conversation: {error}") from error


def takes_tools(tokenizer: Any) -> bool:
    """Whether the chat template uses descriptions of tools."""
    return "tools" in str(tokenizer.chat_template)


def render_checked(
    row: Row, tokenizer: Any, *, template: Template | None = None, prompt: bool = False
) -> str:
    """Render a row of data as `render`, and check that a conversation's content is in the text.

    Raises:
        TextError: as `render`; or the template leaves out the content of all turns.
    """
    rendered = render(row, tokenizer, template=template, prompt=prompt)
    if row.text is None and not _keeps_content(row, rendered, tokenizer, template, prompt):
        raise TextError(
            f"{row.place}: the chat template writes nothing of the turns of {row.fields}",
            hint="name another field with --field, or give the template what it asks for with "
            "--template-arg",
        )
    return rendered


def find_end_of_turn(
    tokenizer: Any, messages: Sequence[Message], template: Template | None = None
) -> frozenset[int]:
    """Find the special token that the template writes after an answer to these messages, if any.

    Raises:
        TextError: the template fails.
    """
    row = Row(messages=(*messages, {"role": "assistant", "content": ANSWER}))
    _, answer, after = render(row, tokenizer, template=template).rpartition(ANSWER)
    ids = encode(tokenizer, after.lstrip()) if answer else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special.intersection(ids[:1]))


def find_stop_tokens(row: Row, tokenizer: Any, template: Template | None = None) -> frozenset[int]:
    """Find the special token that ends an answer in this conversation; empty if there is none.

    Empty also if the template refuses another answer.
    """
    answered = row.messages[-1]["role"] == "assistant"
    try:
        return find_end_of_turn(tokenizer, row.messages[: -1 if answered else None], template)
    except TextError:
        return frozenset()


def template_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `--template-arg key=value` pairs; values that are not valid JSON are strings.

    Raises:
        TextError: a pair without `=`.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TextError(f"--template-arg {pair}: expected key=value")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def _adapt(message: Message, source: str, as_json: bool) -> dict[str, Any]:
    """Adapt a message to a template with this source.

    For templates without tools, calls and results become the content of plain turns. `as_json`:
    write the arguments of calls as JSON.
    """
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
            {**entry, "function": {**call, "arguments": json.dumps(call.get("arguments"))}}
            for entry, call in zip(message["tool_calls"], calls, strict=True)
        ]
    return message


def _keeps_content(
    row: Row, rendered: str, tokenizer: Any, template: Template | None, prompt: bool
) -> bool:
    """Whether the rendered text depends on the content of the turns."""
    if not rendered.strip():
        return False
    contents = [message["content"].strip() for message in row.messages]
    if any(content and content in rendered for content in contents):
        return True
    # The template may trim or rewrite content: then turns without content give another text.
    emptied_turns = tuple(
        {key: "" if key == "content" else value for key, value in message.items()
         if key != "tool_calls"}
        for message in row.messages
    )  # fmt: skip
    try:
        emptied = dataclasses.replace(row, messages=emptied_turns)
        return rendered != render(emptied, tokenizer, template=template, prompt=prompt)
    except TextError:
        return True
