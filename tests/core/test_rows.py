"""Rows of data in the common published layouts, as texts and as prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spectool.data.rows import Row, read_row
from spectool.errors import TextError

TALK = [
    {"role": "user", "content": "What is 3?"},
    {"role": "assistant", "content": "It is 3."},
]
SHARED = [{"from": "human", "value": "What is 3?"}, {"from": "gpt", "value": "It is 3."}]
HUMAN = "\n\nHuman: hi\n\nAssistant:"
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}


def roles(row: Row) -> str:
    """Abbreviate turns: u:What is 3?|a:It is 3."""
    return "|".join(f"{message['role'][0]}:{message['content']}" for message in row.messages)


@pytest.mark.parametrize(
    "record",
    [
        {"id": "QWJhYvA_0", "conversations": SHARED},
        {"id": "7", "conversations": TALK},
        {"conversations": SHARED, "tools": "[]", "source": "web"},
        {"messages": TALK, "prompt": "no", "text": "no"},
        {"conversation": TALK},
        {"turns": TALK},
        {"messages": json.dumps(TALK)},
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TALK]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]}
                      for turn in TALK]},
        {"messages": ["What is 3?", "It is 3."]},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": TALK[:1], "completion": "It is 3."},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
        {"prompt": "What is 3?", "prompt_id": "ab", "chosen": TALK, "rejected": TALK},
        {"prompt": "What is 3?", "chosen": TALK[1:], "rejected": TALK[1:], "messages": None},
        {"chosen": TALK, "rejected": TALK, "messages": TALK, "score_chosen": 1.0},
        {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]},
        {"conversations": SHARED[:1], "chosen": "It is 3.", "rejected": "no"},
        {"question": "What is 3?", "chosen": "It is 3.", "rejected": "no"},
        {"instruction": "What is 3?", "input": "", "output": "It is 3."},
        {"instruction": "What", "input": "is 3?", "output": "It is 3."},
        {"instruction": "What", "context": "is 3?", "response": "It is 3.", "category": "qa"},
        {"id": "x", "question": "What is 3?", "response": "It is 3.", "system_prompt": ""},
        {"problem": "What is 3?", "solution": "It is 3.", "source": "aime"},
        {"input": "What is 3?", "output": "It is 3."},
    ],
)  # fmt: skip
def test_a_question_and_its_answer(record: dict[str, Any]) -> None:
    row, asked = read_row(record), read_row(record, prompts=True).cut_answer()
    # An input stands on a line below its instruction.
    assert roles(row).replace("\n", " ") == "u:What is 3?|a:It is 3."
    assert roles(asked) == roles(row).split("|")[0]
    assert asked.fields == f"{row.fields} up to the answer" and asked.joinable == row.joinable


@pytest.mark.parametrize(
    ("record", "text", "question"),
    [
        ({"prompt": "def f(x):", "completion": " return x"}, "def f(x): return x", "def f(x):"),
        ({"prompt": "Q: 3?\n", "completion": "3", "id": "a"}, "Q: 3?\n3", "Q: 3?\n"),
        ({"prompt": "What is 3?", "response": "It."}, "What is 3?\nIt.", "What is 3?"),
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a b", "a"),
        ({"chosen": f"{HUMAN} I do", "rejected": f"{HUMAN} I"}, f"{HUMAN} I do", HUMAN),
        ({"text": "t", "prompt": "p", "completion": "c"}, "t", "p"),
        ({"text": "t", "instruction": "i", "output": "o"}, "t", None),
    ],
)  # fmt: skip
def test_a_text_and_how_it_goes_on(record: dict[str, Any], text: str, question: str | None) -> None:
    assert read_row(record).text == text
    assert read_row(record, prompts=True).cut_answer().text == question


def test_without_a_template_a_pair_is_its_lines() -> None:
    row = read_row({"instruction": "Add", "input": "1 and 2", "output": "3"}).join_turns()
    assert row.text == "Add\n1 and 2\n3" and row.cut_answer().text == "Add\n1 and 2"
    asked = read_row({"question": "What is 3?", "answer": 3}, prompts=True)
    assert roles(asked) == "u:What is 3?" and asked.joinable and asked.cut_answer() is asked
    asked = read_row({"question": "What is 3?", "answer": ["3", "three"], "turns": 2}, prompts=True)
    assert roles(asked) == "u:What is 3?"
    row = read_row({"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]})
    assert roles(row) == "s:s|u:a|a:b|u:c|a:d" and row.fields == "system + instruction + output"


def test_calls_and_tools_are_those_that_templates_know() -> None:
    shared = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "1 and 1?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([TOOL]),
    }
    call = {"type": "function", "function": CALL}
    common = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "1 and 1?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {**TOOL, "strict": None}}],
    }  # fmt: skip
    for record in (shared, common):
        row = read_row(record)
        assert roles(row) == "s:s|u:1 and 1?|a:|t:2|a:2" and row.messages[2]["tool_calls"] == [call]
        assert row.tools == ({"type": "function", "function": TOOL},)
        assert len(row.cut_answer().messages) == 4
    # No call at all: what it says stays.
    odd = read_row({"conversations": [{"from": "function_call", "value": "add(1)"}]})
    assert roles(odd) == "a:add(1)"


@pytest.mark.parametrize(
    "record",
    [
        {"id": "a text it seems"},
        {"tools": '[{"name": "add"}]', "source": "web", "category": "x", "uuid": "u"},
        {"conversation_id": "abc", "n": 3},
        {"sessionId": "abc"},
        {"key_": "0123456789abcdef0123"},
        {"x": "123e4567-e89b-12d3-a456-426614174000"},
        {"a": "https://example.org/x"},
        {"a": "x", "b": "y"},
    ],
)
@pytest.mark.parametrize("prompts", [False, True])
def test_a_label_is_never_the_text(record: dict[str, Any], prompts: bool) -> None:
    with pytest.raises(TextError, match=r"^f:1: no field that is surely the text among") as caught:
        read_row(record, place="f:1", prompts=prompts)
    assert caught.value.hint == "name it with --field"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"speaker": "a", "line": "b"}]}, "has the fields speaker, line; expected"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "is from 'nobody'; expected human"),
        ({"messages": [{"role": "user"}]}, "has the fields role; expected"),
        ({"messages": [{"role": 1, "content": "x"}]}, "has the role 1, expected a name as user"),
        ({}, "the row has no field with a value"),
        ({"text": None}, "the row has no field with a value"),
        ({"messages": [{"role": "user", "content": {"image": 3}}]}, "content that is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "that is no text"),
        ({"conversations": [{"from": "human", "value": " "}]}, "turns of conversations are empty"),
        ({"instruction": "", "output": "\n"}, r"turns of instruction \+ output are empty"),
        ({"messages": TALK, "tools": "none"}, "'tools' is no list of objects"),
    ],
)  # fmt: skip
def test_rows_that_will_not_do(record: dict[str, Any], message: str) -> None:
    with pytest.raises(TextError, match=f"^f:7: .*{message}"):
        read_row(record, place="f:7")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK[1:]},
        {"messages": [{"role": "user", "content": " "}, *TALK[1:]]},
        {"messages": [{"role": "system", "content": "s"}, *TALK[1:]]},
        {"prompt": "", "completion": "x"},
        {"prompt": " \n"},
        {"chosen": "The sky", "rejected": "The sea"},
    ],
)
def test_rows_without_a_prompt(record: dict[str, Any]) -> None:
    with pytest.raises(TextError, match=r"^f:7: .*holds nothing .*; expected a prompt"):
        read_row(record, place="f:7", prompts=True).cut_answer()


def test_a_named_field_is_taken_as_it_is() -> None:
    record = {"instruction": "i", "output": "o", "id": "x", "talk": SHARED, "list": ["a", "b"]}
    assert read_row(record, field="output").text == "o"
    assert read_row(record, field="id", prompts=True).text == "x"
    assert roles(read_row(record, field="talk")) == "u:What is 3?|a:It is 3."
    assert read_row(record, field="list", prompts=True).text == "a"
    assert roles(read_row(record, field="list")) == "u:a|u:b"


@pytest.mark.parametrize("calls", ["[]", "", [], None])
def test_a_turn_that_calls_no_tool(calls: Any) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    row = read_row({"messages": [turns[0], {**turns[1], "tool_calls": calls}]})
    assert list(row.messages) == turns


@pytest.mark.parametrize(
    "calls",
    [
        '[{"name": "f", "arguments": {"x": 1}}]',
        [{"name": "f", "arguments": '{"x": 1}', "function": None}],
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
    ],
)
def test_calls_of_tools_however_they_are_written(calls: Any) -> None:
    row = read_row({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]})
    function = {"name": "f", "arguments": {"x": 1}}
    assert row.messages[0]["tool_calls"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize("calls", ["f(1)", ["f"], [{"arguments": {}}]])
def test_calls_without_a_name(calls: Any) -> None:
    record = {"messages": [{"role": "assistant", "content": "a", "tool_calls": calls}]}
    with pytest.raises(TextError, match=r"^f:3: a turn of 'messages' calls a tool as .*a name"):
        read_row(record, place="f:3")
