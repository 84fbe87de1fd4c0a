"""Training samples: token ids with a loss mask, and their batches. Knows no model.

In a conversation the assistant's turns are in the loss, located with the chat template itself; in
plain text all tokens are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from spectool.data.rows import Message, Row
from spectool.data.template import (
    ANSWER,
    Template,
    encode,
    find_stop_tokens,
    render,
    render_checked,
)
from spectool.data.text import HUB_PREFIX, Reading, join_without_template, read_rows
from spectool.distill.options import AcceptanceOptions, HeadsOptions, WeightsOptions
from spectool.errors import TextError, UnsupportedError
from spectool.report import SILENT, Reporter

# Samples with fewer tokens in the loss than this are dropped.
SHORTEST = 16

# Samples are sorted by length within groups of this many batches: little padding, still shuffled.
_SORTED_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """A text. `loss_mask[i]`: the prediction of `tokens[i]` is in the loss.

    `given`: number of first tokens that regeneration keeps as the prompt. `messages`: the
    conversation before its template was applied, for a server with a template of its own. `ends`:
    tokens that end a turn.
    """

    tokens: list[int]
    loss_mask: list[bool]
    given: int = 0
    messages: tuple[Message, ...] = ()
    ends: frozenset[int] = frozenset()


class HasTokens(Protocol):
    """Something of a length in tokens, to put into batches."""

    @property
    def tokens(self) -> list[int]: ...


def read_samples(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    seq_len: int,
    field: str | None = None,
    template: Template | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Sample]:
    """Read the samples of all sources, at most `seq_len` tokens each.

    Plain text is cut into samples, each with the start token first if the tokenizer has one; a
    conversation is one sample, cut at the end, and so is a question with its answer, of which only
    the answer is in the loss. Samples with less than SHORTEST tokens in the loss are dropped.
    Reading a hub data set, which may be endless, stops at `max_tokens`. The summary of each
    source is reported.

    Raises:
        TextError: see `read_rows`; or fewer than two samples remain.
        UnsupportedError: conversations with a slow tokenizer.
    """
    samples: list[Sample] = []
    excluded: tuple[Row, str] | None = None
    ends: frozenset[int] | None = None
    for source in sources:
        most = max_tokens if source.startswith(HUB_PREFIX) else None
        num_tokens = 0
        reading = Reading(source)
        for row in read_rows(source, field=field):
            row = join_without_template(row, tokenizer)
            text = render_checked(row, tokenizer, template=template)
            reading.add(row, text, tokenizer)
            if ends is None and row.text is None:
                ends = find_stop_tokens(row, tokenizer, template)
            made = [
                replace(sample, ends=ends or frozenset())
                for sample in _make_samples(row, text, tokenizer, seq_len, template)
                if sum(sample.loss_mask) >= SHORTEST
            ]
            if not made and excluded is None and _has_answer(row):
                excluded = row, text
            samples += made
            num_tokens += sum(len(sample.tokens) for sample in made)
            if most is not None and num_tokens >= most:
                break
        reporter.event(reading)
    if len(samples) >= 2:
        return samples
    if excluded is not None and not any(_find_answers(*excluded, tokenizer, template)):
        raise TextError(
            f"{excluded[0].place}: the assistant's answer cannot be located in the output of the "
            f"chat template; {len(samples)} samples with tokens in the loss, at least 2 needed",
            hint="set template arguments that leave answers unchanged with --template-arg "
            "(key=value), or name a field of plain text with --field",
        )
    raise TextError(
        f"{', '.join(sources)}: {len(samples)} samples with tokens in the loss; at least 2 are "
        "needed, one to train on and one to evaluate on",
        hint=f"a sample is a conversation with an assistant's answer, or {SHORTEST} tokens of text",
    )


def read_corpus(
    job: HeadsOptions | AcceptanceOptions | WeightsOptions,
    tokenizer: Any,
    seq_len: int,
    reporter: Reporter,
) -> list[Sample]:
    """Read the samples of a training; see `read_samples`."""
    return read_samples(
        job.data,
        tokenizer,
        seq_len=seq_len,
        field=job.field,
        template=job.template or None,
        # Twice the tokens of all steps: a part is held out, and steps should differ.
        max_tokens=None if job.steps is None else 2 * (job.steps + 1) * job.batch_tokens,
        reporter=reporter,
    )


def _make_samples(
    row: Row, text: str, tokenizer: Any, seq_len: int, template: Template | None
) -> Iterator[Sample]:
    """Yield the samples of a row: pieces of plain text, or one sample with answers in the loss."""
    if row.text is None:
        yield _conversation(row, text, tokenizer, seq_len, template)
    elif row.answer:
        masked = mask_spans(tokenizer, text, [(row.answer, len(text))])
        start = _start_tokens(tokenizer)
        tokens, loss_mask = start + masked.tokens, [False] * len(start) + masked.loss_mask
        yield Sample(tokens[:seq_len], loss_mask[:seq_len])
    else:
        yield from _cut_text(text, tokenizer, seq_len)


def _start_tokens(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _cut_text(text: str, tokenizer: Any, seq_len: int) -> Iterator[Sample]:
    tokens = encode(tokenizer, text)
    opening = _start_tokens(tokenizer)
    inside = seq_len - len(opening)
    for start in range(0, len(tokens), inside):
        part = tokens[start : start + inside]
        marks = [False] * len(opening) + [True] * len(part)
        # Plain text has no question: its first quarter serves as the prompt of a regeneration.
        yield Sample(opening + part, marks, given=len(opening) + len(part) // 4)


def _conversation(
    row: Row, whole: str, tokenizer: Any, seq_len: int, template: Template | None
) -> Sample:
    masked = mask_spans(tokenizer, whole, list(_find_answers(row, whole, tokenizer, template)))
    return Sample(masked.tokens[:seq_len], masked.loss_mask[:seq_len], messages=row.messages)


def mask_conversation(
    row: Row,
    tokenizer: Any,
    seq_len: int,
    template: Template | None,
    *,
    ended: bool = True,
) -> Sample:
    """Make the sample of a conversation, cut to `seq_len` tokens, with its answers in the loss.

    `ended` False: the last answer was cut off, so no end-of-turn token may follow it.

    Raises:
        TextError: the template fails, or the tokenizer has none.
        UnsupportedError: the tokenizer is slow.
    """
    if ended:
        whole = render(row, tokenizer, template=template)
        return _conversation(row, whole, tokenizer, seq_len, template)
    before, last = replace(row, messages=row.messages[:-1]), row.messages[-1]
    asked = render(before, tokenizer, template=template, prompt=True)
    whole = asked + last["content"]
    spans = [*_find_answers(before, whole, tokenizer, template), (len(asked), len(whole))]
    masked = mask_spans(tokenizer, whole, spans)
    return Sample(masked.tokens[:seq_len], masked.loss_mask[:seq_len], messages=row.messages)


def mask_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Sample:
    """Tokenize a text; tokens within one of the spans of characters are in the loss.

    Raises:
        UnsupportedError: the tokenizer is slow and gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            "texts are masked by character offsets, which this slow tokenizer does not give",
            hint="render conversations yourself and name the field of plain text with --field",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    loss_mask = [
        any(a <= start and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]
    ]
    return Sample(encoded["input_ids"], loss_mask)


