"""Texts and prompts of every kind of file and row, whole and damaged."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spectool.cli.events import describe
from spectool.data import text
from spectool.data.template import encode, render, template_arguments
from spectool.data.text import builtin_text, read_prompts, read_rows, read_text
from spectool.errors import MissingExtra, TextError
from spectool.examples.stdlib import read_documents

from ..heard import Heard

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood %}({{ mood }}){% endif %}{% endif %}"
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return `write("a.jsonl", rows)`, which writes text, bytes or rows and returns the path."""

    def make(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        data = content if isinstance(content, bytes) else content.encode()
        opener: Any = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix)
        path.write_bytes(opener(data) if opener else data)
        return str(path)

    return make


def given(*arguments: Any, **options: Any) -> list[str | list[int]]:
    return [prompt.given for prompt in read_prompts(*arguments, **options)]


@pytest.fixture
def spelled() -> Any:
    """Make a tokenizer with a chat template that decodes to the encoded text."""
    import copy

    from ..conftest import tokenizer

    made = copy.deepcopy(tokenizer())
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def chatty() -> Any:
    """Make a tokenizer with a chat template."""
    import copy

    from transformers import PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    made = copy.copy(made)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_plain_text_however_compressed(write: Write, suffix: str) -> None:
    path = write("a.txt" + suffix, "één\n\ntwo\n")
    assert read_text([path], None) == "één\n\ntwo\n"
    assert given(path, None) == ["één", "two"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_rows_however_compressed(write: Write, suffix: str) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    path = write("a.jsonl" + suffix, rows)
    assert read_text([path], None) == "one\n\ntwo"
    assert given(path, None) == ["one", "two"]


def test_byte_order_mark_windows_lines_and_rare_separators(write: Write) -> None:
    assert given(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"), None) == ["one", "two"]
    odd = "a\u2028b\x0bc\x85d"
    assert given(write("b.txt", f"{odd}\nnext"), None) == [odd, "next"]
    assert given(write("c.jsonl", [{"prompt": odd}, {"prompt": "x"}]), None) == [odd, "x"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_a_list_of_rows(write: Write, name: str) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two\n"}]
    path = write(name, json.dumps(rows, indent=1))
    assert given(path, None) == ["one", "two\n"]
    assert read_text([path], None, field="prompt") == "one\n\ntwo\n"
    assert read_text([write("one.json", json.dumps({"text": "x"}, indent=1))], None) == "x"


def test_what_was_read_is_told(write: Write, spelled: Any) -> None:
    talk = {
        "conversations": [{"from": "human", "value": "hi " * 40}, {"from": "gpt", "value": "a"}]
    }
    sources = [write("a.jsonl", [{"id": "x", **talk}, {"text": "one"}]), write("b.txt", "\n two")]
    heard = Heard()
    read_text(sources, spelled, reporter=heard)
    begins = f"<user>{'hi ' * 40}"[:80]
    assert [line for reading in heard.events for line in describe(reading)] == [
        f"{sources[0]}: 2 rows, conversations as a conversation (1), text as text (1); "
        f'the first begins "{begins}"',
        f'{sources[1]}: 1 row, whole file as text; the first begins "two"',
    ]
    assert heard.events[0].as_dict() == {
        "source": sources[0],
        "rows": 2,
        "fields": {"conversations as a conversation": 1, "text as text": 1},
        "begins": begins,
    }
    read_prompts(sources[0], spelled, limit=1, reporter=heard)
    (line,) = describe(heard.events[2])
    assert "1 prompt, conversations up to the answer as a conversation; the" in line


def test_prompts_of_a_template_end_at_its_end_of_turn(write: Write, spelled: Any) -> None:
    """Plain text in the same file does not."""
    spelled.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    path = write("a.jsonl", [{"turns": ["one"]}, {"prompt": "p"}])
    assert [prompt.ends for prompt in read_prompts(path, spelled)] == [{1}, frozenset()]
    spelled.chat_template = TEMPLATE
    assert [prompt.ends for prompt in read_prompts(path, spelled)] == [frozenset()] * 2
    # A template that takes no answer wrote the prompt all the same.
    spelled.chat_template = "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}one"
    assert [prompt.ends for prompt in read_prompts(path, spelled)] == [frozenset()] * 2


def test_a_conversation_of_which_nothing_is_written(write: Write, spelled: Any) -> None:
    path = write("a.jsonl", [{"text": "x"}, {"messages": [{"role": "user", "content": "hi"}]}])
    for template in (
        "{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}",
        "  ",
        "hello",
    ):
        spelled.chat_template = template
        for read in (read_text, read_prompts):
            with pytest.raises(TextError, match=r"a.jsonl:2: the chat template writes nothing"):
                read([path] if read is read_text else path, spelled)
    # Rewritten is not lost.
    spelled.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert read_text([path], spelled) == "x\n\nHI"


def test_calls_are_written_as_the_template_can(write: Write, spelled: Any) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    talk = [
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
    ]
    path = write("a.jsonl", [{"conversations": talk, "tools": [{"name": "add"}]}])
    heard = Heard()
    assert read_text([path], spelled, reporter=heard) == f"<assistant>{json.dumps(call)}<user>2"
    (line,) = describe(heard.events[0])
    assert line.endswith("; tools left out: the chat template takes none")
    start = "{{ tools | length }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in "
    start += "m.tool_calls or [] %}{{ c.function.name + '-' + "
    for written, wanted in (
        ("c.function.arguments.a | string", "add-1"),
        # A template that wants JSON gets it.
        ("c.function.arguments", 'add-{"a": 1}'),
    ):
        spelled.chat_template = start + written + " }}{% endfor %}|{% endfor %}"
        assert read_text([path], spelled) == f"1assistant:{wanted}|tool:2|"


def test_several_files_are_one_text(write: Write) -> None:
    sources = [write("a.txt", "one"), write("b.jsonl.gz", ["two", "three"])]
    assert read_text(sources, None) == "one\n\ntwo\n\nthree"


def test_builtin_text_when_nothing_is_given() -> None:
    text = read_text([], None)
    assert len(text) > 10_000 and text.isprintable() is False and "\0" not in text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "t", "content": "c"}, "t"),
        ({"content": "c", "other": "o"}, "c"),
        ({"story": "s", "n": 3}, "s"),
        ({"unusual": "u", "n": 3}, "u"),
    ],
)
def test_the_field_is_found(write: Write, row: dict[str, Any], text: str) -> None:
    assert read_text([write("a.jsonl", [row])], None) == text


