"""Texts written anew, a group at a time, each kept beside OUT until the run is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from spectool.artifact import ArtifactWriter
from spectool.checkpoint import read_tensor
from spectool.headers import read_header

from .samples import Sample

# Samples that are written anew between two records of it.
_GROUP = 32

Say = Callable[[str], None]
T = TypeVar("T")


class Written:
    """Writes texts, or reads those that an earlier run left; see the module docstring."""

    def __init__(self, writer: ArtifactWriter, say: Say) -> None:
        self.writer, self.say = writer, say

    def __call__(
        self, name: str, samples: Sequence[Sample], write: Callable[..., list[Sample]]
    ) -> list[Sample]:
        """The samples written anew by `write(group, number)`."""
        found: list[Sample] = []
        began = said = time.monotonic()
        for number, group in enumerate(parts(samples, _GROUP)):
            shard = f"{name}-{number:05d}.safetensors"
            if self.writer.report(shard) is None:
                made = write(group, number)
                self.writer.write_shard(shard, as_tensors(made), {}, {})
            found += as_samples(read_shard(self.writer.path(shard)))
            if number == 0 or time.monotonic() - said > 60:
                said = time.monotonic()
                done = min(len(samples), (number + 1) * _GROUP)
                left = (said - began) / done * (len(samples) - done)
                self.say(f"{name} texts written: {done}/{len(samples)}, {left:.0f} s left")
        return found


def as_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples one after the other, without what was given of them."""
    return {
        "tokens": torch.tensor([token for s in samples for token in s.tokens], dtype=torch.long),
        "taught": torch.tensor([mark for s in samples for mark in s.taught], dtype=torch.bool),
        "lengths": torch.tensor([len(s.tokens) for s in samples], dtype=torch.long),
    }


def as_samples(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """The samples again."""
    lengths = tensors["lengths"].tolist()
    return [
        Sample(tokens.tolist(), taught.tolist())
        for tokens, taught in zip(
            torch.split(tensors["tokens"], lengths),
            torch.split(tensors["taught"], lengths),
            strict=True,
        )
    ]


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    return {entry.name: read_tensor(entry) for entry in read_header(path)[1]}


def parts(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The whole in pieces of that size, the last one smaller."""
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
