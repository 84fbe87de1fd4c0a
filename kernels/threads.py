"""Threads of the kernels, and of torch beside them.

torch's threads meet at barriers of OpenMP, where they spin for one that another process keeps from
running; the kernels' pool goes on without it (`pool.c`). So where the kernels compute the large
products, torch's small operations between them run on one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Kernels(threading.local):
    # None: as many as torch has.
    count: int | None = None


_kernels = _Kernels()


def count() -> int:
    """Return the number of threads that a kernel runs on."""
    return _kernels.count or torch.get_num_threads()


@contextmanager
def give_torch(*, several: bool) -> Iterator[None]:
    """Let torch compute on as many threads as the kernels, or on one; the kernels keep theirs."""
    before, torch_before = _kernels.count, torch.get_num_threads()
    _kernels.count = count()
    # It takes 0.3 us: no thread ends or starts.
    torch.set_num_threads(_kernels.count if several else 1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        _kernels.count = before