def test_prompts_prefer_other_fields(write: Write) -> None:
    path = write("a.jsonl", [{"text": "t", "prompt": "p"}, {"question": "q", "answer": "a"}])
    assert given(path, None) == ["p", "q"]


def test_a_named_field_wins(write: Write) -> None:
    path = write("a.jsonl", [{"text": "t", "mine": "m"}])
    assert read_text([path], None, field="mine") == "m"


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"a": "x", "b": "y"}, None, "no field that is surely the text among a, b"),
        ({"n": 3}, None, "no field that is surely"),
        ({"text": "x"}, "body", "field 'body' is absent"),
        ({"text": 3}, None, "field 'text' is no text"),
        ({"messages": []}, None, "field 'messages' is no text"),
        ([1, 2], None, "expected an object"),
        (3, None, "expected an object"),
    ],
)
def test_rows_without_a_text(write: Write, row: Any, field: str | None, message: str) -> None:
    path = write("a.jsonl", [{"text": "fine", "body": "fine"}, row])
    with pytest.raises(TextError, match=message) as caught:
        read_text([path], None, field=field)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_conversations_go_through_the_template(write: Write, chatty: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write("a.jsonl", [{"messages": messages}, {"turns": ["one", "two"]}])
    assert read_text([path], chatty) == "<user>hi<assistant>hello\n\n<user>one<user>two"
    # As a prompt a list of turns is its first turn, and the assistant is to speak: not twice.
    rows = [row.cut_answer() for row in read_rows(path, prompts=True)]
    found = [render(row, chatty, prompt=True, template={"mood": "calm"}) for row in rows]
    assert found == ["<user>hi<assistant>(calm)", "<user>one<assistant>(calm)"]
    # As token ids, with nothing before what the template wrote.
    plain = [encode(chatty, render(row, chatty, prompt=True)) for row in rows]
    assert given(path, chatty) == plain


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ({"add_generation_prompt": True}, "<user>hi<assistant>hello<assistant>"),
        ({"continue_final_message": True}, "<user>hi<assistant>hello"),
    ],
)
def test_an_answered_row_is_a_whole_prompt_where_asked(
    write: Write, spelled: Any, template: dict[str, Any], text: str
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write("a.jsonl", [{"messages": messages}])
    (tokens,) = given(path, spelled, template=template)
    assert spelled.decode(tokens) == text
    # As a text it is what it is.
    assert read_text([path], spelled, template=template) == "<user>hi<assistant>hello"


def test_conversations_without_a_template(write: Write, chatty: Any) -> None:
    path = write("a.jsonl", [{"turns": ["one"]}])
    chatty.chat_template = None
    for tokenizer in (None, chatty):
        with pytest.raises(TextError, match="no chat template") as caught:
            read_prompts(path, tokenizer)
        assert caught.value.hint is not None and "--field" in caught.value.hint
        # The first turn as it is, where it is asked for by name.
        assert given(path, tokenizer, field="turns") == ["one"]


def test_template_that_refuses(write: Write, chatty: Any) -> None:
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match=r"a.jsonl:1: the chat template .*roles must alternate"):
        read_prompts(write("a.jsonl", [{"turns": ["one"]}]), chatty)


def test_template_arguments() -> None:
    found = template_arguments(["think=false", "n=3", "name=Ann", "list=[1]", "odd=a=b"])
    assert found == {"think": False, "n": 3, "name": "Ann", "list": [1], "odd": "a=b"}
    with pytest.raises(TextError, match="expected key=value"):
        template_arguments(["think"])


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert read_text([path], None) == "one\n\ntwo"
    parquet.write_table(arrow.table({"turns": [["hi", "ho"]]}), path)
    assert [row.messages[1]["content"] for row in read_rows(path)] == ["ho"]
    Path(path).write_bytes(b"PAR1 no")
    with pytest.raises(TextError, match="not a parquet file"):
        read_text([path], None)


