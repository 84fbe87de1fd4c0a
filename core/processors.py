"""Processors that this process may use, how long its idle threads spin, and how long they wait.

Limits are read from /proc and the cgroup's files. Nothing here imports torch: OpenMP reads the spin
settings when torch loads it, so they must be set before.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")

# How long a thread at a barrier spins before it gives up its processor. libgomp, which comes with
# torch for Linux, spins for 300,000 rounds (about 3 ms) by default: if another process occupies the
# processor of the thread that is waited for, 3 ms are lost at every barrier. The runtime of LLVM
# and Intel, which other builds of torch use, counts whole milliseconds, 200 by default. Measured in
# tokens per second of a model of 2 M parameters, two threads on two processors. Idle machine: 247
# with 300,000 rounds, 258 with 10,000, 219 with 5000, 127 with 1000 (threads must be woken at every
# product); next to two busy processes: 65 with 10,000, 162 with 1000. LLVM's runtime, next to 17
# threads, in small products per second: 175 by default, 123 with 1 ms, 1887 with 0.
SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
CONTENDED_SPIN = {**SPIN, "GOMP_SPINCOUNT": "1000"}
WAIT_POLICY = "OMP_WAIT_POLICY"
NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def limit_spin(environ: MutableMapping[str, str], proc: Path = PROC) -> None:
    """Shorten the spin of waiting threads, unless the environment already sets how they wait."""
    if not any(name in environ for name in (*SPIN, WAIT_POLICY)):
        environ.update(CONTENDED_SPIN if is_contended(proc) else SPIN)


def is_contended(proc: Path = PROC) -> bool:
    """Whether other processes leave fewer processors free now than this one has threads."""
    limits = allowed(proc)
    running = []
    try:
        for sample in range(3):
            # The least of several samples leaves out threads that run for a moment only.
            time.sleep(0.001 * (sample > 0))
            running.append(int((proc / "loadavg").read_text().split()[3].partition("/")[0]))
    except (OSError, ValueError, IndexError):
        return False
    others = min(running) - 1
    return others + limits.threads > limits.installed


def spin_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment's settings for waiting threads."""
    return {name: environ[name] for name in (*SPIN, WAIT_POLICY) if name in environ}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Numbers of processors: `installed`, usable by this process (`affinity`), and the cgroup's
    `quota` of processor time (in processors; None: unlimited)."""

    installed: int
    affinity: int
    quota: float | None

    @property
    def threads(self) -> int:
        """Most threads that can run at once; a fraction of a processor does not count."""
        return max(1, min(self.affinity, math.floor(self.quota or self.affinity)))

    @property
    def reason(self) -> str | None:
        """Why `threads` is less than `installed`; None if it is not."""
        if self.threads == self.installed:
            return None
        if self.threads < self.affinity:
            return f"the cgroup's quota is {self.quota:g} processors of {self.installed}"
        return f"the process may run on {self.affinity} of {self.installed} processors"


def allowed(proc: Path = PROC) -> Allowed:
    """Read the limits on this process's processors."""
    installed = os.cpu_count() or 1
    # Only Linux reports the affinity.
    known = hasattr(os, "sched_getaffinity")
    affinity = len(os.sched_getaffinity(0)) if known else installed
    return Allowed(installed=installed, affinity=affinity, quota=cpu_quota(proc))


def cpu_quota(proc: Path = PROC) -> float | None:
    """Read the least limit of the process's cgroups and their parents, in processors; None: no
    limit."""
    limits: list[float] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        mounts = list(_cgroup_mounts(proc))
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            # The only line of version 2 names no controllers.
            kind = "cgroup2" if not controllers else "cgroup"
            if controllers and "cpu" not in controllers.split(","):
                continue
            for mounted_kind, root, mount in mounts:
                if mounted_kind == kind:
                    limits += filter(None, map(_limit, _folders(mount, root, group)))
    return min(limits, default=None)


def _cgroup_mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield kind, mounted group and mount point of the cgroup mounts that may limit processors."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            # The file writes spaces and other special characters as octal escapes.
            yield kind, root, Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount))


def _folders(mount: Path, root: str, group: str) -> Iterator[Path]:
    """Yield the folders of a group and of its parents, as far as they are mounted."""
    path = PurePosixPath(group)
    # In a container the group may lie outside the mounted one; its folder is not visible then.
    inner = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    for part in (inner, *inner.parents):
        yield mount / part


def _limit(folder: Path) -> float | None:
    """Read the limit in a group's folder (version 1 or 2), in processors; None: no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        share = int(quota) / int(period or 100_000)
    except (OSError, ValueError, ZeroDivisionError):
        # Version 2 writes "max" for no limit, version 1 writes -1.
        return None
    return share if share > 0 else None


class Waiting:
    """Time that this process's threads wait for a processor, from the construction on.

    Read from Linux's scheduler statistics; on other systems it is always 0.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._began = time.perf_counter()
        self._before = self._waited()

    def share(self) -> float:
        """Return the share of the elapsed time that the longest-waiting thread waited."""
        elapsed = time.perf_counter() - self._began
        longest = max(
            (now - self._before.get(thread, 0) for thread, now in self._waited().items()), default=0
        )
        return longest / 1e9 / elapsed if elapsed > 0 else 0.0

    def _waited(self) -> dict[str, int]:
        """Read how long each thread was runnable without a processor, in nanoseconds."""
        waited = {}
        for path in self._proc.glob("self/task/*/schedstat"):
            # A thread may end while its file is read.
            with contextlib.suppress(OSError, ValueError, IndexError):
                waited[path.parent.name] = int(path.read_text().split()[1])
        return waited
