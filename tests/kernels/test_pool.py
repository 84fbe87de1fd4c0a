"""The pool of threads: each index once, callers at the same time, forks, and sleep when idle."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spectool.kernels import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="no kernels here")

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t)


def pool_run(task: Callable[[int], object], count: int, threads: int) -> None:
    library = build.load_library()
    assert not isinstance(library, str)
    run = library.functions["pool_run"]
    run.argtypes = [TASK, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
    run.restype = None
    run(TASK(lambda _, index: task(index)), None, count, threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 500])
def test_each_index_runs_once(count: int, threads: int) -> None:
    for _ in range(10):
        seen: list[int] = []
        pool_run(seen.append, count, threads)
        assert sorted(seen) == list(range(count))


def run_pair(wait: float = 10) -> set[int]:
    """Run two indices that wait for each other; return the threads that ran them."""
    both, threads = threading.Barrier(2, timeout=wait), set()

    def meet(index: int) -> None:
        threads.add(threading.get_native_id())
        both.wait()

    pool_run(meet, 2, 2)
    return threads


def test_two_threads_run_at_the_same_time_and_one_is_the_caller() -> None:
    for _ in range(20):
        threads = run_pair()
        assert len(threads) == 2 and threading.get_native_id() in threads


ALONE = """
import ctypes, os, sys, threading
run = ctypes.CDLL(sys.argv[1]).pool_run
seen = set()
task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t)(
    lambda _, index: seen.add(threading.get_native_id())
)
run(task, None, ctypes.c_ssize_t(50), 1)
run(task, None, ctypes.c_ssize_t(1), 8)
assert seen == {os.getpid()} and len(os.listdir("/proc/self/task")) == 1
run(task, None, ctypes.c_ssize_t(50), 3)
assert len(os.listdir("/proc/self/task")) == 3
"""


def test_one_thread_is_the_caller_and_starts_no_other() -> None:
    library = build.load_library()
    assert not isinstance(library, str)
    subprocess.run([sys.executable, "-c", ALONE, library.functions._name], check=True)


def test_a_second_caller_runs_all_in_its_own_thread() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold(index: int) -> None:
        inside.set()
        assert leave.wait(10)

    first = threading.Thread(target=pool_run, args=(hold, 2, 2))
    first.start()
    assert inside.wait(10)
    threads: set[int] = set()
    pool_run(lambda index: threads.add(threading.get_native_id()), 20, 2)
    assert threads == {threading.get_native_id()}
    leave.set()
    first.join()
    assert len(run_pair()) == 2


def test_a_task_may_use_the_pool() -> None:
    seen: list[tuple[int, int]] = []
    pool_run(lambda i: pool_run(lambda j: seen.append((i, j)), 3, 2), 4, 2)
    assert sorted(seen) == [(i, j) for i in range(4) for j in range(3)]


def test_many_callers_at_the_same_time_lose_nothing() -> None:
    counts = [0] * 4

    def call(which: int) -> None:
        for _ in range(100):
            seen: list[int] = []
            pool_run(seen.append, 6, 3)
            counts[which] += sorted(seen) == list(range(6))

    callers = [threading.Thread(target=call, args=(which,)) for which in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts == [100] * 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_a_pool_of_its_own() -> None:
    """Forked while another thread is inside the pool."""
    run_pair()
    inside, leave = threading.Event(), threading.Event()

    def hold(index: int) -> None:
        inside.set()
        assert leave.wait(10)

    other = threading.Thread(target=pool_run, args=(hold, 2, 2))
    other.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if len(run_pair(5)) == 2 else 1)
    leave.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_idle_threads_sleep() -> None:
    """Their processor time stands still, so torch's threads have the processors."""

    (worker,) = run_pair() - {threading.get_native_id()}

    def fields() -> list[str]:
        return Path(f"/proc/self/task/{worker}/stat").read_text().rpartition(")")[2].split()

    until = time.monotonic() + 10
    while fields()[0] != "S":
        assert time.monotonic() < until
        time.sleep(0.01)
    before = fields()[11:13]
    time.sleep(0.2)
    assert fields()[0] == "S" and fields()[11:13] == before


def test_workers_hear_of_their_own_faults_only() -> None:
    (worker,) = run_pair() - {threading.get_native_id()}
    status = Path(f"/proc/self/task/{worker}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)

    def is_blocked(number: signal.Signals) -> bool:
        return bool(blocked >> (number - 1) & 1)

    faults = signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL
    assert not any(map(is_blocked, faults))
    assert all(map(is_blocked, (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1)))