def test_extras_are_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (write("a.parquet", "x"), "hub:someone/something"):
        with pytest.raises(MissingExtra) as caught:
            read_text([source], None)
        assert caught.value.hint == "pip install 'spectool[data]'"


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fake = types.ModuleType("datasets")

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((arguments, options))
        if arguments[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such'\ndoes not exist")
        return [{"text": "one"}, {"text": "two"}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for source, config, split in (
        ("hub:a/b", None, "train"),
        ("hub:a/b:test", None, "test"),
        ("hub:a/b:en:test", "en", "test"),
    ):
        assert read_text([source], None) == "one\n\ntwo"
        assert asked.pop() == (("a/b", config), {"split": split, "streaming": True})
    with pytest.raises(TextError, match=r"^hub:no/such: Dataset 'no/such'$"):
        read_text(["hub:no/such"], None)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fake an endless stream for any hub data set; returns the list of row numbers read."""
    asked: list[int] = []

    def load_dataset(*arguments: Any, **options: Any) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            asked.append(number)
            assert number < 1000, "never stops"
            yield {"text": f"row {number:04d}."}

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_streams_without_an_end_are_read_up_to_the_bound(write: Write, endless: list[int]) -> None:
    assert read_text(["hub:a/b"], None, max_characters=25) == "row 0000.\n\nrow 0001.\n\nrow 0002."
    assert endless == [0, 1, 2]
    # Files are read whole, and every stream has the bound for itself.
    file = write("a.jsonl", ["x" * 20, "y" * 20, "z" * 20])
    text = read_text([file, "hub:a/b", "hub:c/d"], None, max_characters=9)
    assert text.split("\n\n") == ["x" * 20, "y" * 20, "z" * 20, "row 0000.", "row 0000."]


def test_prompts_of_a_stream_without_an_end(write: Write, endless: list[int]) -> None:
    assert given("hub:a/b", None, limit=2) == ["row 0000.", "row 0001."]
    assert endless == [0, 1]
    assert given(write("a.txt", "one\ntwo\nthree"), None, limit=2) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt.gz", b"", "is empty"),
        ("a.txt", b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
        ("a.txt", b"ELF\0\0\1", "binary"),
        ("a.jsonl", b'{"text": "x"}\n{"text":', "a.jsonl:2: not valid JSON"),
        ("a.json", b'[\n  {"text": "x"},\n]', r"a.json: not valid JSON: .*line 3"),
        ("a.json", b"[" * 100_000, "a.json: not valid JSON"),
        ("a.json", b'[{"text": "x"}, {"body": 3}]', "a.json:2: no field that is surely"),
        ("a.json", b'{\n"text": "x"\n', "a.json:1: not valid JSON"),
        ("a.pdf", b"x", "unknown kind .pdf"),
        ("a.tar.bz2", bz2.compress(b"x"), "unknown kind .bz2"),
    ],
)
def test_damaged_texts(write: Write, name: str, content: bytes, message: str) -> None:
    with pytest.raises(TextError, match=message) as caught:
        read_text([write(name, content)], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_damaged_archives(write: Write, suffix: str, damage: str) -> None:
    path = Path(write("a.txt" + suffix, "some text " * 1000))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-20]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = bytearray(b"some text")
    path.write_bytes(data)
    with pytest.raises(TextError, match="cannot be read"):
        read_text([str(path)], None)


def test_absent_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file"):
        read_text([str(tmp_path / "a.txt")], None)
    with pytest.raises(TextError, match="is a directory"):
        read_text([str(tmp_path)], None)


def test_texts_and_prompts_of_blank_rows(write: Write) -> None:
    path = write("a.jsonl", [{"text": " "}, {"text": "\n"}])
    with pytest.raises(TextError, match="holds no text"):
        read_text([path], None)


def test_encoding_adds_nothing_and_does_not_warn(chatty: Any) -> None:
    chatty.model_max_length = 4
    assert encode(chatty, "a b " * 50) == [0, 1] * 50


def test_the_built_in_text() -> None:
    """The built-in text contains all kinds, and SOURCES.md names the source of each."""
    whole = builtin_text()
    assert read_text([], None) == whole and 200_000 < len(whole) < 400_000
    folder = Path(text.__file__).with_name("calibration")
    kinds = [path.stem for path in sorted(folder.glob("*.txt"))]
    assert kinds == ["code", "data", "languages", "mixed", "prose", "talk"]
    starts = [whole.index(builtin_text(kind).strip()) for kind in kinds]
    assert starts == sorted(starts)
    sources = (folder / "SOURCES.md").read_text("utf-8")
    assert all(f"`{kind}.txt`" in sources for kind in kinds)


@pytest.mark.slow
def test_the_built_in_text_holds_no_held_out_code() -> None:
    lines = set(builtin_text().splitlines())
    for document in read_documents():
        if document.held_out:
            long = [line for line in document.text.splitlines() if len(line) > 60]
            assert len(lines.intersection(long)) <= 0.1 * len(long) + 3, document.name
