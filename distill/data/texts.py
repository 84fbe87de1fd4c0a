"""Texts written anew, a group at a time, each kept beside OUT until the run is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.tensors import read_tensors
from spectool.distill.data.samples import Sample
from spectool.distill.processes import Processes

# Samples that are written anew between two records of it.
_GROUP = 32

Say = Callable[[str], None]
T = TypeVar("T")


class Written:
    """Writes texts, or reads those that an earlier run left; see the module docstring.

    A group a process at a time; the first, which has the `writer`, keeps them.
    """

    def __init__(self, writer: ArtifactWriter | None, processes: Processes, say: Say) -> None:
        self.writer, self.processes, self.say = writer, processes, say

    def __call__(
        self,
        name: str,
        samples: Sequence[Sample],
        write: Callable[[Sequence[Sample], int], list[Sample]],
    ) -> list[Sample]:
        """The samples written anew by `write(group, number)`."""
        groups = list(parts(samples, _GROUP))
        shards = [f"{name}-{number:05d}.safetensors" for number in range(len(groups))]
        with self.processes.together():
            found = self._kept(shards)
        missing = [number for number in range(len(groups)) if number not in found]
        began = said = time.monotonic()
        for count, numbers in enumerate(parts(missing, self.processes.size), start=1):
            made: list[Sample] = []
            with self.processes.together():
                for number in self.processes.part(numbers):
                    made = write(groups[number], number)
            gathered = self.processes.gather(as_tensors(made))
            with self.processes.together():
                for number, tensors in zip(numbers, gathered, strict=False):
                    found[number] = as_samples(tensors)
                    if self.writer is not None:
                        self.writer.write_shard(shards[number], tensors, {}, {})
            if count == 1 or time.monotonic() - said > 60:
                said = time.monotonic()
                left = (said - began) / count * (len(missing) / self.processes.size - count)
                done = min(len(samples), len(found) * _GROUP)
                self.say(f"{name} texts written: {done}/{len(samples)}, {max(0, left):.0f} s left")
        return [sample for number in sorted(found) for sample in found[number]]

    def _kept(self, shards: Sequence[str]) -> dict[int, list[Sample]]:
        """Groups of an earlier run, by number."""
        found: dict[int, list[Sample]] = {}
        if self.writer is not None:
            for number, shard in enumerate(shards):
                if self.writer.report(shard) is not None:
                    found[number] = as_samples(read_tensors(self.writer.path(shard)))
        return self.processes.share(found)


def as_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples one after the other, without what was given of them."""
    return {
        "tokens": torch.tensor([token for s in samples for token in s.tokens], dtype=torch.long),
        "taught": torch.tensor([mark for s in samples for mark in s.loss_mask], dtype=torch.bool),
        "lengths": torch.tensor([len(s.tokens) for s in samples], dtype=torch.long),
    }


def as_samples(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """The samples again."""
    lengths = tensors["lengths"].tolist()
    return [
        Sample(tokens.tolist(), loss_mask.tolist())
        for tokens, loss_mask in zip(
            torch.split(tensors["tokens"], lengths),
            torch.split(tensors["taught"], lengths),
            strict=True,
        )
    ]


def parts(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The whole in pieces of that size, the last one smaller."""
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
