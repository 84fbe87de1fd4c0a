"""Training text: token ids with a mark on those whose prediction is taught, and their batches.

Of a conversation the assistant's turns are taught, found through the chat template itself; of plain
text all tokens are. Knows no model.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectool.data.rows import Message, Row
from spectool.data.template import ANSWER, Template, encode, ends_of, render, write
from spectool.data.text import HUB_PREFIX, OnRead, Reading, read_rows, suited
from spectool.errors import TextError, UnsupportedError

# Fewer tokens than this teach nothing worth a row of a batch.
SHORTEST = 16

# Samples are sorted by length within groups of this many batches: little padding, much mixing.
_SORTED_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One text. `loss_mask[i]` says whether the prediction of `tokens[i]` counts.

    `given` of its first tokens stay as they are when the target writes the text anew. `messages`
    are what a conversation was made of, for a server that applies a template of its own; `ends`
    the tokens that end a turn in it.
    """

    tokens: list[int]
    loss_mask: list[bool]
    given: int = 0
    messages: tuple[Message, ...] = ()
    ends: frozenset[int] = frozenset()


def read_samples(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int,
    field: str | None = None,
    template: Template | None = None,
    max_tokens: int | None = None,
    on_read: OnRead = lambda reading: None,
) -> list[Sample]:
    """The samples of all sources, at most `seq_len` tokens each; what has nothing to teach is left.

    Plain text is cut into as many samples as it fills, each opened with the start token where the
    tokenizer has one; a conversation is one sample, cut at the end, and so is a question with its
    answer, of which only the answer is taught. A hub data set may not end: of
    each, no more is read once it gave `max_tokens`. `on_read` hears of each source.

    Raises:
        TextError: see `read_rows`; or nothing in the data is taught.
        UnsupportedError: conversations need a fast tokenizer.
    """
    samples: list[Sample] = []
    excluded: tuple[Row, str] | None = None
    ends: frozenset[int] | None = None
    for source in sources:
        most = max_tokens if source.startswith(HUB_PREFIX) else None
        num_tokens = 0
        reading = Reading(source)
        for row in read_rows(source, field=field):
            row = suited(row, tokenizer)
            text = write(row, tokenizer, template=template)
            reading.add(row, text, tokenizer)
            if ends is None and row.text is None:
                ends = ends_of(row, tokenizer, template)
            found = [
                replace(sample, ends=ends or frozenset())
                for sample in _samples(row, text, tokenizer, seq_len, template)
                if sum(sample.loss_mask) >= SHORTEST
            ]
            if not found and excluded is None and _has_answer(row):
                excluded = row, text
            samples += found
            num_tokens += sum(len(sample.tokens) for sample in found)
            if most is not None and num_tokens >= most:
                break
        on_read(reading)
    if len(samples) >= 2:
        return samples
    if excluded is not None and not any(_answers(*excluded, tokenizer, template)):
        raise TextError(
            f"{excluded[0].place}: the chat template writes the assistant's answer so that it "
            f"cannot be found; {len(samples)} samples with something to learn, at least 2 needed",
            hint="give the template what leaves answers whole with --template-arg (key=value), or "
            "name a field of plain text with --field",
        )
    raise TextError(
        f"{', '.join(sources)}: {len(samples)} samples with something to learn; at least 2 are "
        "needed, one to learn from and one to measure on",
        hint=f"a sample is a conversation with an assistant's answer, or {SHORTEST} tokens of text",
    )


def _samples(
    row: Row, text: str, tokenizer: Any, seq_len: int, template: Template | None
) -> Iterator[Sample]:
    """What a row's text makes: pieces, or one sample where only its answers are taught."""
    if row.text is None:
        yield _conversation(row, text, tokenizer, seq_len, template)
    elif row.answer:
        found = marked(tokenizer, text, [(row.answer, len(text))])
        opening = _opening(tokenizer)
        tokens, loss_mask = opening + found.tokens, [False] * len(opening) + found.loss_mask
        yield Sample(tokens[:seq_len], loss_mask[:seq_len])
    else:
        yield from _pieces(text, tokenizer, seq_len)


