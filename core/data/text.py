"""Texts and prompts: from files of several kinds to strings, and to prompts for a tokenizer.

Knows .txt, .jsonl, .json and .parquet, plain or as .gz or .xz, and hub data sets; `rows.py` knows
what their rows hold. Imports neither torch nor transformers; a tokenizer is handed in where one is
needed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from spectool.data.rows import Row, read_row
from spectool.data.template import (
    ENDING,
    Template,
    encode,
    ends_of,
    has_template,
    takes_tools,
    write,
)
from spectool.errors import CheckpointError, TextError, require

BUILTIN = "built-in text"
# Of its kinds, the one that holds something of all of them.
MIXED = "mixed"
ROW_KINDS = (".jsonl", ".json", ".ndjson")
TEXT_KINDS = (".txt", ".md", ".py", ".raw", "")
HUB_PREFIX = "hub:"
# Characters of the first row that a run shows.
SHOWN = 80


@dataclass(slots=True)
class Reading:
    """What was read of a source: how many rows, which fields and as what, and how it begins."""

    source: str
    prompts: bool = False
    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    first: str = ""
    tools_left_out: bool = False

    def add(self, row: Row, written: str, tokenizer: Any) -> None:
        """Take a row and its text into account."""
        self.num_rows += 1
        self.first = self.first or written.strip()[:SHOWN]
        self.shapes[f"{row.fields} as {'text' if row.text is not None else 'a conversation'}"] += 1
        self.tools_left_out |= bool(row.tools) and not takes_tools(tokenizer)

    def __str__(self) -> str:
        shapes = [
            shape + (f" ({count})" if len(self.shapes) > 1 else "")
            for shape, count in self.shapes.items()
        ]
        what = f"{'prompt' if self.prompts else 'row'}{'s' * (self.num_rows != 1)}"
        line = f"{self.source}: {self.num_rows} {what}, {', '.join(shapes)}; the first begins "
        line += json.dumps(self.first, ensure_ascii=False)
        return line + "; tools left out: the chat template takes none" * self.tools_left_out

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "source": self.source,
            "rows": self.num_rows,
            "fields": dict(self.shapes),
            "begins": self.first,
        }


OnRead = Callable[[Reading], None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued: a text, or token ids of a conversation that its template wrote.

    `ends`: what ends an answer besides the model's own end of text, the template's end of turn.
    """

    given: str | list[int]
    category: str | None = None
    ends: frozenset[int] = frozenset()


def read_rows(source: str, *, field: str | None = None, prompts: bool = False) -> Iterator[Row]:
    """The records of a file or a hub data set (`hub:OWNER/NAME[:CONFIG][:SPLIT]`).

    A .txt file is one text; as a prompt file, one prompt a line. `rows.read_row` says what a row of
    named fields is taken for.

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
    on_read: OnRead = lambda reading: None,
) -> str:
    """All records of all sources as one text, parted by blank lines; the built-in text for none.

    Hub data sets are streamed and may not end: of each, no more records are asked for once it gave
    `max_characters`. Files are read whole. `on_read` hears of each source.

    Raises:
        TextError: as `read_rows`; or there is no text in them.
    """
    if not sources:
        return builtin_text()
    texts: list[str] = []
    for source in sources:
        most = max_characters if source.startswith(HUB_PREFIX) else None
        num_characters = 0
        reading = Reading(source)
        for row in read_rows(source, field=field):
            row = suited(row, tokenizer)
            texts.append(write(row, tokenizer, template=template))
            reading.add(row, texts[-1], tokenizer)
            # With the blank line after it: a stream of empty rows ends as well.
            num_characters += len(texts[-1]) + 2
            if most is not None and num_characters >= most:
                break
        on_read(reading)
    joined = "\n\n".join(texts)
    if not joined.strip():
        raise TextError(f"{', '.join(sources)}: holds no text")
    return joined


def builtin_text(kind: str | None = None) -> str:
    """The text that is used where none is given: all its kinds one after another, or one of them.

    `calibration/SOURCES.md` says where it comes from.
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
    on_read: OnRead = lambda reading: None,
) -> list[Prompt]:
    """The first `limit` prompts of a file; of these the first `per_category` of each category.

    A row that ends with an answer is a prompt up to there, unless `template` has one of `ENDING`.
    Conversations come back as token ids: the chat template writes its own special tokens, and
    encoding its text again would add the start token twice.

    Raises:
        TextError: as `read_rows`; or there is no prompt in it.
    """
    found: list[Prompt] = []
    seen: Counter[str | None] = Counter()
    ends: frozenset[int] | None = None
    reading = Reading(source, prompts=True)
    for row in itertools.islice(read_rows(source, field=field, prompts=True), limit):
        seen[row.category] += 1
        if per_category is not None and seen[row.category] > per_category:
            continue
        row = suited(row, tokenizer)
        if row.text is not None or not set(ENDING).intersection(template or ()):
            row = row.question()
        text = write(row, tokenizer, template=template, prompt=True)
        reading.add(row, text, tokenizer)
        if row.text is not None:
            found.append(Prompt(text, row.category))
            continue
        if ends is None:
            ends = ends_of(row, tokenizer, template)
        found.append(Prompt(encode(tokenizer, text), row.category, ends))
    if not found:
        raise TextError(f"{source}: holds no prompt")
    on_read(reading)
    return found


def suited(row: Row, tokenizer: Any) -> Row:
    """The row as the tokenizer can take it: a question and its answer need no chat template."""
    return row.joined() if row.joins and not has_template(tokenizer) else row


def check_ids(ids: Sequence[int], num_tokens: int, giver: str) -> None:
    """Compare token ids with the rows of a model's embedding.

    Raises:
        CheckpointError: `giver` gives ids that the model has not.
    """
    wrong = next((each for each in (max(ids, default=0), min(ids, default=0))
                  if not 0 <= each < num_tokens), None)  # fmt: skip
    if wrong is not None:
        raise CheckpointError(
            f"{giver} gives id {wrong}, but the model has only {num_tokens} tokens",
            hint="the tokenizer's files are another model's, or tokens were added to it and not to "
            "the embedding",
        )


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


def _read(
    source: str, records: Iterator[tuple[int, Any]], field: str | None, prompts: bool
) -> Iterator[Row]:
    for number, record in records:
        yield read_row(record, place=f"{source}:{number}", field=field, prompts=prompts)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Lines of JSON, or the elements of one list, or one object over several lines."""
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
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


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
