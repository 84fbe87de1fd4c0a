"""Texts with the target's features of them: read each time, or stored once and read from files.

A store is one or more shards of about a gigabyte: the tokens of their texts, one after the other,
the marks of those that are taught, and a row of each feature a token, in the dtype in which the
target computed it. What is read together depends on the texts alone, not on the order in which they
are taught, so a store that was interrupted ends with the same bytes.

Shapes: B texts of a batch, L tokens of each, N tokens of a shard, D width.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spectool.checkpoint.artifact import ArtifactWriter, write_whole
from spectool.checkpoint.checksums import Checksums
from spectool.checkpoint.headers import TensorEntry, read_header, read_json
from spectool.checkpoint.tensors import read_tensor
from spectool.decode.cache import TextCache
from spectool.decode.protocol import Needs, TrainingBatch
from spectool.decode.target import Target
from spectool.distill.data.samples import Sample, by_length, join
from spectool.distill.data.texts import Say, as_samples, as_tensors, parts
from spectool.distill.processes import Processes
from spectool.errors import UsageError

FEATURES = "spectool_features.json"
FORMAT_VERSION = 1

_SHARD_BYTES = 1 << 30


class Texts(Protocol):
    """Samples, and lessons of any of them."""

    @property
    def samples(self) -> Sequence[Sample]:
        """All of them."""

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        """A batch of rows, of one of them each or of several, with features."""


class Read:
    """Texts that the target reads whenever they are taught."""

    def __init__(self, target: Target, needs: Needs, samples: Sequence[Sample]) -> None:
        self.target, self.needs, self.samples = target, needs, samples

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        tokens_BL, loss_mask_BL, segments_BL = _joined(self.samples, rows, self.target.device)
        kept = TextCache(self.target.num_layers) if self.needs.inject else None
        features = self.target.read(tokens_BL, self.needs, segments_BL, keep=kept)
        beside = None if kept is None else functools.partial(self.target.read_extra_rows, kept)
        return TrainingBatch(
            tokens_BL=tokens_BL,
            loss_mask_BL=loss_mask_BL,
            features=features,
            segments_BL=segments_BL,
            beside=beside,
        )


class Stored:
    """Texts whose features lie in shards. Of these, all but the features is kept in memory."""

    def __init__(self, shards: Sequence[Path], needs: Needs, device: torch.device) -> None:
        self.device = device
        self.samples: list[Sample] = []
        # Of each text, its shard's features and the place of its first row in them.
        self._places: list[tuple[dict[str, TensorEntry], int]] = []
        for path in shards:
            entries = {entry.name: entry for entry in read_header(path)[1]}
            features = {name: entries[name] for name in names_of(needs)}
            texts = {name: read_tensor(entries[name]) for name in ("tokens", "taught", "lengths")}
            start = 0
            for sample in as_samples(texts):
                self.samples.append(sample)
                self._places.append((features, start))
                start += len(sample.tokens)

    def batch(self, rows: Sequence[Sequence[int]]) -> TrainingBatch:
        tokens_BL, loss_mask_BL, segments_BL = _joined(self.samples, rows, self.device)
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            texts = [self._features(i) for i in row]
            for name in texts[0]:
                found.setdefault(name, []).append(torch.cat([text[name] for text in texts]))
        features = {
            name: pad_sequence(each, batch_first=True).to(self.device)
            for name, each in found.items()
        }
        return TrainingBatch(
            tokens_BL=tokens_BL,
            loss_mask_BL=loss_mask_BL,
            features=features,
            segments_BL=segments_BL,
        )

    def _features(self, i: int) -> dict[str, Tensor]:
        features, start = self._places[i]
        part = slice(start, start + len(self.samples[i].tokens))
        return {name: read_tensor(entry, rows=part) for name, entry in features.items()}


def store(
    writer: ArtifactWriter | None,
    processes: Processes,
    name: str,
    target: Target,
    needs: Needs,
    samples: Sequence[Sample],
    *,
    pass_tokens: int,
    say: Say,
) -> Stored:
    """Write the shards of these texts that are not there yet, a shard a process at a time.

    The target reads at most `pass_tokens` at once, padding included. The first process has the
    `writer`.
    """
    groups = list(_groups(samples, _row_bytes(needs, target.width, target.dtype)))
    shards = [f"features-{name}-{number:05d}.safetensors" for number in range(len(groups))]
    there = [writer is not None and writer.report(shard) is not None for shard in shards]
    there = processes.share(there)
    place = processes.share(None if writer is None else writer.partial)
    assert place is not None
    missing = [number for number in range(len(groups)) if not there[number]]
    for count, numbers in enumerate(parts(missing, processes.size), start=1):
        sums: Checksums | None = None
        with processes.together():
            for number in processes.part(numbers):
                group = groups[number]
                tensors = as_tensors(group) | _read(target, needs, group, pass_tokens)
                sums = write_whole(place / shards[number], tensors, {})
        written = processes.gather(sums)
        with processes.together():
            for number, sums in zip(numbers, written, strict=False):
                if writer is not None and sums is not None:
                    writer.adopt(shards[number], sums, {})
        done = len(groups) - len(missing) + min(len(missing), count * processes.size)
        say(f"{name} features stored: {done}/{len(groups)} shards")
    return Stored([place / shard for shard in shards], needs, target.device)


def finish_store(writer: ArtifactWriter, key: dict[str, Any], needs: Needs) -> None:
    """Turn a directory whose shards are all written into a store; other shards are dropped."""
    shards = {}
    for shard, said in sorted(writer.manifest["shards"].items()):
        if shard.startswith("features-"):
            shards[shard] = said["sha256"]
        else:
            writer.discard(shard)
    said = {
        "format_version": FORMAT_VERSION,
        "made_for": key,
        "features": names_of(needs),
        "shards": shards,
        "files": sorted([FEATURES, *shards]),
    }
    text = json.dumps(said, indent=2, sort_keys=True) + "\n"
    writer.finish({FEATURES: text.encode()})


def open_store(
    path: Path, key: dict[str, Any], needs: Needs, device: torch.device
) -> tuple[Stored, Stored] | None:
    """What a whole store holds to learn from and to measure on; None if there is none.

    Raises: see `check_store`.
    """
    shards = check_store(path, key, needs)
    if shards is None:
        return None
    own, unseen = (
        Stored([path / shard for shard in shards if shard.startswith(kind)], needs, device)
        for kind in ("features-own-", "features-held-out-")
    )
    return own, unseen


def check_store(path: Path, key: dict[str, Any], needs: Needs) -> list[str] | None:
    """The shards of a whole store, in order; None if there is none. Reads no text.

    Raises:
        UsageError: something else lies there, or a store of another target or other data.
        CheckpointError: damaged.
    """
    if not (path.exists() or path.is_symlink()):
        return None
    if not (path / FEATURES).is_file():
        raise UsageError(
            f"{path}: holds no features", hint="name a directory that is not there yet"
        )
    found = read_json(path / FEATURES)
    before = found.get("made_for")
    if found.get("format_version") != FORMAT_VERSION or not isinstance(before, dict):
        raise UsageError(f"{path}: {FEATURES} is not one that this spectool can read")
    changed = [name for name in sorted({*before, *key}) if before.get(name) != key.get(name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{path}: holds features made with another {', '.join(changed)} "
            f"({json.dumps(before.get(name))}, now {json.dumps(key.get(name))})",
            hint="name another directory: one is for one target and one set of texts",
        )
    if missing := set(names_of(needs)) - set(found["features"]):
        raise UsageError(
            f"{path}: holds the features {', '.join(found['features'])}, not {min(missing)}, "
            "which these heads read",
            hint="name another directory",
        )
    return sorted(found["shards"])


def names_of(needs: Needs) -> list[str]:
    """The names of the features that are asked for, as `Target.read` gives them."""
    return [f"layer {index}" for index in needs.layers] + ["final"] * needs.final


def store_bytes(needs: Needs, width: int, dtype: torch.dtype, num_tokens: int) -> int:
    """What the features of so many tokens take on a disk."""
    return _row_bytes(needs, width, dtype) * num_tokens


def _row_bytes(needs: Needs, width: int, dtype: torch.dtype) -> int:
    # A token's id and mark stand beside its features.
    return len(names_of(needs)) * width * dtype.itemsize + 9


def _groups(samples: Sequence[Sample], row_bytes: int) -> Iterator[list[Sample]]:
    """The texts of each shard, in order; one that is too large by itself has its own."""
    sizes = itertools.accumulate(len(sample.tokens) * row_bytes for sample in samples)
    pairs = zip(samples, sizes, strict=True)
    for _, group in itertools.groupby(pairs, lambda pair: (pair[1] - 1) // _SHARD_BYTES):
        yield [sample for sample, _ in group]


def _read(
    target: Target, needs: Needs, samples: Sequence[Sample], pass_tokens: int
) -> dict[str, Tensor]:
    """The features [N, D] of all tokens of these texts, on the host."""
    starts = [0, *itertools.accumulate(len(sample.tokens) for sample in samples)]
    found: dict[str, Tensor] = {}
    for chosen in by_length(samples, range(len(samples)), pass_tokens):
        batch = Read(target, needs, samples).batch([[i] for i in chosen])
        for name, value_BLD in batch.features.items():
            if name not in found:
                shape = (starts[-1], value_BLD.shape[-1])
                found[name] = torch.empty(shape, dtype=value_BLD.dtype)
            for row, i in enumerate(chosen):
                length = starts[i + 1] - starts[i]
                found[name][starts[i] : starts[i + 1]] = value_BLD[row, :length]
    return found


def _joined(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens_BL, loss_mask_BL, segments_BL = join([[samples[i] for i in row] for row in rows])
    segments_BL = None if segments_BL is None else segments_BL.to(device)
    return tokens_BL.to(device), loss_mask_BL.to(device), segments_BL
