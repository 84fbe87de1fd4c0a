"""Affinity, quotas of fake cgroups, the spin of waiting threads, and time spent waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from spectool import cli, machine, processors
from spectool.processors import Allowed, Waiting, allowed, cpu_quota, limit_spin

V1 = "33 25 0:28 {root} {mount_point} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "25 30 0:22 {root} {mount_point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
# Others that are there too.
REST = (
    "22 30 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
    "34 25 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n"
)


def tree(base: Path, *, mount: str, cgroup: str, root: str = "/") -> Path:
    """Make a /proc with this process in a cgroup, whose file system is mounted at `base/c g`."""
    this = base / "proc/self"
    this.mkdir(parents=True)
    line = mount.format(root=root, mount_point=str(base / "c g").replace(" ", "\\040"))
    (this / "mountinfo").write_text(f"{REST}{line}\n")
    (this / "cgroup").write_text(f"3:memory:/\n{cgroup}\n")
    return base / "proc"


def limit(base: Path, group: str, text: str) -> None:
    folder = base / "c g" / group
    folder.mkdir(parents=True, exist_ok=True)
    if "cfs" in text:
        quota, period = text.removeprefix("cfs ").split()
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
    else:
        (folder / "cpu.max").write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("texts", "quota"),
    [
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "50000"}, 0.5),
        ({"a/b": "max 100000", "a": "300000 100000"}, 3.0),
        ({"a/b": "800000 100000", "a": "max 100000", "": "200000 100000"}, 2.0),
        ({"a/b": "200000 100000", "a": "400000 100000"}, 2.0),
        ({"a/b": "", "a": "what is this"}, None),
        ({"a/b": "1 0"}, None),
        ({}, None),
        # Another group's limit is not ours.
        ({"c": "100000 100000"}, None),
    ],
)
def test_quota_of_nested_groups(tmp_path: Path, texts: dict[str, str], quota: float | None) -> None:
    proc = tree(tmp_path, mount=V2, cgroup="0::/a/b")
    for group, text in texts.items():
        limit(tmp_path, group, text)
    assert cpu_quota(proc) == quota


@pytest.mark.parametrize(
    ("text", "quota"),
    [("cfs 250000 100000", 2.5), ("cfs -1 100000", None), ("cfs 20000 10000", 2.0)],
)
@pytest.mark.parametrize("group", ["a/b", "a", ""])
def test_quota_of_the_first_version(
    tmp_path: Path, text: str, quota: float | None, group: str
) -> None:
    proc = tree(tmp_path, mount=V1, cgroup="4:cpuacct,cpu:/a/b\n0::/")
    limit(tmp_path, group, text)
    assert cpu_quota(proc) == quota


def test_controllers_without_processors_do_not_count(tmp_path: Path) -> None:
    proc = tree(tmp_path, mount=V1, cgroup="4:cpuset:/a/b")
    limit(tmp_path, "a/b", "cfs 100000 100000")
    assert cpu_quota(proc) is None


@pytest.mark.parametrize(
    ("root", "group", "where"),
    [
        # The container's group is mounted, and seen by its name outside.
        ("/docker/1", "/docker/1", ""),
        ("/docker/1", "/docker/1/inner", "inner"),
        # The group lies outside the mounted one.
        ("/", "/../../other", ""),
        ("/docker/1", "/", ""),
    ],
)
def test_quota_inside_a_container(tmp_path: Path, root: str, group: str, where: str) -> None:
    proc = tree(tmp_path, mount=V2, cgroup=f"0::{group}", root=root)
    limit(tmp_path, where, "100000 100000")
    assert cpu_quota(proc) == 1.0


@pytest.mark.parametrize("damaged", ["mountinfo", "cgroup"])
@pytest.mark.parametrize("text", [None, "", "x", "x - y", "1 2 3 / / - cgroup2"])
def test_a_system_that_does_not_say(tmp_path: Path, damaged: str, text: str | None) -> None:
    proc = tree(tmp_path, mount=V2, cgroup="0::/")
    limit(tmp_path, "", "100000 100000")
    path = proc / "self" / damaged
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert cpu_quota(proc) is None
    assert allowed(proc).threads >= 1


@pytest.mark.parametrize(
    ("affinity", "quota", "threads", "reason"),
    [
        (8, None, 8, None),
        (3, None, 3, "the process may run on 3 of 8 processors"),
        (8, 2.9, 2, "the cgroup's quota is 2.9 processors of 8"),
        (8, 0.3, 1, "the cgroup's quota is 0.3 processors of 8"),
        (2, 4.0, 2, "the process may run on 2 of 8 processors"),
        (8, 64.0, 8, None),
    ],
)
def test_threads_that_run_at_once(
    affinity: int, quota: float | None, threads: int, reason: str | None
) -> None:
    found = Allowed(installed=8, affinity=affinity, quota=quota)
    assert (found.threads, found.reason) == (threads, reason)


def test_affinity_is_that_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert allowed().affinity == allowed().threads == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("asked", "environ", "threads", "reason"),
    [
        (None, {}, 2, "the cgroup's quota is 2.5 processors of 16"),
        (5, {}, 5, "requested, or the default of torch"),
        (None, {"OMP_NUM_THREADS": "7"}, 7, "set by OMP_NUM_THREADS"),
        (3, {"OMP_NUM_THREADS": "7"}, 3, "requested, or the default of torch"),
    ],
)
def test_who_decides_how_many_threads(
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    environ: dict[str, str],
    threads: int,
    reason: str,
) -> None:
    """The requested number counts first, then the environment, then the system."""
    for name in processors.NUM_THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    limits = Allowed(installed=16, affinity=16, quota=2.5)
    monkeypatch.setattr(processors, "allowed", lambda: limits)
    before = torch.get_num_threads()
    try:
        # What torch does by itself, having read the environment.
        torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", "16")))
        machine.set_threads(asked)
        found = machine.describe()
    finally:
        torch.set_num_threads(before)
    assert (found["threads"], found["threads_reason"]) == (threads, reason)
    assert found["cores_allowed"] == {"affinity": 16, "quota": 2.5}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_who_said_how_threads_wait_is_not_overruled(name: str) -> None:
    environ = {name: "x"}
    limit_spin(environ)
    assert environ == {name: "x"}


def test_the_command_line_bounds_the_spin_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, str]] = []
    environ: dict[str, str] = {}
    monkeypatch.setattr(cli.os, "environ", environ)
    monkeypatch.setattr(cli, "app", lambda: seen.append(dict(environ)))
    cli.main()
    assert seen in ([processors.SPIN], [processors.CONTENDED_SPIN])


@pytest.mark.parametrize(
    ("running", "installed", "threads", "spin"),
    [
        (1, 2, 2, processors.SPIN),
        (2, 2, 2, processors.CONTENDED_SPIN),
        (2, 2, 1, processors.SPIN),
        (11, 16, 2, processors.SPIN),
        (16, 16, 2, processors.CONTENDED_SPIN),
        (None, 2, 2, processors.SPIN),
    ],
)
def test_where_others_run_threads_spin_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int | None, installed: int,
    threads: int, spin: dict[str, str],
) -> None:  # fmt: skip
    can = Allowed(installed=installed, affinity=threads, quota=None)
    monkeypatch.setattr(processors, "allowed", lambda proc: can)
    if running is not None:
        (tmp_path / "loadavg").write_text(f"0.00 0.01 0.05 {running}/234 5678\n")
    environ: dict[str, str] = {}
    limit_spin(environ, tmp_path)
    assert environ == spin


def test_waiting_is_that_of_the_thread_that_waits_longest(tmp_path: Path) -> None:
    def record(thread: int, ran: int, waited: int) -> None:
        folder = tmp_path / f"self/task/{thread}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedstat").write_text(f"{ran} {waited} 3\n")

    record(1, 10**9, 10**15)
    record(2, 10**9, 10**15)
    waiting = Waiting(tmp_path)
    assert waiting.share() == 0
    # A thread that began meanwhile counts as well; far longer than this test takes.
    record(3, 0, 10**12)
    assert waiting.share() > 1
    assert Waiting(tmp_path / "nothing").share() == 0
