"""Texts with the target's features, computed at every step or stored once in files.

A store consists of shards of about a gigabyte: the tokens of their texts, concatenated, their loss
mask, and for each feature a row per token in the dtype in which the target computed it. The batches
in which a store is computed depend on the texts alone, not on the order of training, so that an
interrupted store ends with the same bytes.

Shapes: B texts of a batch, L tokens of each, N tokens of a shard, D width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spectool.checkpoint.artifact import ArtifactWriter, write_atomically
from spectool.checkpoint.checksums import Checksums
from spectool.checkpoint.headers import TensorEntry, read_header
from spectool.checkpoint.tensors import read_tensor
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample, by_length, join
from spectool.distill.data.store import read_store
from spectool.distill.data.texts import as_samples, as_tensors, chunk
from spectool.distill.processes import Processes
from spectool.distill.teacher import TextCache, read_extra_rows, read_features
from spectool.errors import UsageError
from spectool.report import Reporter
from spectool.training import TrainingBatch

FEATURES = "spectool_features.json"
FORMAT_VERSION = 1

_SHARD_BYTES = 1 << 30


class Texts(Protocol):
    """Samples, and training batches of them with features."""

    @property
    def samples(self) -> Sequence[Sample]:
        """Return all samples."""

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        """Make a batch with features; each row lists the indices of the samples packed into it."""


class OnlineTexts:
    """Texts whose features the target computes for every batch."""

    def __init__(self, target: AttentionTarget, needs: Needs, samples: Sequence[Sample]) -> None:
        self.target, self.needs, self.samples = target, needs, samples

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        tokens_BL, loss_mask_BL, segments_BL = _join_batch(self.samples, rows, self.target.device)
        cache = TextCache(self.target.num_layers) if self.needs.inject else None
        features = read_features(self.target, tokens_BL, self.needs, segments_BL, keep=cache)
        extra_rows = (
            None if cache is None else functools.partial(read_extra_rows, self.target, cache)
        )
        return TrainingBatch(
            tokens_BL=tokens_BL,
            loss_mask_BL=loss_mask_BL,
            features=features,
            segments_BL=segments_BL,
            extra_rows=extra_rows,
        )


class StoredTexts:
    """Texts whose features are read from shards; tokens and loss masks stay in memory."""

    def __init__(self, shards: Sequence[Path], needs: Needs, device: torch.device) -> None:
        self.device = device
        self.samples: list[Sample] = []
        # For each text, the feature tensors of its shard and the index of its first row in them.
        self._rows: list[tuple[dict[str, TensorEntry], int]] = []
        for path in shards:
            entries = {entry.name: entry for entry in read_header(path)[1]}
            features = {name: entries[name] for name in feature_names(needs)}
            texts = {name: read_tensor(entries[name]) for name in ("tokens", "taught", "lengths")}
            start = 0
            for sample in as_samples(texts):
                self.samples.append(sample)
                self._rows.append((features, start))
                start += len(sample.tokens)

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        tokens_BL, loss_mask_BL, segments_BL = _join_batch(self.samples, rows, self.device)
        feature_rows: dict[str, list[Tensor]] = {}
        for row in rows:
            texts = [self._features(i) for i in row]
            for name in texts[0]:
                feature_rows.setdefault(name, []).append(torch.cat([text[name] for text in texts]))
        features = {
            name: pad_sequence(each, batch_first=True).to(self.device)
            for name, each in feature_rows.items()
        }
        return TrainingBatch(
            tokens_BL=tokens_BL,
            loss_mask_BL=loss_mask_BL,
            features=features,
            segments_BL=segments_BL,
        )

    def _features(self, i: int) -> dict[str, Tensor]:
        """Read the features of one text."""
        features, start = self._rows[i]
        part = slice(start, start + len(self.samples[i].tokens))
        return {name: read_tensor(entry, rows=part) for name, entry in features.items()}


def store(
    writer: ArtifactWriter | None,
    processes: Processes,
    name: str,
    target: AttentionTarget,
    needs: Needs,
    samples: Sequence[Sample],
    *,
    pass_tokens: int,
    reporter: Reporter,
) -> StoredTexts:
    """Write the missing shards of these texts, one shard per process at a time.

    A pass of the target has at most `pass_tokens` tokens, padding included. Only the first process
    has a `writer`.
    """
    groups = list(_groups(samples, token_bytes(needs, target.width, target.dtype)))
    shards = [f"features-{name}-{number:05d}.safetensors" for number in range(len(groups))]
    present = [writer is not None and writer.report(shard) is not None for shard in shards]
    present = processes.share(present)
    directory = processes.share(None if writer is None else writer.partial)
    assert directory is not None
    missing = [number for number in range(len(groups)) if not present[number]]
    for count, numbers in enumerate(chunk(missing, processes.size), start=1):
        sums: Checksums | None = None
        with processes.together():
            for number in processes.part(numbers):
                group = groups[number]
                tensors = as_tensors(group) | _compute_features(target, needs, group, pass_tokens)
                sums = write_atomically(directory / shards[number], tensors, {})
        written = processes.gather(sums)
        with processes.together():
            for number, sums in zip(numbers, written, strict=False):
                if writer is not None and sums is not None:
                    writer.add_shard(shards[number], sums, {})
        done = len(groups) - len(missing) + min(len(missing), count * processes.size)
        reporter.progress(done, len(groups), f"shards of {name} features stored")
    return StoredTexts([directory / shard for shard in shards], needs, target.device)


def open_store(
    path: Path, key: dict[str, Any], needs: Needs, device: torch.device
) -> tuple[StoredTexts, StoredTexts] | None:
    """Open the training texts and the held-out texts of a store; None if it does not exist.

    Raises: see `check_store`.
    """
    shards = check_store(path, key, needs)
    if shards is None:
        return None
    train, held_out = (
        StoredTexts([path / shard for shard in shards if shard.startswith(kind)], needs, device)
        for kind in ("features-own-", "features-held-out-")
    )
    return train, held_out


def check_store(path: Path, key: dict[str, Any], needs: Needs) -> list[str] | None:
    """List the shards of a store in order, reading none; None if it does not exist.

    Raises:
        UsageError: `path` is not a store, or one of another target or other data.
        CheckpointError: the store's record is damaged.
    """
    record = read_store(path, FEATURES, key, "features")
    if record is None:
        return None
    if missing := set(feature_names(needs)) - set(record["features"]):
        raise UsageError(
            f"{path}: holds the features {', '.join(record['features'])}, not {min(missing)}, "
            "which these heads read",
            hint="name another directory",
        )
    return sorted(record["shards"])


def feature_names(needs: Needs) -> list[str]:
    """Return the names of the needed features, as in the result of `read_features`."""
    return [f"layer {index}" for index in needs.layers] + ["final"] * needs.final


def token_bytes(needs: Needs, width: int, dtype: torch.dtype) -> int:
    """Return the bytes on disk of a token and its features."""
    # 8 bytes of the token's id and 1 of its loss mask.
    return len(feature_names(needs)) * width * dtype.itemsize + 9


def _groups(samples: Sequence[Sample], row_bytes: int) -> Iterator[list[Sample]]:
    """Yield the texts of each shard, in order; a text larger than a shard has its own."""
    sizes = itertools.accumulate(len(sample.tokens) * row_bytes for sample in samples)
    pairs = zip(samples, sizes, strict=True)
    for _, group in itertools.groupby(pairs, lambda pair: (pair[1] - 1) // _SHARD_BYTES):
        yield [sample for sample, _ in group]


def _compute_features(
    target: AttentionTarget, needs: Needs, samples: Sequence[Sample], pass_tokens: int
) -> dict[str, Tensor]:
    """Compute the features [N, D] of all tokens of these texts, on the host."""
    starts = [0, *itertools.accumulate(len(sample.tokens) for sample in samples)]
    features: dict[str, Tensor] = {}
    for chosen in by_length(samples, range(len(samples)), pass_tokens):
        batch = OnlineTexts(target, needs, samples).batch([[i] for i in chosen])
        for name, value_BLD in batch.features.items():
            if name not in features:
                shape = (starts[-1], value_BLD.shape[-1])
                features[name] = torch.empty(shape, dtype=value_BLD.dtype)
            for row, i in enumerate(chosen):
                length = starts[i + 1] - starts[i]
                features[name][starts[i] : starts[i + 1]] = value_BLD[row, :length]
    return features


def _join_batch(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens_BL, loss_mask_BL, segments_BL = join([[samples[i] for i in row] for row in rows])
    segments_BL = None if segments_BL is None else segments_BL.to(device)
    return tokens_BL.to(device), loss_mask_BL.to(device), segments_BL