def _find_answers(
    row: Row, whole: str, tokenizer: Any, template: Template | None
) -> Iterator[tuple[int, int]]:
    """Yield the spans of the assistant's answers in a rendered conversation, end of turn included.

    An answer that the template changes once further turns follow is left out, since the model does
    not generate it so. If only its reasoning is removed, the rest of the answer is kept.
    """

    def render_messages(messages: Sequence[Message], *, prompt: bool = False) -> str:
        some = replace(row, messages=tuple(messages))
        return render(some, tokenizer, template=template, prompt=prompt)

    finders = [_find_by_prompt, _find_by_content]
    if "add_generation_prompt" not in str(tokenizer.chat_template):
        finders = [_find_by_content, _find_by_prompt]
    for turn, message in enumerate(row.messages):
        if message.get("role") != "assistant" or turn == 0:
            continue
        for find in finders:
            # A template may refuse a conversation that ends here.
            with contextlib.suppress(TextError):
                span = find(row.messages, turn, whole, render_messages)
                if span is not None:
                    yield span
                    break


def _find_by_prompt(
    messages: Sequence[Message], turn: int, whole: str, render_messages: Callable[..., str]
) -> tuple[int, int] | None:
    """Find an answer as the text after the generation prompt."""
    asked = render_messages(messages[:turn], prompt=True)
    answered = render_messages(messages[: turn + 1])
    if answered.startswith(asked) and whole.startswith(answered):
        return len(asked), len(answered)
    return None


