"""Items of a suite: one JSON object a line, checked as they are read.

| field | |
|---|---|
| `id` | unique |
| `dimension` | any name; `utility` is plain skill, with its own threshold |
| `task` | `choice`: the likeliest of `options` is the answer; `generate`: a reply is written |
| `prompt` or `messages` | a text, or a conversation for the chat template |
| `options`, `gold` | answers as they follow the prompt, and the index of the right one (from 0) |
| `secret` | of `generate`: a text of the prompt that the reply must not hold |
| `group` | of `choice` with two options: whom the item is about; the first option is favourable |
| `perturbation_of` | the id of the item that this one varies: both are resampled together |

A reply of an item with `options` must begin with one of them; one with neither `options` nor
`secret` needs a scorer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from spectool.checkpoint.tensors import hash_json
from spectool.errors import TextError

SMOKE = "smoke"
Task = Literal["choice", "generate"]

_STRINGS = ("id", "dimension", "task", "prompt", "group", "secret", "perturbation_of")
_FIELDS = (*_STRINGS, "messages", "options", "gold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item; see the module. `place`: its file and line."""

    id: str
    dimension: str
    task: Task
    place: str
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    options: tuple[str, ...] = ()
    gold: int | None = None
    group: str | None = None
    secret: str | None = None
    perturbation_of: str | None = None


# Without slots, so that the parts are computed once.
@dataclass(frozen=True, kw_only=True)
class Suite:
    """Items of one or more files, in their order. `digest` does not depend on the order."""

    name: str
    items: tuple[Item, ...]
    digest: str

    @cached_property
    def dimensions(self) -> dict[str, list[Item]]:
        """The items by dimension."""
        found: dict[str, list[Item]] = {}
        for item in self.items:
            found.setdefault(item.dimension, []).append(item)
        return found

    @cached_property
    def roots(self) -> dict[str, str]:
        """The item that each item varies in the end, by id; itself if it varies none."""
        above = {item.id: item.perturbation_of for item in self.items}
        roots = {}
        for name in above:
            root = name
            while (parent := above[root]) is not None:
                root = parent
            roots[name] = root
        return roots


def read_suite(sources: Sequence[str]) -> Suite:
    """Read files and directories of `.jsonl` files; without any, the smoke suite.

    Raises:
        TextError: a file is missing or empty, or an item is wrong; the message has its line.
    """
    records: list[dict[str, Any]] = []
    items: dict[str, Item] = {}
    for place, line in _lines(sources):
        record, item = _read(place, line)
        if item.id in items:
            raise TextError(f"{place}: id {item.id!r} is that of {items[item.id].place} too")
        items[item.id] = item
        records.append(record)
    _check_together(items)
    records.sort(key=lambda record: str(record["id"]))
    name = ", ".join(Path(source).name for source in sources) or SMOKE
    return Suite(name=name, items=tuple(items.values()), digest=hash_json(records))


def _lines(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not empty, each with its place."""
    smoke = resources.files("spectool.evaluate").joinpath("audit", SMOKE)
    for folder in [Path(source) for source in sources] or [Path(str(smoke))]:
        files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
        if not files:
            raise TextError(f"{folder}: holds no .jsonl file")
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise TextError(f"{file}: cannot be read: {error}") from error
            if not any(map(str.strip, lines)):
                raise TextError(f"{file}: holds no item")
            yield from (
                (f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()
            )


def _read(place: str, line: str) -> tuple[dict[str, Any], Item]:
    """Return the record of a line, and the item that it describes."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise TextError(f"{place}: expected an object")
    if unknown := sorted(record.keys() - set(_FIELDS)):
        raise TextError(f"{place}: unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    for name in ("id", "dimension", "task"):
        if not record.get(name):
            raise TextError(f"{place}: has no {name}")
    for name in _STRINGS:
        if not isinstance(record.get(name, ""), str):
            raise TextError(f"{place}: {name} is no text")
    if record["task"] not in get_args(Task):
        raise TextError(f"{place}: task {record['task']!r}; expected choice or generate")
    if ("prompt" in record) == ("messages" in record):
        raise TextError(f"{place}: expected either prompt or messages")
    options, messages = record.get("options", []), record.get("messages", [])
    if not _are(options, str) or len(set(options)) != len(options) or "" in options:
        raise TextError(f"{place}: options are no list of different texts")
    if not _are(messages, dict) or any({"role", "content"} - each.keys() for each in messages):
        raise TextError(f"{place}: messages are no list of objects with role and content")
    item = Item(**{**record, "options": tuple(options), "messages": tuple(messages)}, place=place)
    _check(item)
    return record, item


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check(item: Item) -> None:
    """Raise TextError if fields of an item do not fit together."""
    place, options, gold = item.place, item.options, item.gold
    if item.task == "choice" and len(options) < 2:
        raise TextError(f"{place}: task choice needs two options or more")
    if options and (type(gold) is not int or not 0 <= gold < len(options)):
        raise TextError(f"{place}: gold {gold!r}; expected the index of an option, from 0")
    if not options and gold is not None:
        raise TextError(f"{place}: gold without options")
    if item.secret is not None and (item.task == "choice" or options):
        raise TextError(f"{place}: secret is for task generate without options")
    if item.secret is not None and not normalize(item.secret):
        raise TextError(f"{place}: secret has no letter or digit")
    if item.group is not None and (item.task != "choice" or len(options) != 2):
        raise TextError(f"{place}: group is for task choice with two options")
    if item.task == "generate" and not item.prompt and not item.messages:
        raise TextError(f"{place}: task generate needs a prompt that is not empty")


def _check_together(items: dict[str, Item]) -> None:
    """Raise TextError if an item does not fit the others."""
    groups: dict[str, set[str | None]] = {}
    for item in items.values():
        groups.setdefault(item.dimension, set()).add(item.group)
        seen, parent = {item.id}, item.perturbation_of
        while parent is not None:
            if parent not in items:
                raise TextError(f"{item.place}: perturbation_of {parent!r}: there is no such item")
            if parent in seen:
                raise TextError(f"{item.place}: perturbation_of leads back to {parent!r}")
            seen.add(parent)
            parent = items[parent].perturbation_of
    for dimension, found in groups.items():
        if found != {None} and (None in found or len(found) < 2):
            raise TextError(
                f"dimension {dimension}: either all items have a group, of two or more, or none"
            )


def normalize(text: str) -> str:
    """Return the letters and digits of a text in lower case."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())
