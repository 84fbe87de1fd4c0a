"""Texts and prompts: from files of several kinds to strings, and from strings to token ids.

Knows .txt, .jsonl and .parquet, plain or as .gz or .xz, and hub data sets. Imports neither torch
nor transformers; a tokenizer is handed in where one is needed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from spectool.errors import TextError, require

BUILTIN = "built-in text"
# Of its kinds, the one that holds something of all of them.
MIXED = "mixed"
TEXT_FIELDS = ("text", "content", "document", "story")
PROMPT_FIELDS = ("prompt", "text", "question", "instruction")
ROW_KINDS = (".jsonl", ".json", ".ndjson")
TEXT_KINDS = (".txt", ".md", ".py", ".raw", "")
CHAT_FIELDS = ("messages", "turns")
HUB_PREFIX = "hub:"
# MT-Bench's categories. Spec-Bench counts its rows, which have `turns`, as one group.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
CONVERSATION = "conversation"

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file: a plain text, or a conversation for the chat template."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    category: str | None = None


def read_rows(source: str, *, field: str | None = None, prompts: bool = False) -> Iterator[Row]:
    """The records of a file or a hub data set (`hub:OWNER/NAME[:CONFIG][:SPLIT]`).

    A .txt file is one text; as a prompt file, one prompt a line. In a row of named fields, `field`
    is taken, else `messages` or `turns`, else the usual name of a text, else the only string.

    Raises:
        TextError: no such file, an unknown kind, empty, binary, or a row without the field.
    """
    if source.startswith(HUB_PREFIX):
        yield from (_row(source, i, row, field, prompts) for i, row in _hub_rows(source))
        return
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".xz")), "")
    if kind not in (*ROW_KINDS, *TEXT_KINDS, ".parquet"):
        raise TextError(
            f"{path}: unknown kind {kind}; expected .txt, .jsonl or .parquet, or .gz/.xz"
        )
    if not path.is_file():
        raise TextError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    if kind == ".parquet":
        yield from (_row(source, i, row, field, prompts) for i, row in _parquet_rows(path))
        return
    text = _decode(path)
    if kind in ROW_KINDS:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise TextError(f"{path}:{number}: not valid JSON: {error}") from error
                yield _row(source, number, row, field, prompts)
    elif prompts:
        yield from (Row(line.rstrip("\r")) for line in text.split("\n") if line.strip())
    else:
        yield Row(text)


def read_text(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Mapping[str, Any] | None = None,
    max_characters: int | None = None,
) -> str:
    """All records of all sources as one text, parted by blank lines; the built-in text for none.

    Hub data sets are streamed and may not end: of each, no more records are asked for once it gave
    `max_characters`. Files are read whole.

    Raises:
        TextError: as `read_rows`; or there is no text in them.
    """
    if not sources:
        return builtin_text()
    texts: list[str] = []
    for source in sources:
        most = max_characters if source.startswith(HUB_PREFIX) else None
        num_characters = 0
        for row in read_rows(source, field=field):
            texts.append(render(row, tokenizer, template=template))
            # With the blank line after it: a stream of empty rows ends as well.
            num_characters += len(texts[-1]) + 2
            if most is not None and num_characters >= most:
                break
    joined = "\n\n".join(texts)
    if not joined.strip():
        raise TextError(f"{', '.join(sources)}: holds no text")
    return joined


def builtin_text(kind: str | None = None) -> str:
    """The text that is used where none is given: all its kinds one after another, or one of them.

    `calibration/SOURCES.md` says where it comes from.
    """
    folder = resources.files("spectool").joinpath("calibration")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".txt")),
        key=lambda file: file.name,
    )
    wanted = [file for file in files if kind is None or file.name == f"{kind}.txt"]
    return "\n\n".join(file.read_text("utf-8").strip() for file in wanted) + "\n"


def read_prompts(
    source: str,
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[str | list[int]]:
    """The first `limit` prompts of a file; conversations end where the assistant is to speak.

    Conversations come back as token ids: the chat template writes its own special tokens, and
    encoding its text again would add the start token twice.

    Raises:
        TextError: as `read_rows`; or there is no prompt in it.
    """
    found = read_categories(source, tokenizer, field=field, template=template, limit=limit)
    return [prompt for _, prompt in found]


def read_categories(
    source: str,
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Mapping[str, Any] | None = None,
    limit: int | None = None,
    per_category: int | None = None,
) -> list[tuple[str | None, str | list[int]]]:
    """As `read_prompts`, each with its row's `category`; the first `per_category` of each.

    Raises:
        TextError: as `read_prompts`.
    """
    found: list[tuple[str | None, str | list[int]]] = []
    seen: Counter[str | None] = Counter()
    for row in itertools.islice(read_rows(source, field=field, prompts=True), limit):
        seen[row.category] += 1
        if per_category is not None and seen[row.category] > per_category:
            continue
        text = render(row, tokenizer, template=template, prompt=True)
        found.append((row.category, text if row.text is not None else encode(tokenizer, text)))
    if not found:
        raise TextError(f"{source}: holds no prompt")
    return found


def render(
    row: Row, tokenizer: Any, *, template: Mapping[str, Any] | None = None, prompt: bool = False
) -> str:
    """The row's text; a conversation goes through the tokenizer's chat template.

    Raises:
        TextError: a conversation, but the tokenizer has no template, or its template fails.
    """
    if row.text is not None:
        return row.text
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the rows are conversations, but the tokenizer has no chat template",
            hint="name a plain field with --field; --field turns takes a first turn as it is",
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(row.messages),
            tokenize=False,
            add_generation_prompt=prompt,
            **(template or {}),
        )
    except Exception as error:
        # The template is a program from the checkpoint: it may fail in any way, also on purpose.
        raise TextError(f"the chat template refuses a conversation: {error}") from error
    return rendered


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a long text, without special tokens, without the length warning."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoding["input_ids"]
    return ids


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


def _decode(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise TextError(f"{path}: cannot be read: {error}") from error
    if not data.strip():
        raise TextError(f"{path}: is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise TextError(f"{path}: binary, not text")
    return text


def _row(source: str, number: int, row: Any, field: str | None, prompts: bool) -> Row:
    place, named = f"{source}:{number}", field is not None
    if isinstance(row, str):
        return Row(row)
    if not isinstance(row, dict):
        raise TextError(f"{place}: expected an object with named fields")
    if field is None:
        usual = PROMPT_FIELDS if prompts else TEXT_FIELDS
        strings = [key for key, value in row.items() if isinstance(value, str)]
        field = next((key for key in (*CHAT_FIELDS, *usual) if key in row), None)
        if field is None and len(strings) == 1:
            field = strings[0]
        if field is None:
            raise TextError(
                f"{place}: no field that is surely the text among {', '.join(row)}",
                hint="name it with --field",
            )
    value, category = row.get(field), _category(row)
    if isinstance(value, str):
        return Row(value, category=category)
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        if prompts and named:
            # Who names it wants its text, for a model without a chat template say.
            return Row(value[0], category=category)
        turns = value[:1] if prompts else value
        messages = tuple({"role": "user", "content": turn} for turn in turns)
        return Row(messages=messages, category=category)
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return Row(messages=tuple(value), category=category)
    raise TextError(f"{place}: field {field!r} is {'absent' if value is None else 'no text'}")


def _category(row: Mapping[str, Any]) -> str | None:
    category = row.get("category")
    if not isinstance(category, str):
        return None
    return CONVERSATION if "turns" in row and category in MT_BENCH else category


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = require("pyarrow.parquet", extra="data", reason=f"reading {path.name}")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise TextError(f"{path}: not a parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _hub_rows(source: str) -> Iterator[tuple[int, Any]]:
    datasets = require("datasets", extra="data", reason="reading a hub data set")
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    config, split = (None, rest[0]) if len(rest) == 1 else (*rest, None, None)[:2]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        yield from enumerate(rows, 1)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(f"{source}: {reason}") from error
