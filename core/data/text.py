"""Reading of texts and prompts from files and hub data sets.

Reads .txt, .jsonl, .json and .parquet, plain or as .gz or .xz; `rows.py` interprets the rows.
Imports neither torch nor transformers; a tokenizer is an argument where one is needed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from spectool.data.rows import Row, read_row
from spectool.data.template import (
    ENDING,
    Template,
    encode,
    find_stop_tokens,
    has_template,
    render_checked,
    takes_tools,
)
from spectool.errors import CheckpointError, TextError, require
from spectool.report import SILENT, Reporter

BUILTIN = "built-in text"
# The kind of built-in text that mixes all other kinds.
MIXED = "mixed"
ROW_KINDS = (".jsonl", ".json", ".ndjson")
TEXT_KINDS = (".txt", ".md", ".py", ".raw", "")
HUB_PREFIX = "hub:"
# Characters of the first row that a run shows.
MAX_SHOWN = 80


@dataclass(slots=True)
class Reading:
    """Summary of what was read from a source: number of rows, their fields, the first text.

    `shapes` counts the rows by fields and by whether they are texts or conversations.
    """

    source: str
    prompts: bool = False
    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    first: str = ""
    tools_left_out: bool = False

    def add(self, row: Row, written: str, tokenizer: Any) -> None:
        """Add a row and its text to the summary."""
        self.num_rows += 1
        self.first = self.first or written.strip()[:MAX_SHOWN]
        self.shapes[f"{row.fields} as {'text' if row.text is not None else 'a conversation'}"] += 1
        self.tools_left_out |= bool(row.tools) and not takes_tools(tokenizer)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for `--json`."""
        return {
            "source": self.source,
            "rows": self.num_rows,
            "fields": dict(self.shapes),
            "begins": self.first,
        }


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: a text, or the token ids of a conversation rendered by the chat template.

    `ends`: tokens that end an answer in addition to the model's end of text: the template's end of
    turn. `answer`: the answer that the row ended with, if any. `follow`, of a question with
    `num_turns` turns from this one on, makes the next one's prompt from the answer's text.
    """

    given: str | list[int]
    category: str | None = None
    ends: frozenset[int] = frozenset()
    answer: str = ""
    num_turns: int = 1
    follow: Callable[[str], Prompt] | None = None


def read_rows(source: str, *, field: str | None = None, prompts: bool = False) -> Iterator[Row]:
    """Read the rows of a file or a hub data set (`hub:OWNER/NAME[:CONFIG][:SPLIT]`).

    A .txt file is one row, or with `prompts` one row per line. `rows.read_row` interprets rows of
    named fields; `field` selects one of them.

    Raises:
        TextError: no such file, an unknown kind, empty, binary, or a row without the field.
    """
    if source.startswith(HUB_PREFIX):
        yield from _read(source, _hub_rows(source), field, prompts)
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
        yield from _read(source, _parquet_rows(path), field, prompts)
        return
    text = _decode(path)
    if kind in ROW_KINDS:
        yield from _read(source, _json_rows(path, text), field, prompts)
    elif prompts:
        lines = enumerate(text.split("\n"), 1)
        yield from (
            Row(line.rstrip("\r"), fields="lines", place=f"{source}:{number}")
            for number, line in lines
            if line.strip()
        )
    else:
        yield Row(text, fields="whole file", place=source)


def read_text(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Template | None = None,
    max_characters: int | None = None,
    reporter: Reporter = SILENT,
) -> str:
    """Read all rows of all sources as one text, separated by blank lines.

    Without sources, the built-in text. Otherwise see `read_documents`.

    Raises:
        TextError: as `read_rows`; or the sources hold no text.
    """
    if not sources:
        return builtin_text()
    documents = read_documents(
        sources,
        tokenizer,
        field=field,
        template=template,
        max_characters=max_characters,
        reporter=reporter,
    )
    return "\n\n".join(documents)


def read_documents(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    field: str | None = None,
    template: Template | None = None,
    max_characters: int | None = None,
    reporter: Reporter = SILENT,
) -> list[str]:
    """Read the text of each row of all sources.

    Hub data sets are streamed and may be endless: each is read up to `max_characters`; files are
    read whole. The summary of each source is reported.

    Raises:
        TextError: as `read_rows`; or the sources hold no text.
    """
    texts: list[str] = []
    for source in sources:
        limit = max_characters if source.startswith(HUB_PREFIX) else None
        num_characters = 0
        reading = Reading(source)
        for row in read_rows(source, field=field):
            row = join_without_template(row, tokenizer)
            texts.append(render_checked(row, tokenizer, template=template))
            reading.add(row, texts[-1], tokenizer)
            # Counting the blank line ends a stream of empty rows as well.
            num_characters += len(texts[-1]) + 2
            if limit is not None and num_characters >= limit:
                break
        reporter.event(reading)
    if not any(text.strip() for text in texts):
        raise TextError(f"{', '.join(sources)}: holds no text")
    return texts


def builtin_text(kind: str | None = None) -> str:
    """Return the built-in text: all kinds one after another, or one of them.

    Sources: `calibration/SOURCES.md`.
    """
    folder = resources.files("spectool.data").joinpath("calibration")
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
    template: Template | None = None,
    limit: int | None = None,
    per_category: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Prompt]:
    """Read the first `limit` prompts of a file, of these the first `per_category` of each category.

    If a row ends with an answer, the prompt is the part before it, unless `template` has one of
    `ENDING`.

    Raises:
        TextError: as `read_rows`; or the file holds no prompt.
    """
    result: list[Prompt] = []
    ends: frozenset[int] | None = None
    reading = Reading(source, prompts=True)
    rows = read_rows(source, field=field, prompts=True)
    for row in select_rows(rows, limit=limit, per_category=per_category):
        row = join_without_template(row, tokenizer)
        answer = row.read_answer()
        if row.text is not None or not set(ENDING).intersection(template or ()):
            row = row.cut_answer()
        text = render_checked(row, tokenizer, template=template, prompt=True)
        reading.add(row, text, tokenizer)
        if row.text is not None:
            result.append(Prompt(text, row.category, answer=answer))
            continue
        if ends is None:
            ends = find_stop_tokens(row, tokenizer, template)
        # Token ids: the text holds the template's special tokens already, and encoding it as a
        # plain text would add the start token again.
        result.append(Prompt(encode(tokenizer, text), row.category, ends, answer))
    if not result:
        raise TextError(f"{source}: holds no prompt")
    reporter.event(reading)
    return result


def select_rows(
    rows: Iterable[Row], *, limit: int | None, per_category: int | None
) -> Iterator[Row]:
    """Yield the first `limit` rows, of these the first `per_category` of each category."""
    seen: Counter[str | None] = Counter()
    for row in itertools.islice(rows, limit):
        seen[row.category] += 1
        if per_category is None or seen[row.category] <= per_category:
            yield row


def join_without_template(row: Row, tokenizer: Any) -> Row:
    """Join a question and its answer into a plain text if the tokenizer has no chat template."""
    return row.join_turns() if row.joinable and not has_template(tokenizer) else row


def check_ids(ids: Sequence[int], num_tokens: int, origin: str) -> None:
    """Raise a CheckpointError if token ids from `origin` are no rows of a model's embedding."""
    wrong = next((id for id in (max(ids, default=0), min(ids, default=0))
                  if not 0 <= id < num_tokens), None)  # fmt: skip
    if wrong is not None:
        raise CheckpointError(
            f"{origin} gives id {wrong}, but the model has only {num_tokens} tokens",
            hint="the tokenizer's files are another model's, or tokens were added to it and not to "
            "the embedding",
        )


