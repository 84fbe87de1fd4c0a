"""The machine a number came from: processor, memory, threads, versions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool import processors

if TYPE_CHECKING:
    import torch


def available_memory(device: torch.device | None = None) -> int:
    """Bytes that can be had: of a CUDA device, or of the host without swapping.

    The host's whole memory where the system does not say.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return found["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trim_memory() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc).

    Tensors below 32 MB come from its arenas once it has seen larger ones freed; after a few blocks
    of 67 M weights it held 200 MB that nobody used.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Let sums on a CUDA device be taken in the same order each time, as on a processor.

    Where torch has no such way of computing something it does as usual. What cuBLAS is told in the
    environment stays.
    """
    import torch

    if device.type == "cpu":
        yield
        return
    # What cuBLAS needs for it; read when its first product is taken.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        deterministic.fill_uninitialized_memory = fills


def peak_rss_bytes() -> int:
    """The most memory this process ever held resident.

    From /proc where there is one: a child's ru_maxrss begins at what its parent held.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def peak_device_bytes() -> int:
    """The most memory that tensors of this process ever took on a CUDA device; 0 without one."""
    import torch

    devices = range(torch.cuda.device_count())
    return max(map(torch.cuda.max_memory_allocated, devices), default=0)


def processor() -> str:
    """The processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products (True where it is unknown)."""
    flags = _flags()
    return flags is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)


def has_bfloat16_tiles() -> bool:
    """Whether it multiplies whole tiles of bfloat16 (False where it is unknown)."""
    return "amx_bf16" in (_flags() or ())


def _flags() -> set[str] | None:
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return None
    return None if flags is None else set(flags[1].split())


def set_threads(asked: int | None) -> None:
    """Let torch compute with so many threads. Not asked: as the environment says, or else as torch
    does by itself, but no more than the system lets run at once."""
    import torch

    if asked is not None:
        torch.set_num_threads(asked)
    elif not any(os.environ.get(name) for name in processors.NUM_THREADS):
        most = processors.allowed().threads
        if most < torch.get_num_threads():
            torch.set_num_threads(most)


def _threads_reason(threads: int, allowed: processors.Allowed) -> str:
    """Why torch computes with so many threads."""
    for name in processors.NUM_THREADS:
        if os.environ.get(name) == str(threads):
            return f"{name} says so"
    if threads == allowed.threads:
        return allowed.reason or "one for each processor"
    return "asked for, or torch's own choice"


def describe() -> dict[str, Any]:
    """What belongs beside every measured number. Imports torch."""
    import torch

    threads, allowed = torch.get_num_threads(), processors.allowed()
    found = {
        "processor": processor(),
        "cores": allowed.installed,
        "cores_allowed": {"affinity": allowed.affinity, "quota": allowed.quota},
        "threads": threads,
        "threads_reason": _threads_reason(threads, allowed),
        "spin": processors.spin_settings(os.environ),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("spectool", "torch", "transformers")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
