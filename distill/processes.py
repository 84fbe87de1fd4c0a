"""Data-parallel processes started by torchrun, or a single process.

Each process takes a part of every step's texts. Sums and counts are reduced, never means, so that
parts of unequal size are weighted correctly. Only the first process prints, and it alone finishes
files; the others read them, so all need the same disk. Weights that are trained whole are split
among the processes by torch's FSDP2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spectool.errors import SpectoolError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

# Processes wait at the next reduction while one generates long texts or writes a large shard.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Processes:
    """Rank of this process among `size`, of which `local_size` run on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, whole: Sequence[T]) -> Sequence[T]:
        """Return this process's share: neighbours, which have similar lengths, are spread."""
        return whole[self.rank :: self.size]

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process: with CUDA, one per process.

        Raises:
            UsageError: the processes would share a CUDA device.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if ":" in str(device):
            raise UsageError(
                f"--device {device}: {self.size} processes, and each needs its own CUDA device",
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
        """Sum over all processes; exact for counts."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes; a parameter without a gradient anywhere keeps none.

        Not by DistributedDataParallel, which averages and expects a single backward pass per step,
        while heads run many backward passes over chunks.
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

    def split(self, model: PreTrainedModel) -> None:
        """Split a model's parameters among the processes; a pass gathers them block by block.

        From then on all processes must run the same passes, the first of them not in inference
        mode, and the gradient of a parameter is the mean over the processes.
        """
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from spectool.model.decoder import find_blocks

        mesh = init_device_mesh(model.device.type, (self.size,))
        for name in find_blocks(model)[1]:
            fully_shard(model.get_submodule(name), mesh=mesh)
        # Else the parameters outside the blocks would be whole after a pass without gradients.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def share(self, value: T) -> T:
        """Return the value of the first process."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in each process, and fail in all of them if it fails in one.

        Raises:
            SpectoolError: the error of the lowest rank that failed.
        """
        failed: SpectoolError | None = None
        try:
            yield
        except SpectoolError as error:
            if self.size == 1:
                raise
            failed = error
        if self.size > 1:
            record = None if failed is None else (type(failed), str(failed), failed.hint)
            for kind, message, hint in filter(None, self.gather(record)):
                raise kind(message, hint=hint) from failed


ALONE = Processes()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts the processes may hold; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def connect(device: str) -> Iterator[Processes]:
    """Connect the processes that torchrun started, until the end of the block."""
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
