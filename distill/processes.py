"""Several processes that train the same heads, as torchrun starts them; or just this one.

Each takes a part of every step's texts. What is added up are sums and counts, never means, so that
parts of unequal size do not weigh wrongly. The first process alone writes and speaks; the others
read what it wrote, so all of them see one disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from spectool.errors import SpectoolError, UsageError

T = TypeVar("T")

# The others wait at the next sum while one writes a long text or a large shard.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among `size`, of which `local_size` run on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, whole: Sequence[T]) -> Sequence[T]:
        """This process's share: neighbours, which are of like length, go to different ones."""
        return whole[self.rank :: self.size]

    def device(self, device: torch.device) -> torch.device:
        """The device of this process, where each has a CUDA device of its own.

        Raises:
            UsageError: all are to share one.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if ":" in str(device):
            raise UsageError(
                f"--device {device}: {self.size} processes, and each takes one of its own",
                hint="--device cuda",
            )
        if self.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"--device cuda: {self.local_size} processes, and {torch.cuda.device_count()} CUDA "
                "devices"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes. Exact for counts."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes up. Where none has one there is none afterwards.

        By hand rather than by torch's wrapper of modules: that one averages, and hooks into a
        single backward pass over what its forward returned, while heads make their gradients in
        many passes over pieces.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        present = self.sum([parameter.grad is not None for parameter in parameters])
        for parameter, count in zip(parameters, present, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def gather(self, value: T) -> list[T]:
        """What all processes have, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share(self, value: T) -> T:
        """What the first process has."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each process by itself, which goes on nowhere once it failed in one.

        Raises:
            SpectoolError: in all of them, what went wrong in the first of those where it did.
        """
        failed: SpectoolError | None = None
        try:
            yield
        except SpectoolError as error:
            if self.size == 1:
                raise
            failed = error
        if self.size > 1:
            told = None if failed is None else (type(failed), str(failed), failed.hint)
            for kind, message, hint in filter(None, self.gather(told)):
                raise kind(message, hint=hint) from failed


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, connected until the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    processes = Processes(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield processes
    finally:
        dist.destroy_process_group()
