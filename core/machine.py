"""Description of the machine (processor, memory, threads, versions), and its memory and threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool import processors
from spectool.version import __version__

if TYPE_CHECKING:
    import torch


def available_memory(device: torch.device | None = None) -> int:
    """Return the free bytes of a CUDA device, or of the host without swapping.

    Where the system does not report free memory: the host's total memory.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trim_memory() -> None:
    """Return freed memory that the C library (glibc) keeps to the system."""
    # glibc serves tensors below 32 MB from its arenas once larger ones were freed; after a few
    # blocks of 67 M weights the arenas kept 200 MB of freed memory.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Compute deterministically on a CUDA device, where torch can; a CPU always does.

    A setting for cuBLAS that is in the environment already is kept.
    """
    import torch

    if device.type == "cpu":
        yield
        return
    # Required for deterministic cuBLAS, which reads it at its first product.
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
    """Return the peak resident memory of this process."""
    # /proc first: a child's ru_maxrss starts at its parent's.
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def peak_device_bytes() -> int:
    """Return the peak memory of this process's tensors on a CUDA device; 0 without a device."""
    import torch

    devices = range(torch.cuda.device_count())
    return max(map(torch.cuda.max_memory_allocated, devices), default=0)


def processor() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def set_threads(requested: int | None) -> None:
    """Set the number of torch's threads.

    None: as the environment sets it, else torch's default, but no more than can run at once.
    """
    import torch

    if requested is not None:
        torch.set_num_threads(requested)
    elif may_choose_threads(requested):
        limit = processors.allowed().threads
        if limit < torch.get_num_threads():
            torch.set_num_threads(limit)


def may_choose_threads(requested: int | None) -> bool:
    """Return whether neither the user nor the environment chose the number of threads."""
    return requested is None and not any(os.environ.get(name) for name in processors.NUM_THREADS)


def _threads_reason(threads: int, allowed: processors.Allowed) -> str:
    """Explain why torch computes with this number of threads."""
    for name in processors.NUM_THREADS:
        if os.environ.get(name) == str(threads):
            return f"set by {name}"
    if threads == allowed.threads:
        return allowed.reason or "one per processor"
    return "requested, or the default of torch"


def describe_hardware() -> dict[str, Any]:
    """Return the part of the machine's description that needs no torch."""
    allowed = processors.allowed()
    return {
        "processor": processor(),
        "cores": allowed.installed,
        "cores_allowed": {"affinity": allowed.affinity, "quota": allowed.quota},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def describe() -> dict[str, Any]:
    """Return the machine's description that is stored with every measurement. Imports torch."""
    import torch

    threads, allowed = torch.get_num_threads(), processors.allowed()
    description = {
        **describe_hardware(),
        "threads": threads,
        "threads_reason": _threads_reason(threads, allowed),
        "spin": processors.spin_settings(os.environ),
        "versions": {name: version(name) for name in ("spectool", "torch", "transformers")},
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def software_versions() -> dict[str, str]:
    """Return the versions of what a result depends on. Imports torch and transformers."""
    import torch
    import transformers

    own, its = __version__, transformers.__version__
    return {"spectool": own, "torch": torch.__version__, "transformers": its}


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
