"""Protocols of perplexity: how a text becomes the windows of tokens that are scored.

`text` takes the text as it is. `documents` takes each document by itself, with the token that ends
it. The other two are those of published tables, so that figures can be compared with them; both are
the data loaders that the scripts of GPTQ (Frantar et al., 2023) brought into use, with the
tokenizer's own special tokens at the start of what is encoded.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from spectool.data.template import encode
from spectool.data.text import MIXED, builtin_text, read_documents
from spectool.data.windows import Windows, cut
from spectool.errors import TextError, UsageError
from spectool.evaluate.options import EvalOptions
from spectool.report import SILENT, Reporter

# Windows of the protocol `c4`.
C4_WINDOWS = 256


def make_windows(
    options: EvalOptions,
    tokenizer: Any,
    context: int,
    *,
    end: int | None = None,
    reporter: Reporter = SILENT,
) -> Windows:
    """Cut the texts into windows; `end` is the id that ends a text of `documents`.

    Raises:
        InputError: an option does not fit the model or the protocol, or the text is too short.
    """
    length = options.window or min(context, 2048)
    if length > context:
        raise UsageError(f"--window {length}: the model's context is {context}")
    if options.bos and tokenizer.bos_token_id is None:
        raise UsageError("--bos: the tokenizer has no BOS token")
    if options.protocol != "text":
        _check_options(options)
    documents = [builtin_text(MIXED)]
    if options.text:
        documents = read_documents(
            options.text,
            tokenizer,
            field=options.field,
            template=options.template or None,
            max_characters=options.limit,
            reporter=reporter,
        )
    if options.protocol == "c4":
        return _c4(documents, tokenizer, length)
    if options.protocol == "wikitext2":
        return _wikitext2(documents, tokenizer, length)
    bos = tokenizer.bos_token_id if options.bos else None
    if options.protocol == "documents":
        return _documents(documents, tokenizer, length, bos, end, options.limit)
    ids = encode(tokenizer, "\n\n".join(documents)[: options.limit])
    return cut(ids, length=length, bos=bos, stride=options.stride)


def _check_options(options: EvalOptions) -> None:
    """Raise a UsageError for an option that a protocol does not have, and for one that lacks."""
    absent = ("stride",) if options.protocol == "documents" else ("bos", "stride", "limit")
    for name in absent:
        if getattr(options, name):
            raise UsageError(f"--protocol {options.protocol} has no --{name}; leave it out")
    if not options.text:
        raise UsageError(f"--protocol {options.protocol} needs its text: --text FILE")


def _documents(
    documents: Sequence[str],
    tokenizer: Any,
    length: int,
    bos: int | None,
    end: int | None,
    limit: int | None,
) -> Windows:
    """Make a window of the start of each document, those of one length in one group.

    The token that ends a text follows it, and is scored where the window has room for it. With a
    limit of characters, the documents that it holds whole are taken.
    """
    if limit is not None:
        sizes = list(itertools.accumulate(map(len, documents)))
        documents = documents[: bisect.bisect_right(sizes, limit)]
        if not documents:
            raise TextError(f"--limit {limit}: the first document has {sizes[0]} characters")
    start, last = [] if bos is None else [bos], [] if end is None else [end]
    rows: dict[int, list[list[int]]] = defaultdict(list)
    for text in documents:
        row = [*start, *encode(tokenizer, text), *last][:length]
        # Of a single token nothing can be scored.
        if len(row) > 1:
            rows[len(row)].append(row)
    if not rows:
        raise TextError("no document has a token that can be scored")
    groups = tuple(torch.tensor(rows[size]) for size in sorted(rows, reverse=True))
    return Windows(groups, length, bos, protocol="documents")


def _wikitext2(documents: Sequence[str], tokenizer: Any, length: int) -> Windows:
    """Join the lines by blank lines, encode them as one text and cut it without overlap.

    The lines are the rows of the data set: with their newline, and empty where they are blank.
    """
    lines = [line for text in documents for line in re.findall(r"[^\n]*\n|[^\n]+", text) or [""]]
    text = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return cut(ids, length=length, bos=None, protocol="wikitext2")


def _c4(documents: Sequence[str], tokenizer: Any, length: int) -> Windows:
    """Draw windows from random places of random documents longer than a window, by seed 0."""
    draw = random.Random(0)
    encoded: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    while len(rows) < C4_WINDOWS:
        index = draw.randint(0, len(documents) - 1)
        if index not in encoded:
            encoded[index] = tokenizer(documents[index], verbose=False)["input_ids"]
        ids = encoded[index]
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        elif len(encoded) == len(documents) and not rows:
            raise TextError(
                f"no document has more tokens than a window of {length}",
                hint="give longer documents, or a smaller --window",
            )
    return Windows((torch.tensor(rows),), length, None, protocol="c4")