def _opening(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _pieces(text: str, tokenizer: Any, seq_len: int) -> Iterator[Sample]:
    tokens = encode(tokenizer, text)
    opening = _opening(tokenizer)
    inside = seq_len - len(opening)
    for start in range(0, len(tokens), inside):
        part = tokens[start : start + inside]
        marks = [False] * len(opening) + [True] * len(part)
        # Plain text has no question to answer: a quarter of it stands for one.
        yield Sample(opening + part, marks, given=len(opening) + len(part) // 4)


def _conversation(
    row: Row, whole: str, tokenizer: Any, seq_len: int, template: Template | None
) -> Sample:
    found = marked(tokenizer, whole, list(_answers(row, whole, tokenizer, template)))
    return Sample(
        found.tokens[:seq_len],
        found.loss_mask[:seq_len],
        messages=row.messages,
    )


def conversation(
    row: Row,
    tokenizer: Any,
    seq_len: int,
    template: Template | None,
    *,
    ended: bool = True,
) -> Sample:
    """A conversation cut to `seq_len` tokens, its answers taught.

    Not `ended`: the last answer was cut, so that the template's mark of its end must not follow.

    Raises:
        TextError: the template fails; or there is none.
        UnsupportedError: a slow tokenizer.
    """
    if ended:
        whole = render(row, tokenizer, template=template)
        return _conversation(row, whole, tokenizer, seq_len, template)
    before, last = replace(row, messages=row.messages[:-1]), row.messages[-1]
    asked = render(before, tokenizer, template=template, prompt=True)
    whole = asked + last["content"]
    spans = [*_answers(before, whole, tokenizer, template), (len(asked), len(whole))]
    found = marked(tokenizer, whole, spans)
    return Sample(found.tokens[:seq_len], found.loss_mask[:seq_len], messages=row.messages)


def marked(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Sample:
    """A text's tokens; those are taught that lie within one of the spans of characters.

    Raises:
        UnsupportedError: a slow tokenizer, which does not tell where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            "texts are masked by character positions, which this slow tokenizer does not tell",
            hint="render conversations yourself and name the field of plain text with --field",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    loss_mask = [
        any(a <= start and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]
    ]
    return Sample(encoded["input_ids"], loss_mask)


def _answers(
    row: Row, whole: str, tokenizer: Any, template: Template | None
) -> Iterator[tuple[int, int]]:
    """Where in the rendered conversation the assistant speaks, its end-of-turn mark included.

    An answer that the template writes later otherwise than when it was the last is left out: the
    model does not answer so. Of one that only loses its thought the rest is there.
    """

    def written(messages: Sequence[Message], *, prompt: bool = False) -> str:
        some = replace(row, messages=tuple(messages))
        return render(some, tokenizer, template=template, prompt=prompt)

    ways = [_by_prompt, _by_content]
    if "add_generation_prompt" not in str(tokenizer.chat_template):
        ways = [_by_content, _by_prompt]
    for turn, message in enumerate(row.messages):
        if message.get("role") != "assistant" or turn == 0:
            continue
        for way in ways:
            # A template may refuse a conversation that ends here.
            with contextlib.suppress(TextError):
                span = way(row.messages, turn, whole, written)
                if span is not None:
                    yield span
                    break


def _by_prompt(
    messages: Sequence[Message], turn: int, whole: str, written: Callable[..., str]
) -> tuple[int, int] | None:
    """The answer as what follows a rendering that asks for it; see `_answers`."""
    asked, answered = written(messages[:turn], prompt=True), written(messages[: turn + 1])
    if answered.startswith(asked) and whole.startswith(answered):
        return len(asked), len(answered)
    return None


def _by_content(
    messages: Sequence[Message], turn: int, whole: str, written: Callable[..., str]
) -> tuple[int, int] | None:
    """The answer as what changes with its content, or with what follows its thought.

    Prompts of reasoning models open a thought that the answer is later written without.
    """
    content = messages[turn]["content"]
    thought, mark, said = content.rpartition("</think>")
    for before, changed in [("", content), (thought + mark, said)][: 2 if mark else 1]:
        probe = [*messages[:turn], {**messages[turn], "content": before + ANSWER}]
        start, found, rest = written([*probe, *messages[turn + 1 :]]).partition(ANSWER)
        begin, end = len(start), len(whole) - len(rest)
        if not (found and begin <= end and whole.startswith(start) and whole.endswith(rest)):
            continue
        is_kept = whole[begin:end].strip() == changed.strip()
        if is_kept or whole.startswith(written(messages[: turn + 1])):
            closing = written(probe).partition(ANSWER)[2]
            return begin, end + (len(closing) if rest.startswith(closing) else 0)
    return None


def _has_answer(row: Row) -> bool:
    return any(m["role"] == "assistant" and m["content"].strip() for m in row.messages[1:])


def split(samples: Sequence[Sample], *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the samples to learn from, and of at most `held_out` to measure on.

    At least one is held out, and at most a fifth.
    """
    order = list(range(len(samples)))
    random.Random(f"{seed}/split").shuffle(order)
    count = max(1, min(held_out, len(samples) // 5))
    return sorted(order[count:]), sorted(order[:count])


def batches(
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    steps: int | None,
    epochs: int,
    seed: int,
) -> list[list[int]]:
    """The samples of every step: all of them once an epoch, padded to at most `batch_tokens`.

    A sample longer than that is a batch of its own. `steps` cuts or repeats; None: whole epochs.
    """
    found: list[list[int]] = []
    epoch = 0
    while (epoch < epochs) if steps is None else (len(found) < steps):
        chance = random.Random(f"{seed}/{epoch}")
        order = list(range(len(samples)))
        chance.shuffle(order)
        mean = sum(len(sample.tokens) for sample in samples) / len(samples)
        group = max(1, int(_SORTED_BATCHES * batch_tokens / mean))
        made: list[list[int]] = []
        for start in range(0, len(order), group):
            made += by_length(samples, order[start : start + group], batch_tokens)
        chance.shuffle(made)
        found += made
        epoch += 1
    return found[:steps]


def pack_sequences(
    samples: Sequence[Sample],
    *,
    width: int,
    batch_tokens: int,
    steps: int | None,
    epochs: int,
    seed: int,
) -> list[list[list[int]]]:
    """As `batches`, but rows of several samples, each row at most `width` tokens: steps of rows."""
    found: list[list[list[int]]] = []
    num_rows = max(1, batch_tokens // width)
    epoch = 0
    while (epoch < epochs) if steps is None else (len(found) < steps):
        chance = random.Random(f"{seed}/{epoch}")
        order = list(range(len(samples)))
        chance.shuffle(order)
        mean = sum(len(sample.tokens) for sample in samples) / len(samples)
        group = max(1, int(_SORTED_BATCHES * batch_tokens / mean))
        rows: list[list[int]] = []
        for start in range(0, len(order), group):
            rows += _fill(samples, order[start : start + group], width)
        chance.shuffle(rows)
        found += [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
        epoch += 1
    return found[:steps]


def _fill(samples: Sequence[Sample], chosen: Sequence[int], width: int) -> list[list[int]]:
    """Rows of the chosen samples: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(chosen, key=lambda i: -len(samples[i].tokens)):
        length = len(samples[index].tokens)
        place = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(index)
        room[place] -= length
    return rows


def by_length(
    samples: Sequence[Sample], chosen: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """The chosen samples from the shortest to the longest, so many together as may be."""
    made: list[list[int]] = [[]]
    for index in sorted(chosen, key=lambda i: len(samples[i].tokens)):
        # The last one is the longest, and sets the width.
        if made[-1] and (len(made[-1]) + 1) * len(samples[index].tokens) > batch_tokens:
            made.append([])
        made[-1].append(index)
    return made


def pad(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] and marks [B, L], padded at the right with zeros that are not taught."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens_BL = torch.zeros(len(samples), longest, dtype=torch.long)
    loss_mask_BL = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens_BL[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        loss_mask_BL[row, : len(sample.loss_mask)] = torch.tensor(sample.loss_mask)
    return tokens_BL, loss_mask_BL


def join(rows: Sequence[Sequence[Sample]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `pad`, for rows of several samples, whose numbers [B, L] come third: -1 is padding.

    None where every row is one sample.
    """
    joined = [
        Sample(
            [token for sample in row for token in sample.tokens],
            [mark for sample in row for mark in sample.loss_mask],
        )
        for row in rows
    ]
    tokens_BL, loss_mask_BL = pad(joined)
    if all(len(row) == 1 for row in rows):
        return tokens_BL, loss_mask_BL, None
    segments_BL = torch.full_like(tokens_BL, -1)
    for each_L, row in zip(segments_BL, rows, strict=True):
        lengths = torch.tensor([len(sample.tokens) for sample in row])
        numbers = torch.arange(len(row)).repeat_interleave(lengths)
        each_L[: len(numbers)] = numbers
    return tokens_BL, loss_mask_BL, segments_BL
