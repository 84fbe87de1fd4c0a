"""Generated data, stored group by group next to OUT until the run is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import read_tensors
from spectool.distill.data.samples import Sample
from spectool.distill.processes import Processes
from spectool.report import Reporter

# Number of texts that are generated and then stored together.
_GROUP = 32

S = TypeVar("S")
T = TypeVar("T")


class GroupWriter(Generic[T]):
    """Generation of data in groups, which reuses the groups stored by an earlier run.

    Each process generates one group at a time; the first one, which has the `writer`, stores them.
    `pack` makes tensors of a group, `unpack` a group of tensors.
    """

    def __init__(
        self,
        writer: ArtifactWriter | None,
        processes: Processes,
        reporter: Reporter,
        pack: Callable[[Sequence[T]], dict[str, Tensor]],
        unpack: Callable[[Mapping[str, Tensor]], list[T]],
    ) -> None:
        self.writer, self.processes, self.reporter = writer, processes, reporter
        self.pack, self.unpack = pack, unpack

    def __call__(
        self, name: str, given: Sequence[S], write: Callable[[Sequence[S], int], list[T]]
    ) -> list[T]:
        """Generate from what is given, by `write(group, number)`; shards are called by `name`."""
        groups = list(chunk(given, _GROUP))
        shards = [f"{name}-{number:05d}.safetensors" for number in range(len(groups))]
        with self.processes.together():
            finished = self._read_stored(shards)
        missing = [number for number in range(len(groups)) if number not in finished]
        for numbers in chunk(missing, self.processes.size):
            made: list[T] = []
            with self.processes.together():
                for number in self.processes.part(numbers):
                    made = write(groups[number], number)
            gathered = self.processes.gather(self.pack(made))
            with self.processes.together():
                for number, tensors in zip(numbers, gathered, strict=False):
                    finished[number] = self.unpack(tensors)
                    if self.writer is not None:
                        self.writer.write_shard(shards[number], tensors, {}, {})
            done = min(len(given), len(finished) * _GROUP)
            self.reporter.progress(done, len(given), f"{name} texts written")
        return [each for number in sorted(finished) for each in finished[number]]

    def _read_stored(self, shards: Sequence[str]) -> dict[int, list[T]]:
        """Read the groups stored by an earlier run, by number."""
        stored: dict[int, list[T]] = {}
        if self.writer is not None:
            for number, shard in enumerate(shards):
                if self.writer.report(shard) is not None:
                    stored[number] = self.unpack(read_tensors(self.writer.path(shard)))
        return self.processes.share(stored)


def as_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Concatenate samples into tensors of tokens, loss mask ("taught") and lengths."""
    return {
        "tokens": torch.tensor([token for s in samples for token in s.tokens], dtype=torch.long),
        "taught": torch.tensor([mark for s in samples for mark in s.loss_mask], dtype=torch.bool),
        "lengths": torch.tensor([len(s.tokens) for s in samples], dtype=torch.long),
    }


def as_samples(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """Split the tensors of `as_tensors` into samples."""
    lengths = tensors["lengths"].tolist()
    return [
        Sample(tokens.tolist(), loss_mask.tolist())
        for tokens, loss_mask in zip(
            torch.split(tensors["tokens"], lengths),
            torch.split(tensors["taught"], lengths),
            strict=True,
        )
    ]


def chunk(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield slices of `size` elements; the last one may be shorter."""
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
