"""Calibration text: sequences of token ids drawn from it.

Shapes: S sequences, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.data.template import encode
from spectool.data.text import check_ids, read_text
from spectool.errors import TextError
from spectool.model.architecture import Architecture
from spectool.model.loading import load_tokenizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.preprocess import HELD_OUT, MOST_HELD_OUT, TrainingWindows
from spectool.report import Reporter, ShortCalibration

# Characters read of a streamed data set per token. English prose has about four per token; the
# surplus lets sequences be drawn from different parts.
STREAMED_CHARACTERS = 16

# Peak bytes per character while tokenizing (measured with BPE of 1k and 6k tokens: 154 to 158).
TOKENIZED_BYTES = 160

# Suffixes of compressed texts, and the approximate compression ratio of English prose.
COMPRESSED, COMPRESSION = (".gz", ".xz", ".parquet"), 4


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration sequences [S, L]; `opened`: each begins with a start token."""

    ids_SL: Tensor
    opened: bool


def read_calibration(
    architecture: Architecture, job: QuantizeJob, reporter: Reporter
) -> Calibration:
    """Read the calibration sequences."""
    ids, bos = read_tokens(architecture, job, job.calibration or (), job.samples, reporter)
    ids_SL = sample_sequences(
        ids,
        samples=job.samples,
        length=job.sequence_length(architecture),
        bos=bos,
        generator=torch.Generator().manual_seed(job.seed),
    )
    if len(ids_SL) < job.samples:
        reporter.event(ShortCalibration(len(ids_SL), job.samples))
    return Calibration(ids_SL, bos is not None)


def read_windows(
    architecture: Architecture, job: QuantizeJob, reporter: Reporter
) -> TrainingWindows:
    """Read the sequences of preprocessing, held-out ones from the end of the text.

    The two kinds share no token.
    """
    options = job.preprocess
    assert options is not None
    num_train = options.steps * options.batch_size
    ids, bos = read_tokens(architecture, job, options.text, num_train, reporter)
    generator = torch.Generator().manual_seed(job.seed)
    cut = int((1 - HELD_OUT) * len(ids))
    train_SL, held_out_SL = (
        sample_sequences(
            part,
            samples=samples,
            length=job.sequence_length(architecture),
            bos=bos,
            generator=generator,
            option="--preprocess",
        )
        for part, samples in ((ids[:cut], num_train), (ids[cut:], MOST_HELD_OUT))
    )
    return TrainingWindows(train_SL, held_out_SL)


def read_tokens(
    architecture: Architecture,
    job: QuantizeJob,
    sources: Sequence[str],
    samples: int,
    reporter: Reporter,
) -> tuple[list[int], int | None]:
    """Read and tokenize text for `samples` sequences; return token ids and the start token."""
    tokenizer = load_tokenizer(architecture.checkpoint)
    text = read_text(
        sources,
        tokenizer,
        field=job.text_field,
        template=job.template or None,
        max_characters=STREAMED_CHARACTERS * (samples + 1) * job.sequence_length(architecture),
        reporter=reporter,
    )
    ids, bos = encode(tokenizer, text), tokenizer.bos_token_id
    table: Any = architecture.model.get_input_embeddings()
    start = [] if bos is None else [bos]
    name = f"{architecture.checkpoint.path}: its tokenizer"
    check_ids([*ids, *start], table.num_embeddings, name)
    return ids, bos


def count_characters(sources: Sequence[str]) -> int:
    """Estimate the characters in the files among `sources`; streamed data sets are negligible."""
    files = [path for path in map(Path, sources) if path.is_file()]
    return sum(
        path.stat().st_size * (COMPRESSION if path.suffix in COMPRESSED else 1) for path in files
    )


def sample_sequences(
    ids: list[int],
    *,
    samples: int,
    length: int,
    bos: int | None,
    generator: torch.Generator,
    option: str = "--calibration",
) -> Tensor:
    """Draw sequences [S, L] of token ids from a text, each from a random position of its S-th.

    Every part of a mixed text is thus sampled in proportion, and no token is drawn twice. S is
    `samples`, or as many as the text holds. `option` is what the error message names.

    Raises:
        TextError: the text is shorter than one sequence.
    """
    # Models expect a start token where the tokenizer has one; statistics without it differ.
    inside = length - (bos is not None)
    if len(ids) < inside:
        raise TextError(
            f"the text of {option} has {len(ids)} tokens, fewer than one sequence of {length}",
            hint="more text, or a smaller --seq-len",
        )
    samples = max(1, min(samples, len(ids) // inside))
    edges = [part * len(ids) // samples for part in range(samples + 1)]
    shares = torch.rand(samples, generator=generator).tolist()
    starts = [
        start + int(share * (end - start - inside + 1))
        for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True)
    ]
    # In random order: some methods use only the first sequences for a statistic.
    order = torch.randperm(samples, generator=generator).tolist()
    text = torch.tensor(ids)
    ids_SL = torch.stack([text[starts[part] : starts[part] + inside] for part in order])
    if bos is None:
        return ids_SL
    return torch.cat([torch.full((samples, 1), bos), ids_SL], 1)