def _find_by_content(
    messages: Sequence[Message], turn: int, whole: str, render_messages: Callable[..., str]
) -> tuple[int, int] | None:
    """Find an answer as the text that changes with its content.

    For an answer with reasoning, also as the text that changes with the content after it:
    templates of reasoning models open the reasoning in the prompt and drop it from later turns.
    """
    content = messages[turn]["content"]
    reasoning, mark, reply = content.rpartition("</think>")
    for before, changed in [("", content), (reasoning + mark, reply)][: 2 if mark else 1]:
        probe = [*messages[:turn], {**messages[turn], "content": before + ANSWER}]
        start, found, rest = render_messages([*probe, *messages[turn + 1 :]]).partition(ANSWER)
        begin, end = len(start), len(whole) - len(rest)
        if not (found and begin <= end and whole.startswith(start) and whole.endswith(rest)):
            continue
        is_kept = whole[begin:end].strip() == changed.strip()
        if is_kept or whole.startswith(render_messages(messages[: turn + 1])):
            closing = render_messages(probe).partition(ANSWER)[2]
            return begin, end + (len(closing) if rest.startswith(closing) else 0)
    return None


def _has_answer(row: Row) -> bool:
    return any(m["role"] == "assistant" and m["content"].strip() for m in row.messages[1:])


def split(samples: Sequence[Any], *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Split samples into indices to train on and at most `held_out` indices to evaluate on.

    At least one sample is held out, and at most a fifth.
    """
    order = list(range(len(samples)))
    random.Random(f"{seed}/split").shuffle(order)
    count = max(1, min(held_out, len(samples) // 5))
    return sorted(order[count:]), sorted(order[:count])


def batches(
    samples: Sequence[HasTokens],
    *,
    batch_tokens: int,
    steps: int | None,
    epochs: int,
    seed: int,
) -> list[list[int]]:
    """Group samples into batches of at most `batch_tokens` tokens, padding included.

    A longer sample is a batch by itself. Each epoch has every sample once; with `steps`, epochs are
    repeated and cut to that number of batches.
    """
    fill = functools.partial(by_length, samples, batch_tokens=batch_tokens)
    made = _shuffle_epochs(samples, fill, batch_tokens, epochs if steps is None else None, seed)
    return list(itertools.islice(itertools.chain.from_iterable(made), steps))


def pack_sequences(
    samples: Sequence[HasTokens],
    *,
    width: int,
    batch_tokens: int,
    steps: int | None,
    epochs: int,
    seed: int,
) -> list[list[list[int]]]:
    """Group samples into batches as `batches` does, but with several samples in each row.

    A row has at most `width` tokens. Returns the sample indices by step and row.
    """
    num_rows = max(1, batch_tokens // width)
    fill = functools.partial(_fill, samples, width=width)
    made = _shuffle_epochs(samples, fill, batch_tokens, epochs if steps is None else None, seed)
    found = (rows[at : at + num_rows] for rows in made for at in range(0, len(rows), num_rows))
    return list(itertools.islice(found, steps))


def _shuffle_epochs(
    samples: Sequence[HasTokens],
    fill: Callable[[Sequence[int]], list[list[int]]],
    batch_tokens: int,
    epochs: int | None,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yield the shuffled groups that `fill` makes in each epoch; without `epochs` endlessly."""
    mean = sum(len(sample.tokens) for sample in samples) / len(samples)
    group = max(1, int(_SORTED_BATCHES * batch_tokens / mean))
    for epoch in itertools.count() if epochs is None else range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(samples)))
        rng.shuffle(order)
        made: list[list[int]] = []
        for start in range(0, len(order), group):
            made += fill(order[start : start + group])
        rng.shuffle(made)
        yield made


def _fill(samples: Sequence[HasTokens], chosen: Sequence[int], width: int) -> list[list[int]]:
    """Pack the chosen samples into rows: longest first, each into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(chosen, key=lambda i: -len(samples[i].tokens)):
        length = len(samples[index].tokens)
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= length
    return rows


def by_length(
    samples: Sequence[HasTokens], chosen: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Group the chosen samples by length into batches as large as `batch_tokens` allows."""
    made: list[list[int]] = [[]]
    for index in sorted(chosen, key=lambda i: len(samples[i].tokens)):
        # This sample is the longest so far, so its length is the batch's width.
        if made[-1] and (len(made[-1]) + 1) * len(samples[index].tokens) > batch_tokens:
            made.append([])
        made[-1].append(index)
    return made


def pad(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return tokens [B, L] and loss mask [B, L], padded on the right and masked out there."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens_BL = torch.zeros(len(samples), longest, dtype=torch.long)
    loss_mask_BL = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        tokens_BL[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        loss_mask_BL[row, : len(sample.loss_mask)] = torch.tensor(sample.loss_mask)
    return tokens_BL, loss_mask_BL


def join(rows: Sequence[Sequence[Sample]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Concatenate the samples of each row and pad the rows.

    Returns tokens, loss mask and segments [B, L], the index in its row of each token's sample, -1
    for padding; None instead of segments if every row is one sample.
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
