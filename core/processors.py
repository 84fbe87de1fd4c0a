"""Which processors this process may use, how long its threads spin, and whether it waits for one.

What the system allows is read from /proc and the cgroup's files. Nothing here imports torch, and
the spin must be set before torch is: OpenMP reads it when it is loaded.
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

# How long a thread that waits for others keeps its processor. libgomp, which comes with torch for
# Linux, spins for 300,000 rounds (about 3 ms) by default: where another process has the processor
# of the thread that is waited for, that is lost at every barrier. The runtime of LLVM and Intel,
# which other builds of torch use, counts whole milliseconds, 200 by default. Tokens a second of a
# model of 2 M parameters, two threads on two processors: idle 247 with 300,000 rounds, 258 with
# 10,000, 219 with 5000, 127 with 1000, as a thread must be woken at every product; beside two busy
# processes 65 with 10,000 and 162 with 1000. LLVM's made 175 small products a second beside 17
# threads by default, 123 with 1 ms, 1887 without.
SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
CONTENDED_SPIN = {**SPIN, "GOMP_SPINCOUNT": "1000"}
WAIT_POLICY = "OMP_WAIT_POLICY"
NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def bound_spin(environ: MutableMapping[str, str], proc: Path = PROC) -> None:
    """Have waiting threads give their processor away soon, unless the user said how they wait."""
    if not any(name in environ for name in (*SPIN, WAIT_POLICY)):
        environ.update(CONTENDED_SPIN if is_contended(proc) else SPIN)


def is_contended(proc: Path = PROC, *, looks: int = 3) -> bool:
    """Whether others run now and leave this process fewer processors than it would have threads."""
    can = allowed(proc)
    running = []
    try:
        for look in range(looks):
            # What runs for a moment only is not there at the next look.
            time.sleep(0.001 * (look > 0))
            running.append(int((proc / "loadavg").read_text().split()[3].partition("/")[0]))
    except (OSError, ValueError, IndexError):
        return False
    others = min(running) - 1
    return others + can.threads > can.installed


def spin_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What the environment says about waiting threads."""
    return {name: environ[name] for name in (*SPIN, WAIT_POLICY) if name in environ}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Processors that are `installed`, those that this process may run on (`affinity`), and how
    many processors' time its cgroup gets (`quota`; None: all)."""

    installed: int
    affinity: int
    quota: float | None

    @property
    def threads(self) -> int:
        """The most threads that can all run at once: a part of a processor is no further one."""
        return max(1, min(self.affinity, math.floor(self.quota or self.affinity)))

    @property
    def reason(self) -> str | None:
        """Why that is fewer than are installed."""
        if self.threads == self.installed:
            return None
        if self.threads < self.affinity:
            return f"the cgroup's quota is {self.quota:g} processors of {self.installed}"
        return f"the process may run on {self.affinity} of {self.installed} processors"


def allowed(proc: Path = PROC) -> Allowed:
    """What the system lets this process use."""
    installed = os.cpu_count() or 1
    # Not every system says which processors those are.
    known = hasattr(os, "sched_getaffinity")
    affinity = len(os.sched_getaffinity(0)) if known else installed
    return Allowed(installed=installed, affinity=affinity, quota=cpu_quota(proc))


def cpu_quota(proc: Path = PROC) -> float | None:
    """Processors' worth of time that the process's cgroups get, the least of them and all those
    around them; None where nothing is limited."""
    limits: list[float] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        mounts = list(_cgroup_mounts(proc))
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            # The second version's only line names no controllers.
            kind = "cgroup2" if not controllers else "cgroup"
            if controllers and "cpu" not in controllers.split(","):
                continue
            for found, root, place in mounts:
                if found == kind:
                    limits += filter(None, map(_limit, _folders(place, root, group)))
    return min(limits, default=None)


def _cgroup_mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """Kind, the group that is mounted, and the place, of all that may limit processors."""
    for line in (proc / "self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            # Spaces and the like are written as octal numbers.
            yield kind, root, Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place))


def _folders(place: Path, root: str, group: str) -> Iterator[Path]:
    """The folders of a group and of all around it, as far as they are mounted."""
    path = PurePosixPath(group)
    # Inside a container another group than the mounted one may be named: that one is not seen.
    inner = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    for part in (inner, *inner.parents):
        yield place / part


def _limit(folder: Path) -> float | None:
    """The limit in a group's folder, of either version."""
    try:
        if (folder / "cpu.max").exists():
            quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        share = int(quota) / int(period or 100_000)
    except (OSError, ValueError, ZeroDivisionError):
        # "max" is no number, and the first version writes -1 for it.
        return None
    return share if share > 0 else None


class Waiting:
    """How long threads of this process wait for a processor, from now on.

    The scheduler counts that where the system is Linux; elsewhere nobody seems to wait.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._began = time.perf_counter()
        self._before = self._waited()

    def share(self) -> float:
        """The part of the time that the thread waited which waited longest."""
        elapsed = time.perf_counter() - self._began
        longest = max(
            (now - self._before.get(thread, 0) for thread, now in self._waited().items()), default=0
        )
        return longest / 1e9 / elapsed if elapsed > 0 else 0.0

    def _waited(self) -> dict[str, int]:
        """Nanoseconds that each thread could run and had no processor."""
        found = {}
        for path in self._proc.glob("self/task/*/schedstat"):
            # Threads end meanwhile.
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[path.parent.name] = int(path.read_text().split()[1])
        return found