def _decode(path: Path) -> str:
    """Read a plain or compressed UTF-8 text."""
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


def _read(
    source: str, records: Iterator[tuple[int, Any]], field: str | None, prompts: bool
) -> Iterator[Row]:
    """Interpret numbered records as rows."""
    for number, record in records:
        yield read_row(record, place=f"{source}:{number}", field=field, prompts=prompts)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered records of JSON lines, of a list, or of one object over several lines."""
    records, reason = _parse(text)
    if isinstance(records, (list, dict)):
        yield from enumerate(records if isinstance(records, list) else [records], 1)
        return
    first_line = text.lstrip().split("\n", 1)[0]
    if first_line.startswith("[") and _parse(first_line)[1] is not None:
        raise TextError(f"{path}: not valid JSON: {reason}") from reason
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            record, reason = _parse(line)
            if reason is not None:
                raise TextError(f"{path}:{number}: not valid JSON: {reason}") from reason
            yield number, record


def _parse(text: str) -> tuple[Any, ValueError | RecursionError | None]:
    """Parse JSON; returns the value, or None and the error."""
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the numbered records of a parquet file."""
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
    """Stream the numbered records of a hub data set."""
    datasets = require("datasets", extra="data", reason="reading a hub data set")
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    config, split = (None, rest[0]) if len(rest) == 1 else (*rest, None, None)[:2]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        yield from enumerate(rows, 1)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(f"{source}: {reason}") from error
